"""ResNet-50 and Swin weights: torchvision's, DINO's and EsViT's files, written from the description of their
names, and our own runs there and back.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import RESNETS, SWINS, Config, config_to_dict
from fastdino.engine import checkpoint
from fastdino.interop.files import WeightsError
from fastdino.interop.official import export_checkpoint, import_checkpoint, read_official, to_native
from fastdino.interop.weights import load_backbone
from fastdino.models import ResNet, SwinTransformer, build_model


def resnet(width: int = 4, blocks: tuple[int, ...] = (2, 1, 1, 1), seed: int = 0) -> OrderedDict[str, Tensor]:
    """State dictionary under torchvision's names, without ``fc``."""
    generator = torch.Generator().manual_seed(seed)
    state: OrderedDict[str, Tensor] = OrderedDict()

    def conv(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=generator)

    def norm(name: str, channels: int) -> None:
        for kind in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{kind}"] = torch.rand(channels, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv1", width, 3, 7, 7)
    norm("bn1", width)
    channels = width
    for i, number in enumerate(blocks):
        planes = width * 2**i
        for j in range(number):
            at = f"layer{i + 1}.{j}."
            sizes = [(planes, channels, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
            for k, size in enumerate(sizes, 1):
                conv(f"{at}conv{k}", *size)
                norm(f"{at}bn{k}", size[0])
            if j == 0:
                conv(f"{at}downsample.0", 4 * planes, channels, 1, 1)
                norm(f"{at}downsample.1", 4 * planes)
            channels = 4 * planes
    return state


def swin(
    window: int = 7, width: int = 8, depths: tuple[int, ...] = (2, 2, 2, 2), seed: int = 0
) -> OrderedDict[str, Tensor]:
    """State dictionary of an EsViT Swin, without its heads."""
    generator = torch.Generator().manual_seed(seed)
    state: OrderedDict[str, Tensor] = OrderedDict()

    def put(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator)

    def linear(name: str, rows: int, columns: int) -> None:
        put(f"{name}.weight", rows, columns)
        put(f"{name}.bias", rows)

    def norm(name: str, dim: int) -> None:
        put(f"{name}.weight", dim)
        put(f"{name}.bias", dim)

    put("patch_embed.proj.weight", width, 3, 4, 4)
    put("patch_embed.proj.bias", width)
    norm("patch_embed.norm", width)
    for i, number in enumerate(depths):
        dim, side = width * 2**i, min(window, 56 // 2**i)
        for j in range(number):
            at = f"layers.{i}.blocks.{j}."
            norm(f"{at}norm1", dim)
            put(f"{at}attn.relative_position_bias_table", (2 * side - 1) ** 2, 2**i)
            place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
            delta = place[:, None] - place[None] + side - 1
            state[f"{at}attn.relative_position_index"] = delta[..., 0] * (2 * side - 1) + delta[..., 1]
            linear(f"{at}attn.qkv", 3 * dim, dim)
            linear(f"{at}attn.proj", dim, dim)
            norm(f"{at}norm2", dim)
            linear(f"{at}mlp.fc1", 4 * dim, dim)
            linear(f"{at}mlp.fc2", dim, 4 * dim)
        if i + 1 < len(depths):
            put(f"layers.{i}.downsample.reduction.weight", 2 * dim, 4 * dim)
            norm(f"layers.{i}.downsample.norm", 4 * dim)
    norm("norm", width * 2 ** (len(depths) - 1))
    return state


def head(dim: int, name: str = "head") -> dict[str, Tensor]:
    shapes = {"mlp.0.weight": (16, dim), "mlp.2.weight": (8, 16), "last_layer.weight_v": (12, 8)}
    return {f"{name}.{part}": torch.ones(shape) for part, shape in shapes.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def assert_weights(model, state) -> None:
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("extra", [{}, {"fc.weight": torch.ones(10, 128), "fc.bias": torch.ones(10)}])
def test_torchvision_or_released_resnet(tmp_path, extra) -> None:
    torch.save({**resnet(), **extra}, tmp_path / "dino_resnet50_pretrain.pth")
    model = load_backbone(tmp_path / "dino_resnet50_pretrain.pth")
    assert isinstance(model, ResNet) and model.embed_dim == 128
    assert_weights(model, resnet())
    assert model(torch.randn(2, 3, 40, 40)).shape == (2, 128)


def test_counters_that_old_files_lack(tmp_path) -> None:
    old = {name: value for name, value in resnet().items() if not name.endswith("tracked")}
    torch.save(old, tmp_path / "a.pth")
    model = load_backbone(tmp_path / "a.pth")
    assert model.bn1.num_batches_tracked == 0 and model.bn1.num_batches_tracked.dtype == torch.int64
    assert torch.equal(model.layer2[0].bn1.running_var, old["layer2.0.bn1.running_var"])


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_training_file_of_a_resnet(tmp_path, key) -> None:
    contents = {
        name: prefixed("module.", {**prefixed("backbone.", resnet(seed=seed)), **head(128)})
        for seed, name in enumerate(("student", "teacher"))
    }
    args = argparse.Namespace(arch="resnet50", patch_size=16)
    torch.save({**contents, "epoch": 3, "args": args, "dino_loss": {}}, tmp_path / "checkpoint.pth")
    model = load_backbone(tmp_path / "checkpoint.pth", key=key)
    assert_weights(model, resnet(seed=("student", "teacher").index(key)))


@pytest.mark.parametrize("key", ["teacher", "student"])
@pytest.mark.parametrize("window", [7, 14])
def test_training_file_of_esvit(tmp_path, key, window) -> None:
    """Both heads stand on the Swin itself, and only the student is wrapped."""
    contents = {
        name: prefixed(prefix, {**swin(window, seed=seed), **head(64), **head(64, "head_dense")})
        for seed, (name, prefix) in enumerate((("student", "module."), ("teacher", "")))
    }
    centers = {"center": torch.zeros(1, 12), "center_grid": torch.zeros(1, 12)}
    args = argparse.Namespace(arch="swin_tiny", cfg="swin_tiny_patch4_window7_224.yaml", patch_size=16)
    torch.save({**contents, "epoch": 3, "args": args, "dino_loss": centers}, tmp_path / "checkpoint.pth")
    model = load_backbone(tmp_path / "checkpoint.pth", key=key, patch_size=4)
    assert isinstance(model, SwinTransformer) and (model.window, model.depths) == (window, (2, 2, 2, 2))
    assert model.windows[0] == ((window, 0), (window, window // 2))
    assert_weights(model, swin(window, seed=("student", "teacher").index(key)))
    assert model(torch.randn(2, 3, 40, 40)).shape == (2, 64)


def test_what_only_the_original_swin_saves_is_left_out(tmp_path) -> None:
    masks = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49), "head.weight": torch.ones(10, 64)}
    lacking = {name: value for name, value in swin().items() if not name.endswith("index")}
    torch.save({**lacking, **masks}, tmp_path / "a.pth")
    assert_weights(load_backbone(tmp_path / "a.pth"), swin())


def test_another_window_resizes_the_bias_tables(tmp_path) -> None:
    state = swin(7, width=96, depths=(2, 2, 6, 2))
    for name in list(state):
        if name.endswith("bias_table"):
            heads = 3 * 2 ** int(name.split(".")[1])
            state[name] = torch.randn(169, heads)
    torch.save(state, tmp_path / "a.pth")
    assert load_backbone(tmp_path / "a.pth", arch="swin_tiny").window == 7
    model = load_backbone(tmp_path / "a.pth", arch="swin_tiny_w14")
    name = "layers.1.blocks.0.attn.relative_position_bias_table"
    grid = state[name].t().reshape(1, 6, 13, 13)
    want = F.interpolate(grid, size=(27, 27), mode="bicubic", align_corners=False)[0].flatten(1).t()
    torch.testing.assert_close(model.state_dict()[name], want)
    last = "layers.3.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(model.state_dict()[last], state[last])
    assert model.layers[0].blocks[0].attn.relative_position_index.shape == (196, 196)
    assert sum(p.numel() for p in model.parameters()) == 27_569_754


@pytest.mark.parametrize(
    ("state", "change", "arguments", "message"),
    [
        (
            resnet,
            {"layer4.0.conv3.weight": None},
            {},
            "not the weights of a ResNet: missing: layer4.0.conv3.w",
        ),
        (resnet, {"extra": torch.ones(1)}, {}, "not the weights of a ResNet: unexpected: extra"),
        (resnet, {"bn1.bias": torch.ones(3)}, {}, r"shapes: bn1.bias \[3\] instead of \[4\]"),
        (resnet, {"conv1.weight": torch.ones(3)}, {}, "conv1.weight has 1 dimensions, expected 4"),
        (resnet, {}, {"arch": "resnet50"}, "resnet50 begins with 64 channels, the file with 4"),
        (resnet, {}, {"arch": "vit_small"}, "expected vit_small, the file holds a ResNet"),
        (resnet, {}, {"patch_size": 16}, "expected patch_size 16, the file holds a ResNet"),
        (swin, {"norm.bias": None}, {}, "not the weights of a Swin: missing: norm.bias"),
        (
            swin,
            {"patch_embed.proj.weight": None},
            {},
            "not the weights of a Swin: missing patch_embed.proj.w",
        ),
        (swin, {"extra": torch.ones(1)}, {}, "not the weights of a Swin: unexpected: extra"),
        (
            swin,
            {"layers.1.blocks.0.attn.relative_position_bias_table": torch.ones(9, 2)},
            {},
            r"relative_position_bias_table \[9, 2\] instead of \[169, 2\]",
        ),
        (
            swin,
            {"layers.1.blocks.0.attn.relative_position_bias_table": None},
            {},
            "a stage has no relative_position_bias_table",
        ),
        (swin, {}, {"arch": "resnet50"}, "expected resnet50, the file holds a Swin"),
        (swin, {}, {"patch_size": 16}, "expected patch_size 16, a Swin has 4"),
        (
            swin,
            {},
            {"arch": "swin_tiny_w7"},
            r"swin_tiny_w7 has width 96 and \(2, 2, 6, 2\) blocks, the file has width 8 and \(2, 2, 2, 2\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, state, change, arguments, message) -> None:
    contents = {name: value for name, value in {**state(), **change}.items() if value is not None}
    torch.save(contents, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=message) as error:
        load_backbone(tmp_path / "odd.pth", **arguments)
    assert "odd.pth" in str(error.value)


@pytest.mark.parametrize("arch", ["resnet50", "swin_tiny_w7"])
def test_our_runs_there_and_back(tmp_path, monkeypatch, arch) -> None:
    monkeypatch.setitem(RESNETS, "resnet50", 4)  # narrower, and files of 2 MB instead of 700
    monkeypatch.setitem(SWINS, "swin_tiny_w7", (8, (2, 2, 2, 2), 7))
    config = Config()
    config.model.arch, config.model.out_dim, config.model.head_hidden_dim = arch, 12, 8
    torch.manual_seed(0)
    model = build_model(config.model)
    state = model.state_dict()
    tensors = {f"{who}.{k}": v.clone() for who in ("student", "teacher") for k, v in state.items()}
    meta = {
        "config": config_to_dict(config),
        "identity": {"global batch": 64},
        "epoch": 1,
        "step": 10,
        "steps_per_epoch": 10,
        "scaler": None,
    }
    run, file = tmp_path / "run", tmp_path / "official.pth"
    checkpoint.save(run / "checkpoints", 10, {**tensors, "center": torch.ones(12)}, {}, meta)
    assert_weights(load_backbone(run, arch=arch), model.backbone.state_dict())

    export_checkpoint(run, file)
    contents = torch.load(file, weights_only=False)
    first = {"resnet50": "module.backbone.conv1.weight", "swin_tiny_w7": "module.patch_embed.proj.weight"}
    wrapped = {"resnet50": True, "swin_tiny_w7": False}[arch]
    assert next(iter(contents["student"])) == first[arch]
    assert all(name.startswith("module.") == wrapped for name in contents["teacher"])
    assert "module.head.last_layer.weight_v" in contents["student"]
    assert_weights(load_backbone(file), model.backbone.state_dict())

    back, _, _ = to_native(read_official(file))
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    import_checkpoint(file, tmp_path / "imported")
    assert_weights(load_backbone(tmp_path / "imported", key="student"), model.backbone.state_dict())
