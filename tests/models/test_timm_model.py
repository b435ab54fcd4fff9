"""Backbones of timm: trained, saved, loaded and evaluated as ours are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastdino
import timm_library
from fastdino.config import Config, ConfigError, ModelConfig, validate, with_flags
from fastdino.dryrun import estimate
from fastdino.evaluation.command import network_name
from fastdino.interop.__main__ import main
from fastdino.interop.weights import load_backbone
from fastdino.models import TimmBackbone, build_backbone, build_student_teacher

CONVNEXT, VIT, SWIN = "timm:convnext_atto", "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"
SMALL = dict(out_dim=8, head_hidden_dim=8, bottleneck_dim=4, local_crops_number=1, num_workers=1, epochs=1)
SMALL |= dict(global_crops_size=64, local_crops_size=32, batch_size_per_gpu=2, warmup_epochs=0)
SMALL |= dict(device="cpu", precision="fp32", report=False, lr=0.01)


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    with timm_library.opened() as library:
        yield library


def config(arch: str, **flags: object) -> Config:
    return with_flags(Config(), {"arch": arch, **SMALL, **flags})


@pytest.mark.parametrize("arch", [CONVNEXT, VIT, SWIN, "timm:resnet10t"])
def test_crops_of_two_sizes(timm, arch) -> None:
    validate(config(arch), 1)
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(arch=arch), img_size=64).eval()
    assert isinstance(backbone, TimmBackbone) and network_name(backbone) == arch
    large, small = torch.randn(2, 3, 64, 64), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        features = backbone([large, small])
        assert features.shape == (3, backbone.embed_dim)
        torch.testing.assert_close(features, torch.cat((backbone.model(large), backbone.model(small))))


def test_the_teacher_has_no_stochastic_depth(timm) -> None:
    student, teacher = build_student_teacher(config(VIT, drop_path_rate=0.5))
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(teacher.train().backbone(images), student.eval().backbone(images))
        assert not torch.equal(student.train().backbone(images), student.backbone(images))


def test_a_run(timm, tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    run = tmp_path / "run"
    fastdino.train(out=run, data=tmp_path / "images", arch=CONVNEXT, **SMALL)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    student, teacher = load_backbone(run, key="student"), load_backbone(run)
    assert torch.equal(before, torch.get_rng_state())
    assert student.name == CONVNEXT and not student.training
    with torch.no_grad():
        features = [b(torch.ones(1, 3, 64, 64)) for b in (student, teacher)]
    assert all(f.isfinite().all() for f in features) and not torch.equal(*features)
    for kind, code in (("timm", 2), ("official", 1)):
        assert main([kind, "export", str(run), str(tmp_path / kind)]) == code
    said = capsys.readouterr().err
    assert "only backbones of ours are exported" in said and "the official code has no timm:conv" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"arch": "timm:convnext_otto"}, "--arch: timm has no model 'convnext_otto'; it has convnext"),
        ({"arch": "timm:nothing"}, "--arch: timm has no model 'nothing'$"),
        ({"local_crops_size": 36, "arch": VIT}, "--local_crops_size: expected a size that timm:vit_tiny"),
        ({"patch_size": 8}, "--patch_size: expected none with --arch timm:convnext_atto"),
        ({"attention": "math"}, "--attention: expected auto with --arch timm"),
        ({"compile": "on"}, "--compile: expected auto or off"),
        ({"activation_checkpointing": "full"}, "--activation_checkpointing: expected none"),
        ({"method": "esvit"}, "--method: expected another than esvit"),
    ],
)
def test_what_cannot_be_trained(timm, flags, message) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config(**{"arch": CONVNEXT, **flags}), 1)


def test_no_dry_run(timm) -> None:
    with pytest.raises(ConfigError, match="--dry_run: expected a backbone of ours, got timm:convnext_atto"):
        estimate(config(CONVNEXT), None)


def test_without_timm(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="--arch: timm:convnext_atto needs timm: pip install timm"):
        validate(config(CONVNEXT), 1)
