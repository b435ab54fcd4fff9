"""A backbone from every kind of weights file."""

from __future__ import annotations

import re

import pytest
import torch

from fastdino.config import Config, config_to_dict
from fastdino.engine import checkpoint
from fastdino.interop.files import WeightsError
from fastdino.interop.official import import_checkpoint
from fastdino.interop.weights import load_backbone
from fastdino.models import build_model, vit_tiny


def assert_weights(model, state) -> None:
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_released_backbone(tmp_path, layout) -> None:
    torch.save(layout.backbone(), tmp_path / "pretrain.pth")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = load_backbone(tmp_path / "pretrain.pth", arch="vit_tiny", patch_size=16)
    assert torch.equal(before, torch.get_rng_state())
    assert_weights(model, layout.backbone())
    assert (model.num_heads, model.depth, model.patch_size, model.embed_dim) == (3, 12, 16, 192)
    assert not model.training and all(p.requires_grad and not p.is_meta for p in model.parameters())
    reference = vit_tiny()
    reference.load_state_dict(layout.backbone())
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(model(x), reference.eval()(x))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("key", ["teacher", "student"])
def test_training_file(tmp_path, layout, key, batch_norm) -> None:
    contents = layout.training_file(batch_norm=batch_norm)
    torch.save(contents, tmp_path / "checkpoint.pth")
    model = load_backbone(tmp_path / "checkpoint.pth", key=key)
    names = {
        re.sub(r"^(module\.)?backbone\.", "", k): v for k, v in contents[key].items() if "backbone." in k
    }
    assert_weights(model, names)
    import_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "run")
    assert_weights(load_backbone(tmp_path / "run", key=key), names)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_prefixes_of_a_bare_file(tmp_path, layout, prefix) -> None:
    torch.save(layout.with_prefix(prefix, layout.backbone()), tmp_path / "a.pth")
    assert_weights(load_backbone(tmp_path / "a.pth"), layout.backbone())


def test_classifier_of_a_bare_file_is_left_out(tmp_path, layout) -> None:
    torch.save({**layout.backbone(), "head.weight": torch.ones(1000, 192)}, tmp_path / "a.pth")
    assert_weights(load_backbone(tmp_path / "a.pth"), layout.backbone())


def test_half_precision_file_gives_fp32(tmp_path, layout) -> None:
    torch.save({k: v.half() for k, v in layout.backbone().items()}, tmp_path / "a.pth")
    assert {p.dtype for p in load_backbone(tmp_path / "a.pth").parameters()} == {torch.float32}


def run_directory(path, **model) -> tuple[Config, torch.nn.Module]:
    config = Config()
    for name, value in {"arch": "vit_tiny", "depth": 2, "out_dim": 8, "head_hidden_dim": 8, **model}.items():
        setattr(config.model, name, value)
    torch.manual_seed(0)
    module = build_model(config.model, img_size=48)
    tensors = {
        f"{who}.{k}": v.clone() for who in ("student", "teacher") for k, v in module.state_dict().items()
    }
    checkpoint.save(path / "checkpoints", 5, tensors, {}, {"config": config_to_dict(config)})
    return config, module


def test_our_run_with_overridden_sizes(tmp_path) -> None:
    _, module = run_directory(tmp_path, embed_dim=40, num_heads=5, patch_size=8, in_chans=4)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-00000005"):
        model = load_backbone(path)
        assert_weights(model, module.backbone.state_dict())
        assert (model.num_heads, model.patch_size, model.in_chans, model.depth) == (5, 8, 4, 2)
    x = torch.randn(2, 4, 24, 32)
    assert torch.equal(model(x), module.eval().backbone(x))
    assert load_backbone(tmp_path, arch="vit_tiny", patch_size=8).embed_dim == 40


def test_heads_of_the_named_architecture(tmp_path) -> None:
    run_directory(tmp_path, embed_dim=96)
    assert load_backbone(tmp_path).num_heads == 3


def test_unknown_heads_are_asked_for(tmp_path) -> None:
    _, module = run_directory(tmp_path, embed_dim=40, num_heads=5)
    torch.save(module.backbone.state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="a.pth: the number of heads is not known for width 40; give arch"):
        load_backbone(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"norm.bias": None}, {}, "not the weights of a ViT: missing: norm.bias"),
        ({"extra": torch.ones(1)}, {}, "unexpected: extra"),
        ({"norm.bias": torch.ones(7)}, {}, r"shapes: norm.bias \[7\] instead of \[192\]"),
        ({"pos_embed": torch.ones(1, 12, 192)}, {}, "pos_embed holds 12 tokens, expected 1 \\+ a square"),
        ({"pos_embed": None}, {}, "not the weights of a ViT: missing patch_embed.proj.weight, pos_embed or"),
        (
            {},
            {"arch": "vit_small"},
            "vit_small has width 384 and 12 blocks, the file has width 192 and 12 blocks",
        ),
        ({}, {"patch_size": 8}, "expected patch_size 8, the file has 16"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, layout, change, arguments, message) -> None:
    state = layout.backbone()
    for name, value in change.items():
        state[name] = value
        if value is None:
            del state[name]
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=message) as error:
        load_backbone(tmp_path / "odd.pth", **arguments)
    assert "odd.pth" in str(error.value)


def test_foreign_weights_are_named(tmp_path) -> None:
    torch.save(
        {"stages.0.conv.weight": torch.ones(1), "stages.0.bn.weight": torch.ones(1)}, tmp_path / "a.pth"
    )
    with pytest.raises(
        WeightsError, match="a.pth: not the weights of a ViT, a ResNet-50 or a Swin: it holds stages.0.conv.w"
    ):
        load_backbone(tmp_path / "a.pth")


def test_student_missing_from_a_file(tmp_path, layout) -> None:
    contents = layout.training_file()
    del contents["student"]
    torch.save(contents, tmp_path / "a.pth")
    assert_weights(
        load_backbone(tmp_path / "a.pth"),
        {k.removeprefix("backbone."): v for k, v in contents["teacher"].items() if k.startswith("backbone.")},
    )
    with pytest.raises(WeightsError, match="a.pth: has no student"):
        load_backbone(tmp_path / "a.pth", key="student")


def test_bad_arguments(tmp_path) -> None:
    run_directory(tmp_path)
    with pytest.raises(ValueError, match="key: expected auto, teacher or student, got 'ema'"):
        load_backbone(tmp_path, key="ema")
    with pytest.raises(ValueError, match="arch: expected one of vit_tiny.*got 'vit_huge'"):
        load_backbone(tmp_path, arch="vit_huge")


def test_damaged_checkpoint(tmp_path) -> None:
    run_directory(tmp_path)
    step = tmp_path / "checkpoints" / "step-00000005"
    data = bytearray((step / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (step / "model.safetensors").write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="model.safetensors: damaged"):
        load_backbone(step)
    with (
        pytest.warns(UserWarning, match="DAMAGED"),
        pytest.raises(WeightsError, match="neither a checkpoint"),
    ):
        load_backbone(tmp_path)
