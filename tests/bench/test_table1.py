"""bench/table1.py: it compares features before it times, and says what it could not measure."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from bench import table1
from bench.harness import Transcript
from bench.providers import Problem
from fastdino.config import ModelConfig
from fastdino.dryrun import flops_per_image


@pytest.mark.parametrize(
    "arch, patch_size, gflop",
    [("vit_small", 16, 9.20), ("vit_small", 8, 44.8), ("vit_base", 16, 35.1), ("vit_base", 8, 156.3)],
)
def test_flops(arch: str, patch_size: int, gflop: float) -> None:
    found = table1.forward_flops(ModelConfig(arch=arch, patch_size=patch_size), 224) / 1e9
    assert found == pytest.approx(gflop, rel=3e-3)


def test_flops_agree_with_those_of_training() -> None:
    """Four crops more cost four times a student's forward and backward pass more."""
    model = ModelConfig()
    costs = [flops_per_image(Problem(1, n).config({})) for n in (0, 4)]
    patches = 2 * 36 * 384 * 3 * 16**2
    head = 2 * (384 * 2048 + 2048**2 + 2048 * 256 + 256 * 65536)
    blocks = table1.forward_flops(model, 96) - patches
    assert costs[1] - costs[0] == pytest.approx(4 * (3 * (blocks + head) + 2 * patches), rel=1e-9)


def test_toy_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDINO_RESULTS", str(tmp_path))
    flags = "--toy --save --batch 3 --seconds 0.1 --networks vit_small/16 resnet50"
    if importlib.util.find_spec("torchvision") is not None:
        flags = flags.removesuffix(" resnet50")  # the full size, as there is no toy ResNet
    monkeypatch.setattr(sys, "argv", ["bench", *flags.split()])
    table1.main()
    (path,) = tmp_path.glob("*/*.json")
    record = json.loads(path.read_text())
    assert "nan" not in path.read_text().lower()
    by_type = {dtype: [] for dtype in (row["dtype"] for row in record["rows"])}
    for row in record["rows"]:
        assert row["network"] == "vit_small/16" and row["mfu"] > 0
        assert row["images_per_second"] == pytest.approx(3 / row["median_s"])
        by_type[row["dtype"]].append(row["provider"])
    assert "fp32" in by_type and set(map(tuple, by_type.values())) == {("eager", "fastdino")}
    if "resnet50" in flags:
        assert any("not measured (torchvision is not installed)" in line for line in record["transcript"])


def test_other_features_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table1, "vit_features", lambda vit, images: vit(images) * 1.001)
    args = argparse.Namespace(toy=True, official=None, batch=2, seconds=0.1)
    with pytest.raises(SystemExit, match="features of eager differ by 1.0e-03, nothing is timed"):
        table1.measure("vit_small/16", args, Transcript())
    with pytest.raises(SystemExit, match="nothing is timed"):
        table1.compare("x", {"fastdino": torch.ones(2), "eager": torch.full((2,), float("nan"))})
