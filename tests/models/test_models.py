"""Models built from a configuration."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastdino.config import (
    RESNETS,
    SWINS,
    Config,
    ConfigError,
    CropConfig,
    ModelConfig,
    feature_width,
    validate,
    with_flags,
)
from fastdino.engine.build import Engine, build
from fastdino.engine.optim import parameter_groups
from fastdino.engine.schedules import Schedule
from fastdino.models import ResNet, build_backbone, build_model, build_student_teacher
from tests.engine.test_step import B, K, Reads, batches, paper_loop, tiny_config, without_key_bias

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


def other(arch: str, **flags) -> Config:
    """A run of ``arch`` on tiny crops, with a tiny head."""
    config = tiny_config(lr=0.003, clip_grad=3.0)
    config.model = ModelConfig(arch=arch, out_dim=K, head_hidden_dim=48, bottleneck_dim=16)
    return with_flags(config, {"device": "cpu", "precision": "fp32", "drop_path_rate": 0.0} | flags)


def train(config: Config, steps: int) -> tuple[Engine, list[float]]:
    engine, source, schedule = build(config), batches(), Schedule(config, 5, B)
    return engine, [engine.step.run(source, schedule(s)).loss for s in range(steps)]


def test_resnet_trains() -> None:
    engine, losses = train(other("resnet50"), 2)
    fresh = build(other("resnet50")).method
    assert all(map(math.isfinite, losses)) and losses[0] != losses[1]
    student, teacher = engine.method.student.backbone, engine.method.teacher.backbone
    assert isinstance(student, ResNet)
    # Two resolutions per step in the student, one in the teacher, whose own batches make its statistics.
    assert student.bn1.num_batches_tracked == 4 and teacher.bn1.num_batches_tracked == 2
    assert not torch.equal(student.bn1.running_mean, teacher.bn1.running_mean)
    before, moved = fresh.student.backbone.conv1.weight, student.conv1.weight
    assert not torch.equal(before, moved)
    with torch.no_grad():
        followed = float((teacher.conv1.weight - before).norm() / (moved - before).norm())
    assert 0.0 < followed < 0.1  # the EMA, not a copy
    assert all(p.grad is None for p in teacher.parameters())
    decayed, plain = parameter_groups(engine.method.student.backbone)
    assert (len(decayed["params"]), len(plain["params"])) == (53, 106)


def test_swin_trains_as_the_papers_loop() -> None:
    config = other("swin_tiny_w7")
    engine, losses = train(config, 2)
    oracle = build(config)
    assert losses == pytest.approx(paper_loop(oracle.method, config, batches(), 2, 5), rel=1e-4)
    pairs = zip(engine.method.state_dict().items(), oracle.method.state_dict().values(), strict=True)
    for (name, a), b in pairs:
        a, b = (without_key_bias(name, x).double() for x in (a, b))
        assert float((a - b).norm()) <= 1e-3 * float(b.norm()), name
    decayed, _ = parameter_groups(engine.method.student.backbone)
    assert sum(p.shape == (169, 3) for p in decayed["params"]) == 2  # bias tables, as officially


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_swin_trains_in_16_bits_with_all_options(checkpointing) -> None:
    flags = {"precision": "bf16", "drop_path_rate": 0.2, "activation_checkpointing": checkpointing}
    config = other("swin_tiny_w14", **flags)
    engine, losses = train(config, 2)
    assert all(map(math.isfinite, losses)) and engine.attention == "sdpa"
    assert engine.method.student.backbone.checkpointing == checkpointing
    assert engine.method.teacher.backbone.drop_path_rate == 0.0
    assert all(torch.equal(c, p.bfloat16()) for p, c in engine.updater.copies.items())


@pytest.mark.parametrize("arch", ["resnet50", "swin_tiny_w7"])
def test_a_stored_state_goes_on_to_the_bit(arch, monkeypatch) -> None:
    monkeypatch.setitem(RESNETS, "resnet50", 8)  # narrower
    monkeypatch.setitem(SWINS, "swin_tiny_w7", (16, (2, 2, 2, 2), 7))
    config = other(arch, precision="bf16")
    source, schedule, first = batches(), Schedule(config, 5, B), build(config)
    first.step.run(source, schedule(1))
    model = {name: value.clone() for name, value in first.state().items()}
    optimizer = {name: value.clone() for name, value in first.updater.state().items()}
    again = build(with_flags(config, {"seed": 5}))
    again.load_state(model)
    again.updater.load_state(optimizer)
    crops = next(source)
    losses = [engine.step.run(iter([crops]), schedule(2)).loss for engine in (first, again)]
    assert losses[0] == losses[1]
    pairs = zip(first.state().items(), again.state().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)


@pytest.mark.parametrize("arch", ["resnet50", "swin_tiny_w14"])
def test_no_pass_waits_for_the_device(arch, monkeypatch) -> None:
    monkeypatch.setitem(RESNETS, "resnet50", 8)
    monkeypatch.setitem(SWINS, "swin_tiny_w14", (16, (2, 2, 2, 2), 14))
    engine = build(other(arch, drop_path_rate=0.1))
    for reads in (Reads(), Reads()):  # the first step makes the tables
        crops = next(batches())
        with reads:
            out = engine.method.student([crops.global_, crops.local])[0]
            out.sum().backward()
            with torch.no_grad():
                engine.method.teacher([crops.global_])
    assert reads.found == []


@pytest.mark.parametrize(
    ("arch", "flags", "blamed"),
    [
        ("resnet50", {"patch_size": 8}, "patch_size"),
        ("resnet50", {"patch_size": 4}, "patch_size"),
        ("swin_tiny_w7", {"patch_size": 8}, "patch_size"),
        ("swin_tiny_w7", {"num_heads": 3}, "num_heads"),
        ("swin_tiny_w7", {"depth": 12}, "depth"),
        ("resnet50", {"embed_dim": 2048}, "embed_dim"),
        ("resnet50", {"attention": "sdpa"}, "attention"),
        ("swin_tiny", {"attention": "math"}, "attention"),
        ("swin_tiny_w7", {"compile": "on"}, "compile"),
        ("resnet50", {"compile": "on"}, "compile"),
        ("resnet50", {"activation_checkpointing": "full"}, "activation_checkpointing"),
        ("resnet50", {"drop_path_rate": 0.2}, "drop_path_rate"),
        ("swin_tiny_w7", {"local_crops_size": 3}, "local_crops_size"),
        ("swin_tiny_w7", {"mesh": "shard"}, "arch"),
        ("resnet51", {}, "arch"),
    ],
)
def test_flags_that_make_no_sense_are_refused(arch, flags, blamed) -> None:
    with pytest.raises(ConfigError) as error:
        validate(with_flags(Config(), {"arch": arch} | flags), world_size=2)
    assert error.value.flag == blamed and "expected" in str(error.value) and "got" in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        {"arch": "resnet50", "drop_path_rate": 0.0},
        {"arch": "resnet50_w5", "local_crops_size": 8},
        {"arch": "swin_small_w14", "patch_size": 4, "activation_checkpointing": "full"},
        {"arch": "swin_tiny_patch4_window7_224", "attention": "sdpa", "compile": "off"},
    ],
)
def test_flags_that_make_sense_pass(flags) -> None:
    config = with_flags(Config(), flags)
    validate(config, world_size=2)
    with torch.device("meta"):
        assert build_backbone(config.model).embed_dim == feature_width(config.model)
