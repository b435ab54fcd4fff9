"""A run on shards, and what its checkpoints say of how its data is made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.config import config_from_flags
from fastdino.data.pack import pack
from fastdino.engine import checkpoint, trainer
from fastdino.engine.trainer import Trainer
from runs import FLAGS


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(32):
        path = root / str(i % 2) / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return root


def flags(data: Path, out: Path, *more: str) -> Trainer:
    words = [*FLAGS, "--epochs", "1", "--warmup_epochs", "0", *more]
    pairs = {words[i].removeprefix("--"): words[i + 1] for i in range(0, len(words), 2)}
    pairs |= {"data_path": str(data), "output_dir": str(out)}
    return Trainer(config_from_flags(**pairs))


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("run")
    pack(str(photos), root / "shards", shard_size=20_000, progress=False)
    flags(root / "shards", root / "out").fit()
    return root / "shards", root / "out"


def test_a_run_on_shards_equals_one_on_their_files(photos, finished, tmp_path):
    import torch

    flags(photos, tmp_path / "files").fit()
    one, two = (
        checkpoint.load(checkpoint.latest(out / "checkpoints")) for out in (finished[1], tmp_path / "files")
    )
    for a, b in zip(one[:2], two[:2], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert (
        json.loads((finished[1] / "images.json").read_text())["names"][0] == "shard-000000.tar/00000000.png"
    )


def test_another_dali_or_augmentation_is_refused_with_both_values(finished, monkeypatch):
    import nvidia.dali as dali

    shards, out = finished
    assert flags(shards, out).step == 4
    version = dali.__version__
    monkeypatch.setattr(dali, "__version__", "1.0.0")
    with pytest.raises(
        checkpoint.CheckpointError,
        match=f"DALI version: checkpoint '{version}', now '1.0.0' .*install the one that began the run",
    ):
        flags(shards, out)
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "AUGMENTATION_VERSION", 99)
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"augmentation version: checkpoint 1, now 99 .*continue with the release",
    ):
        flags(shards, out)


def test_a_checkpoint_that_does_not_tell_them_is_taken(finished, monkeypatch):
    shards, out = finished
    real = checkpoint.load

    def older(path):
        model, optimizer, meta = real(path)
        for key in ("DALI version", "augmentation version"):
            del meta["identity"][key]
        return model, optimizer, meta

    monkeypatch.setattr(checkpoint, "load", older)
    assert flags(shards, out).step == 4


def test_other_shards_are_another_run(finished, photos):
    with pytest.raises(checkpoint.CheckpointError, match="list of images: checkpoint"):
        flags(photos, finished[1])
