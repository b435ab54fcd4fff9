"""Swin against its definition written out: padded maps, rolled windows, masks, everything computed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import SWINS, ConfigError, ModelConfig
from fastdino.models import SwinTransformer, build_backbone, build_model
from fastdino.models.linear import attach_low_precision
from fastdino.models.swin import WindowAttention, resize_bias_table, standard_swin
from fastdino.models.swin_windows import plan, relative_position_index


def small(window: int = 7, seed: int = 0, **options) -> SwinTransformer:
    """Narrow, in float64, with weights so large that every term matters."""
    torch.manual_seed(seed)
    sizes = {"width": 8, "depths": (2, 2, 3, 2), "num_heads": (1, 2, 2, 4), "mlp_ratio": 2.0}
    model = SwinTransformer(**{**sizes, "window": window, **options}).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
            if "table" in name:
                p.normal_(0.0, 2.0)
    return model


def images(batch: int, height: int, width: int | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width or height, generator=generator, dtype=torch.float64)


def plain_attention(attn: WindowAttention, x: Tensor, window: int, shift: int) -> Tensor:
    """Of a map of normed tokens [B, H, W, C], one window at a time."""
    height, width, dim = x.shape[1:]
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1:3]
    region = torch.zeros(rows, columns, dtype=torch.long)
    if shift:
        for axis, size in enumerate((rows, columns)):
            place = torch.arange(size)
            label = torch.where(place < size - window, 0, torch.where(place < size - shift, 1, 2))
            region += label[:, None] * 3 if axis == 0 else label
    x = torch.roll(x, (-shift, -shift), (1, 2))
    out = torch.zeros_like(x)
    table = attn.relative_position_bias_table
    place = [(i, j) for i in range(window) for j in range(window)]
    at = [[(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in place] for a, b in place]
    for r in range(0, rows, window):
        for c in range(0, columns, window):
            cut = (slice(None), slice(r, r + window), slice(c, c + window))
            tokens = x[cut].flatten(1, 2)
            q, k, v = F.linear(tokens, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)
            q, k, v = (y.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
            labels = region[cut[1:]].flatten()
            mask = torch.where(labels[:, None] == labels, 0.0, -100.0).to(x)
            logits = q @ k.mT * q.shape[-1] ** -0.5 + table[torch.tensor(at)].permute(2, 0, 1) + mask
            y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
            out[cut] = F.linear(y, attn.proj.weight, attn.proj.bias).unflatten(1, (window, window))
    return torch.roll(out, (shift, shift), (1, 2))[:, :height, :width]


def plain_outputs(model: SwinTransformer, x: Tensor) -> list[Tensor]:
    """The map after every block, [B, H, W, C], for images of one size."""
    embed = model.patch_embed
    x = embed.norm(F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=4).permute(0, 2, 3, 1))
    outputs = []
    for i, layer in enumerate(model.layers):
        for block, (window, shift) in zip(layer.blocks, model.windows[i], strict=True):
            x = x + plain_attention(block.attn, block.norm1(x), window, shift)
            hidden = F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))
            x = x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
            outputs.append(x)
        if layer.downsample is not None:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat((x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]), dim=-1)
            x = F.linear(layer.downsample.norm(x), layer.downsample.reduction.weight)
    return outputs


def plain_regions(model: SwinTransformer, x: Tensor) -> Tensor:
    return model.norm(plain_outputs(model, x)[-1].flatten(1, 2))


@pytest.mark.parametrize("window", [7, 14])
@pytest.mark.parametrize("size", [(96, 96), (224, 224), (100, 68), (36, 150), (4, 9)])
def test_equals_the_padded_definition(window, size) -> None:
    model, x = small(window), images(2, *size)
    with torch.no_grad():
        want = plain_regions(model, x)
        view, (regions,) = model.eval().forward_regions(x)
    torch.testing.assert_close(regions, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(view, want.mean(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [7, 14])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_gradients_equal_those_of_the_definition(window, checkpointing) -> None:
    model, x = small(window), images(2, 96)
    weights = images(2, 3, model.embed_dim, seed=3)[:, 0]
    model.checkpointing = checkpointing
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    want = torch.autograd.grad(
        (plain_regions(model, inputs[0])[:, :3] * weights).sum(), [inputs[0], *model.parameters()]
    )
    _, (regions,) = model.forward_regions(inputs[1])
    got = torch.autograd.grad((regions[:, :3] * weights).sum(), [inputs[1], *model.parameters()])
    scale = max(float(g.abs().max()) for g in want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * scale)


def test_resolutions_share_a_pass() -> None:
    model = small().eval()
    crops = [images(1, 64), images(2, 64, seed=2), images(3, 36), images(2, 64, 32)]
    with torch.no_grad():
        views, regions = model.forward_regions(crops)
        want = [plain_regions(model, x) for x in crops]
        torch.testing.assert_close(views, torch.cat([y.mean(1) for y in want]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(crops), views)
    assert [tuple(r.shape[:2]) for r in regions] == [(3, 4), (3, 4), (2, 2)]
    torch.testing.assert_close(regions[0], torch.cat(want[:2]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(regions[2], want[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_probe_features_are_mean_tokens_of_the_last_blocks(n) -> None:
    model, x = small().eval(), images(2, 72)
    with torch.no_grad():
        outputs = plain_outputs(model, x)
        outputs = [*outputs[:-2], *(model.norm(y) for y in outputs[-2:])]
        want = torch.cat([y.mean((1, 2)) for y in outputs[-n:]], dim=1)
        torch.testing.assert_close(model.probe_features(x, n), want, rtol=1e-12, atol=1e-12)


def test_probe_width_and_bounds() -> None:
    model = standard_swin("swin_tiny_w7").eval()
    with torch.no_grad():
        assert model.probe_features(torch.randn(1, 3, 32, 32)).shape == (1, 2304)
    with pytest.raises(ValueError, match=r"n must be between 1 and the number of blocks \(12\), got 13"):
        model.probe_features(torch.randn(1, 3, 32, 32), 13)


def test_windows_are_those_of_a_224_pixel_image() -> None:
    for arch, want in {
        "swin_tiny_w7": [(7, 3), (7, 3), (7, 3), (7, 0)],
        "swin_base_w14": [(14, 7), (14, 7), (14, 0), (7, 0)],
    }.items():
        with torch.device("meta"):
            model = standard_swin(arch)
        assert [stage[1] for stage in model.windows] == want
        assert all(shift == 0 for stage in model.windows for _, shift in stage[::2])


@pytest.mark.parametrize(
    ("arch", "backbone", "with_head", "tensors"),
    [
        ("swin_tiny_w7", 27_519_354, 50_657_914, 171),
        ("swin_tiny_w14", 27_569_754, 50_708_314, 171),
        ("swin_small_w7", 48_837_258, 71_975_818, 327),
        ("swin_small_w14", 48_968_298, 72_106_858, 327),
        ("swin_base_w7", 86_743_224, 110_406_072, 327),
        ("swin_base_w14", 86_917_944, 110_580_792, 327),
    ],
)
def test_parameter_counts(arch, backbone, with_head, tensors) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(arch=arch))
    assert sum(p.numel() for p in model.backbone.parameters()) == backbone
    assert sum(p.numel() for p in model.parameters()) == with_head
    assert len(list(model.backbone.parameters())) == tensors and model.backbone.name == arch
    assert all(m.eps == 1e-6 for m in model.backbone.modules() if isinstance(m, torch.nn.LayerNorm))
    heads = [layer.blocks[0].attn.num_heads for layer in model.backbone.layers]
    assert [32 * n for n in heads] == [SWINS[arch][0] << i for i in range(4)]


def test_other_sizes_are_named_by_what_they_are() -> None:
    assert small(14).name == "swin (2, 2, 3, 2) 64 wide, window 14"


def test_published_names() -> None:
    with torch.device("meta"):
        names = list(standard_swin("swin_tiny_w7").state_dict())
    block = (
        "norm1.weight norm1.bias attn.relative_position_bias_table attn.relative_position_index "
        "attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias norm2.weight norm2.bias "
        "mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
    ).split()
    start = [f"patch_embed.{n}" for n in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")]
    first = [f"layers.0.blocks.{i}.{name}" for i in range(2) for name in block]
    merging = [f"layers.0.downsample.{n}" for n in ("reduction.weight", "norm.weight", "norm.bias")]
    assert sorted(names[: 4 + 28 + 3]) == sorted(start + first + merging)
    assert names[-2:] == ["norm.weight", "norm.bias"]
    assert sum(name.endswith("relative_position_index") for name in names) == 12


def test_relative_positions() -> None:
    index = relative_position_index(3)
    assert index.shape == (9, 9) and index.dtype == torch.int64
    assert index[0, 0] == 2 * 5 + 2 and index[0, 8] == 0 and index[8, 0] == 24
    assert index[1, 3] == (0 - 1 + 2) * 5 + (1 - 0 + 2)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = standard_swin("swin_tiny_w7")
    for name, p in model.state_dict(keep_vars=False).items():
        if "table" in name or (p.ndim == 2 and p.numel() > 10_000):
            assert 0.017 < float(p.std()) < 0.023 and float(p.abs().max()) <= 2.0, name
        elif "norm" in name or (p.is_floating_point() and p.ndim == 1 and "proj.bias" not in name):
            assert torch.equal(p, torch.full_like(p, float("norm" in name and name.endswith("weight")))), name


def test_nothing_is_padded_in_memory(monkeypatch) -> None:
    """At 96 pixels a window of 14 holds 36 of 196 tokens in stage 3, and all its pads are one key more."""
    seen = []
    real = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask):
        seen.append((q.shape[0], q.shape[2], k.shape[2], tuple(attn_mask.shape[2:])))
        return real(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        small(14)(images(5, 96))
    assert seen[-5:] == [(5, 36, 37, (36, 37))] * 3 + [(5, 9, 10, (9, 10))] * 2


def test_a_shift_moves_the_rows_once_per_block() -> None:
    maps, windows = ((2, 14, 14), (3, 6, 6)), (((7, 0), (7, 3)), ((7, 0), (7, 0)))
    first, second = plan(maps, windows, torch.device("cpu"), False)
    assert [layout.enter is None for layout in first.blocks] == [False, False]
    assert [layout.enter is None for layout in second.blocks] == [True, True]
    assert second.maps == ((2, 7, 7), (3, 3, 3)) and second.merge is None
    kinds = first.blocks[0].kinds
    assert [(k.windows, k.tokens, k.pads) for k in kinds] == [(2 * 4, 49, 0), (3, 36, 13)]
    for stage in (first, second):
        for layout in stage.blocks:
            total = sum(n * h * w for n, h, w in stage.maps)
            assert sum(k.windows * k.tokens for k in layout.kinds) == total == len(layout.crop)
    assert plan(maps, windows, torch.device("cpu"), True) is plan(maps, windows, torch.device("cpu"), True)


def test_stochastic_depth() -> None:
    model = small(drop_path_rate=0.5)
    x = images(64, 8)
    torch.manual_seed(5)
    scales = torch.stack(model._drops(x, ((64, 2, 2),)))  # [blocks, crops, 2]
    rates = torch.linspace(0, 0.5, 9, dtype=torch.float64)
    for rate, values in zip(rates, scales, strict=True):
        torch.testing.assert_close(values.unique()[-1], 1 / (1 - rate))
        assert set(values.unique().tolist()) <= {0.0, float(values.max())}
        assert abs(float((values == 0).double().mean()) - float(rate)) < 0.15
    torch.manual_seed(5)
    dropped = model(x)
    assert not torch.equal(dropped, model(x))
    assert torch.equal(model.eval()(x), model(x))
    model.drop_path_rate = 0.0
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    with pytest.raises(ValueError, match=r"drop_path_rate must be in \[0, 1\), got 1"):
        SwinTransformer(drop_path_rate=1.0)


def test_dropping_everything_leaves_the_shortcut(monkeypatch) -> None:
    model, x = small(drop_path_rate=0.3), images(2, 64)
    monkeypatch.setattr(model, "_drops", lambda tokens, maps: [torch.zeros(2, 2).to(tokens)] * 9)
    got = model.train()(x)
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for layer in other.layers:
            for block in layer.blocks:
                for module in (block.attn.proj, block.mlp.fc2):
                    module.weight.zero_()
                    module.bias.zero_()
    torch.testing.assert_close(got, SwinTransformer.forward(other, x), rtol=1e-12, atol=1e-12)


def test_bf16_is_as_exact_as_autocast() -> None:
    torch.manual_seed(0)
    model = SwinTransformer(width=32, depths=(2, 2), num_heads=(1, 2)).eval()
    x = images(2, 48).float()
    with torch.no_grad():
        want = model.double()(x.double())
        model.float()
        attach_low_precision(model, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(x)
    assert got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) < 0.02


def test_bias_table_for_another_window() -> None:
    table = torch.randn(169, 3, dtype=torch.float64)
    assert resize_bias_table(table, 7) is table
    larger = resize_bias_table(table, 14)
    assert larger.shape == (729, 3)
    grid = table.view(13, 13, 3).permute(2, 0, 1)[None]
    want = F.interpolate(grid, size=(27, 27), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(larger.view(27, 27, 3).permute(2, 0, 1), want)
    ramp = torch.arange(169.0).view(169, 1)
    assert resize_bias_table(ramp, 14).view(27, 27)[13, 13] == pytest.approx(84.0, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m([]), "expected at least one batch of images"),
        (lambda m: m(torch.zeros(1, 4, 8, 8)), r"images must be \[B, 3, H, W\].*got shape \(1, 4, 8, 8\)"),
        (lambda m: m(torch.zeros(1, 3, 3, 8)), "with H and W of at least 4, got shape"),
        (lambda m: setattr(m, "checkpointing", "some"), "checkpointing: expected one of none, selective"),
        (lambda m: SwinTransformer(width=8, num_heads=(3, 1, 1, 1)), "num_heads must divide the widths"),
        (lambda m: SwinTransformer(window=0), "window must be at least 1, got 0"),
        (lambda m: standard_swin("swin_huge"), "--arch: expected one of swin_tiny_w7, .*got 'swin_huge'"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(small())


def test_aliases() -> None:
    with torch.device("meta"):
        for alias, arch in {
            "swin_tiny": "swin_tiny_w7",
            "swin_base_patch4_window14_224": "swin_base_w14",
        }.items():
            shapes = [
                {k: v.shape for k, v in build_backbone(ModelConfig(arch=name)).state_dict().items()}
                for name in (alias, arch)
            ]
            assert shapes[0] == shapes[1]
    with pytest.raises(ConfigError, match="did you mean 'swin_tiny_w7'"):
        build_backbone(ModelConfig(arch="swin_tiny_w8"))
