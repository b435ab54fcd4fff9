"""Training goes on from an imported official checkpoint, and the result goes back."""

from __future__ import annotations

import json

import numpy as np
import torch
from PIL import Image

import fastdino
from fastdino.interop.files import read_pickle
from fastdino.interop.official import export_checkpoint, import_checkpoint
from fastdino.interop.weights import load_backbone


def test_training_continues_at_the_next_epoch(tmp_path, layout) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    contents = layout.training_file()
    torch.save(contents, tmp_path / "checkpoint.pth")
    import_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "run")
    fastdino.train(
        tmp_path / "run",
        tmp_path / "images",
        config=str(tmp_path / "run" / "config.yaml"),
        batch_size_per_gpu=2,
        epochs=2,
        warmup_epochs=0,
        local_crops_number=10,
        num_workers=1,
        device="cpu",
        precision="fp32",
        log="none",
        report=False,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1]
    export_checkpoint(tmp_path / "run", tmp_path / "out.pth")
    exported = read_pickle(tmp_path / "out.pth")
    assert exported["epoch"] == 2
    assert exported["optimizer"]["state"][0]["step"] == 1251 + 2
    before = contents["student"]["module.backbone.blocks.0.mlp.fc1.weight"]
    after = exported["student"]["module.backbone.blocks.0.mlp.fc1.weight"]
    assert 0 < (before - after).abs().mean() < 1e-3
    assert torch.equal(load_backbone(tmp_path / "run", key="student").blocks[0].mlp.fc1.weight, after)
