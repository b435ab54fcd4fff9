"""Models built from a configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastdino.config import Config, CropConfig, ModelConfig
from fastdino.models import build_backbone, build_model, build_student_teacher

SMALL = ModelConfig(
    arch="vit_tiny", patch_size=8, embed_dim=24, depth=2, out_dim=50, head_hidden_dim=16, bottleneck_dim=8
)


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("vit_tiny", 5_524_416),
        ("vit_small", 21_665_664),
        ("vit_base", 85_798_656),
        ("deit_tiny", 5_524_416),
        ("deit_small", 21_665_664),
    ],
)
def test_architectures_and_aliases(arch, count) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build_backbone(ModelConfig(arch=arch)).parameters()) == count


@pytest.mark.parametrize(
    ("arch", "patch", "total"),
    [
        ("vit_tiny", 16, 27_483_328),
        ("vit_tiny", 8, 27_485_632),
        ("vit_small", 16, 44_017_792),
        ("vit_small", 8, 44_022_400),
        ("vit_base", 16, 108_937_216),
        ("vit_base", 8, 108_946_432),
    ],
)
def test_counts_with_head(arch, patch, total) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(arch=arch, patch_size=patch))
    assert sum(p.numel() for p in model.parameters()) == total


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match=r"--arch: expected one of vit_tiny, .*, got 'vit_smal'"):
        build_backbone(ModelConfig(arch="vit_smal"))


def test_overrides() -> None:
    config = replace(SMALL, num_heads=2, in_chans=4)
    model = build_backbone(config, drop_path_rate=0.2, img_size=40)
    assert (model.embed_dim, model.depth, model.num_heads, model.in_chans) == (24, 2, 2, 4)
    assert model.pos_embed.shape == (1, 26, 24) and model.drop_path_rate == 0.2
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads"):
        build_backbone(replace(SMALL, embed_dim=25))


def test_head_follows_the_configuration() -> None:
    model = build_model(
        replace(SMALL, head_layers=2, head_act="relu", use_bn_in_head=True, norm_last_layer=False),
        img_size=16,
    )
    names = [type(m).__name__ for m in model.head.mlp]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert model.head.weight().shape == (50, 8) and model.head.last_layer.weight_g.requires_grad


def test_multi_crop_model_runs_head_on_packed_crops() -> None:
    torch.manual_seed(0)
    model = build_model(SMALL, img_size=16)
    crops = [torch.randn(2, 3, 16, 16), torch.randn(5, 3, 8, 8)]
    features, prototypes = model(crops)
    assert features.shape == (7, 8) and prototypes.shape == (50, 8)
    want = torch.cat([model.head.bottleneck(model.backbone(x)) for x in crops])
    torch.testing.assert_close(features, want)
    torch.testing.assert_close(model(crops[0])[0], want[:2])
    assert torch.equal(prototypes, model.head.weight())
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"backbone", "head"}


def test_student_and_teacher() -> None:
    torch.manual_seed(0)
    config = Config(model=replace(SMALL, drop_path_rate=0.3), crops=CropConfig(global_crops_size=24))
    student, teacher = build_student_teacher(config)
    assert student.backbone.pos_embed.shape[1] == 10
    pairs = list(zip(student.state_dict().items(), teacher.state_dict().items(), strict=True))
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    assert all(a[1].data_ptr() != b[1].data_ptr() for a, b in pairs)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert student.backbone.drop_path_rate == 0.3 and teacher.backbone.drop_path_rate == 0.0
    x = torch.randn(2, 3, 24, 24)
    for a, b in zip(teacher.train()(x), teacher.eval()(x), strict=True):
        assert torch.equal(a, b)
