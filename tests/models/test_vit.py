"""The Vision Transformer against an eager float64 implementation written from the papers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.models import VisionTransformer, vit_base, vit_small, vit_tiny
from fastdino.models.linear import attach_low_precision

COUNTS = [
    (vit_tiny, 16, 5_524_416, 197, 37),
    (vit_tiny, 8, 5_526_720, 785, 145),
    (vit_small, 16, 21_665_664, 197, 37),
    (vit_small, 8, 21_670_272, 785, 145),
    (vit_small, 5, 22_067_712, 1937, 362),
    (vit_base, 16, 85_798_656, 197, 37),
    (vit_base, 8, 85_807_872, 785, 145),
]


def tiny(**kwargs: object) -> VisionTransformer:
    """A small float64 model whose weights are large enough for attention and positions to matter."""
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, **kwargs}
    model = VisionTransformer(**settings).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.2)
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def bicubic_matrix(n_in: int, n_out: int, scale: float) -> Tensor:
    """Rows of cubic convolution weights (Keys 1981, a = -0.75) at (i + 0.5) / scale - 0.5, edges repeated."""

    def kernel(d: float) -> float:
        d, a = abs(d), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    rows = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        center = (i + 0.5) / scale - 0.5
        for j in range(math.floor(center) - 1, math.floor(center) + 3):
            rows[i, min(max(j, 0), n_in - 1)] += kernel(center - j)
    return rows


def eager_positions(model: VisionTransformer, height: int, width: int) -> Tensor:
    pos, p = model.pos_embed[0], model.patch_size
    side = math.isqrt(len(pos) - 1)
    h, w = height // p, width // p
    if h * w == side * side and height == width:
        return pos
    vertical = bicubic_matrix(side, h, (h + 0.1) / side)
    horizontal = bicubic_matrix(side, w, (w + 0.1) / side)
    grid = torch.einsum("yi,xj,ijd->yxd", vertical, horizontal, pos[1:].view(side, side, -1))
    return torch.cat((pos[:1], grid.reshape(h * w, -1)))


def eager_layers(
    model: VisionTransformer, x: Tensor, masks: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Tokens after every block and the last attention; masks [depth, 2, B] scale the residual branches."""
    w = dict(model.named_parameters())
    patches = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=model.patch_size)
    tokens = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat((w["cls_token"].expand(len(x), 1, -1), tokens), 1)
    tokens = tokens + eager_positions(model, *x.shape[2:])
    batch, n, dim = tokens.shape
    outputs = []
    for i in range(model.depth):
        b = {name.removeprefix(f"blocks.{i}."): p for name, p in w.items() if name.startswith(f"blocks.{i}.")}
        scale = torch.ones(2, batch, dtype=x.dtype) if masks is None else masks[i]
        y = F.layer_norm(tokens, (dim,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        q, k, v = (y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).chunk(3, dim=-1)
        heads = []
        maps = []
        for sl in torch.arange(dim).chunk(model.num_heads):
            logits = q[..., sl] @ k[..., sl].transpose(1, 2) / math.sqrt(len(sl))
            maps.append(logits.exp() / logits.exp().sum(-1, keepdim=True))
            heads.append(maps[-1] @ v[..., sl])
        y = torch.cat(heads, -1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        tokens = tokens + y * scale[0].view(-1, 1, 1)
        y = F.layer_norm(tokens, (dim,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        y = y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        tokens = tokens + y * scale[1].view(-1, 1, 1)
        outputs.append(tokens)
    return outputs, torch.stack(maps, 1)


def eager_norm(model: VisionTransformer, tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], model.norm.weight, model.norm.bias, 1e-6)


def eager_forward(model: VisionTransformer, x: Tensor, masks: Tensor | None = None) -> Tensor:
    return eager_norm(model, eager_layers(model, x, masks)[0][-1])[:, 0]


@pytest.mark.parametrize(("build", "patch", "count", "tokens_224", "tokens_96"), COUNTS)
def test_parameter_and_token_counts(build, patch, count, tokens_224, tokens_96) -> None:
    with torch.device("meta"):
        model = build(patch)
        assert sum(p.numel() for p in model.parameters()) == count
        assert len(list(model.parameters())) == 150
        assert model.prepare_tokens([torch.empty(2, 3, 224, 224)])[1] == ((2, tokens_224),)
        assert model.prepare_tokens([torch.empty(3, 3, 96, 96)])[1] == ((3, tokens_96),)


@pytest.mark.parametrize(
    ("build", "dim", "heads"), [(vit_tiny, 192, 3), (vit_small, 384, 6), (vit_base, 768, 12)]
)
def test_architecture(build, dim, heads) -> None:
    with torch.device("meta"):
        model = build()
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == (dim, 12, heads, 16)
    assert all(block.attn.num_heads == heads for block in model.blocks)


def test_number_of_heads_changes_the_function_but_not_the_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in vit_small(num_heads=16).parameters()) == 21_665_664
    one, other = tiny(), tiny(num_heads=6)
    other.load_state_dict(one.state_dict())
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(other(x), eager_forward(other, x), rtol=1e-10, atol=1e-10)
    assert (one(x) - other(x)).abs().max() > 1e-3


def test_official_names_and_shapes_in_order() -> None:
    with torch.device("meta"):
        model = vit_small()
    d, expected = 384, {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    expected |= {"patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,)}
    for i in range(12):
        for name, shape in {
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "attn.qkv.weight": (3 * d, d),
            "attn.qkv.bias": (3 * d,),
            "attn.proj.weight": (d, d),
            "attn.proj.bias": (d,),
            "norm2.weight": (d,),
            "norm2.bias": (d,),
            "mlp.fc1.weight": (4 * d, d),
            "mlp.fc1.bias": (4 * d,),
            "mlp.fc2.weight": (d, 4 * d),
            "mlp.fc2.bias": (d,),
        }.items():
            expected[f"blocks.{i}.{name}"] = shape
    expected |= {"norm.weight": (d,), "norm.bias": (d,)}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert [name for name, _ in model.named_parameters()] == list(expected)
    assert list(model.state_dict()) == list(expected)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = vit_tiny()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.all(p == (1 if name.endswith("weight") else 0))
        elif name.startswith("patch_embed"):
            assert p.abs().max() <= 1 / math.sqrt(3 * 16 * 16)
            assert p.std() > 0.4 / math.sqrt(3 * 16 * 16)
        elif name.endswith("bias"):
            assert not p.any()
        else:
            assert abs(p.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * p.numel())
            assert abs(p.mean().item()) < 4 * 0.02 / math.sqrt(p.numel())


def test_same_seed_gives_the_official_weights() -> None:
    torch.manual_seed(3)
    model = vit_tiny()
    # Drawn by the official code after the same torch.manual_seed.
    official = {
        "cls_token": [-0.0273583550, -0.0105741899, -0.0216747001],
        "pos_embed": [0.0326891653, -0.0178627577, 0.0368173681],
        "blocks.0.attn.qkv.weight": [0.0083358958, 0.0276495498, 0.0041919011],
        "blocks.11.mlp.fc2.weight": [-0.0064268140, -0.0156725626, -0.0097330250],
    }
    for name, values in official.items():
        torch.testing.assert_close(
            model.state_dict()[name].flatten()[-3:], torch.tensor(values), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize(
    "size", [(32, 32), (12, 12), (20, 44), (64, 48), (33, 32), (35, 35), (16, 64), (4, 4), (41, 7)]
)
def test_forward_equals_eager(size) -> None:
    model, x = tiny(), images(3, 3, *size)
    torch.testing.assert_close(model(x), eager_forward(model, x), rtol=1e-10, atol=1e-10)


def test_channels_and_depth_one() -> None:
    model, x = tiny(in_chans=5, depth=1, drop_path_rate=0.3), images(2, 5, 32, 32)
    torch.testing.assert_close(model(x), eager_forward(model, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.train()(x), eager_forward(model, x), rtol=1e-10, atol=1e-10)


def test_packed_forward_equals_separate_ones_in_order() -> None:
    model = tiny()
    crops = [
        images(2, 3, 32, 32),
        images(1, 3, 12, 12),
        images(3, 3, 12, 12),
        images(2, 3, 8, 20),
        images(1, 3, 20, 8),
    ]
    separate = torch.cat([model(x) for x in crops])
    torch.testing.assert_close(model(crops), separate, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(tuple(crops[:1])), model(crops[0]), rtol=0, atol=0)
    # Neighbours with equal numbers of tokens share a group even if their shapes differ.
    assert model.prepare_tokens(crops)[1] == ((2, 65), (4, 10), (3, 11))


def test_gradients_equal_eager() -> None:
    model = tiny()
    crops = [images(2, 3, 32, 32), images(3, 3, 12, 20)]
    weight = images(5, 24)
    names = [name for name, _ in model.named_parameters()]
    got = torch.autograd.grad((model(crops) * weight).sum(), list(model.parameters()))
    eager = torch.cat([eager_forward(model, x) for x in crops])
    want = torch.autograd.grad((eager * weight).sum(), list(model.parameters()))
    for name, a, b in zip(names, got, want, strict=True):
        assert b.abs().max() > 1e-4, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_input_gradient() -> None:
    model, x = tiny(), images(2, 3, 12, 20).requires_grad_()
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    (want,) = torch.autograd.grad(eager_forward(model, x).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_intermediate_layers() -> None:
    model, x = tiny(), images(2, 3, 12, 20)
    got = model.get_intermediate_layers(x, 2)
    want = [eager_norm(model, tokens) for tokens in eager_layers(model, x)[0][-2:]]
    assert len(got) == 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.get_intermediate_layers(x)[0][:, 0], model(x), rtol=1e-10, atol=1e-10)
    for n in (0, 4):
        with pytest.raises(ValueError, match="n must be between 1 and the number of blocks"):
            model.get_intermediate_layers(x, n)


def test_last_selfattention() -> None:
    model, x = tiny(), images(2, 3, 12, 20)
    got = model.get_last_selfattention(x)
    assert got.shape == (2, 3, 16, 16)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, 16, dtype=torch.float64))
    torch.testing.assert_close(got, eager_layers(model, x)[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (480, 480), (112, 448), (64, 224), (225, 224)])
def test_positions_are_the_official_interpolation(height, width) -> None:
    model = VisionTransformer(embed_dim=8, num_heads=1, depth=1).double()
    got = model.interpolate_pos_encoding(height, width)
    h, w = height // 16, width // 16
    grid = model.pos_embed[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    want = F.interpolate(
        grid, scale_factor=((h + 0.1) / 14, (w + 0.1) / 14), mode="bicubic", align_corners=False
    )
    assert torch.equal(got[:, :1], model.pos_embed[:, :1])
    torch.testing.assert_close(got[:, 1:], want.flatten(2).transpose(1, 2), rtol=0, atol=0)
    torch.testing.assert_close(got[0], eager_positions(model, height, width), rtol=1e-9, atol=1e-12)
    plain = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert (got[:, 1:] - plain).norm() > 0.02 * plain.norm()


def test_positions_of_the_native_size_are_the_parameter_itself() -> None:
    model = VisionTransformer(embed_dim=8, num_heads=1, depth=1)
    assert model.interpolate_pos_encoding(224, 224) is model.pos_embed
    assert model.interpolate_pos_encoding(230, 230) is model.pos_embed
    assert not torch.equal(model.interpolate_pos_encoding(225, 224), model.pos_embed)


def test_positions_follow_a_changed_parameter() -> None:
    model, x = tiny(), images(1, 3, 12, 12)
    with torch.no_grad():
        before = model(x)
        model.pos_embed.data.neg_()
        after = model(x)
    torch.testing.assert_close(after, eager_forward(model, x), rtol=1e-10, atol=1e-10)
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_stochastic_depth_equals_eager_with_the_same_masks(rate) -> None:
    model = tiny(drop_path_rate=rate).train()
    crops, counts = [images(8, 3, 32, 32), images(12, 3, 12, 12)], [8, 12]
    torch.manual_seed(5)
    got = model(crops)
    torch.manual_seed(5)
    draws = torch.rand(3, 20, 2)
    masks = torch.empty(3, 2, 20, dtype=torch.float64)
    for i, p in enumerate((0.0, rate / 2, rate)):
        if p <= 0.1:
            masks[i] = (draws[i] >= p).T.double() / (1 - p)
            continue
        for part, target in zip(draws[i].split(counts), masks[i].split(counts, dim=1), strict=True):
            number = len(part)
            kept = round(number * (1 - p))
            smallest = part.argsort(dim=0).argsort(dim=0) < kept
            target.copy_(smallest.T.double() * (number / kept))
    assert (masks == 0).sum() > 2
    want = torch.cat(
        [eager_forward(model, crops[0], masks[..., :8]), eager_forward(model, crops[1], masks[..., 8:])]
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    weight, names = images(20, 24), [name for name, _ in model.named_parameters()]
    both = (torch.autograd.grad((x * weight).sum(), list(model.parameters())) for x in (got, want))
    for name, x, y in zip(names, *both, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert not torch.equal(model(crops), got)
    torch.manual_seed(5)
    assert torch.equal(model(crops), got)
    assert torch.equal(model.eval()(crops), model(crops))


def test_bf16_autocast_is_close() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3)
    crops = [torch.randn(3, 3, 64, 64), torch.randn(5, 3, 24, 24)]
    weight = torch.randn(8, 96)

    def run(dtype: torch.dtype, autocast: bool) -> tuple[Tensor, list[Tensor]]:
        model.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model([x.to(dtype) for x in crops])
        grads = torch.autograd.grad((out * weight).sum(), list(model.parameters()))
        return out.double(), [g.double() for g in grads]

    want, want_grads = run(torch.float64, False)
    single, single_grads = run(torch.float32, False)
    half, half_grads = run(torch.float32, True)
    assert (single - want).norm() < 1e-5 * want.norm()
    assert (half - want).norm() < 0.02 * want.norm()
    for (name, _), a, b, c in zip(
        model.named_parameters(), single_grads, half_grads, want_grads, strict=True
    ):
        assert (a - c).norm() < 1e-4 * c.norm() + 1e-6, name
        assert (b - c).norm() < 0.05 * c.norm() + 1e-4, name


def test_output_is_fp32_under_autocast_and_follows_the_weights_otherwise() -> None:
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, drop_path_rate=0.5
    )
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_long_sequences_in_bf16() -> None:
    """Above the limit of the plain product another kernel takes over; both must agree with float64."""
    model = tiny(img_size=128, patch_size=4)
    x = images(1, 3, 132, 132)
    want = eager_forward(model, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = model.float()(x.float())
    assert (got.double() - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (12, 20), (14, 33)])
def test_channels_last_images(size, low) -> None:
    """Numbers and gradients are those of the other layout; the layout decides which of two copies is made."""
    model, x = tiny(), images(3, 3, *size)
    if low:
        attach_low_precision(model.float(), torch.bfloat16)
        x = x.float()
    embed = model.patch_embed
    last = x.to(memory_format=torch.channels_last)
    assert last.stride() != x.stride()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        results = [embed(x), embed(last)]
    exact = 1e-12 if not low else 2e-2
    torch.testing.assert_close(*results, rtol=exact, atol=exact)
    weight = torch.randn_like(results[0])
    grads = [torch.autograd.grad(y, list(embed.parameters()), weight) for y in results]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=exact, atol=exact)
    if not low:
        want = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=4).flatten(2).transpose(1, 2)
        torch.testing.assert_close(results[1], want, rtol=1e-10, atol=1e-10)


def test_images_are_copied_once() -> None:
    """One copy from images to rows of patches, which also casts; the large tensors are no others."""
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=8, depth=1, num_heads=1)
    attach_low_precision(model, torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 32, 32).to(memory_format=layout)
        for images_ in (x, x.bfloat16()):
            made: list[tuple[int, torch.dtype]] = []

            class Watch(torch.utils._python_dispatch.TorchDispatchMode):
                def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                    out = func(*args, **(kwargs or {}))
                    if isinstance(out, Tensor) and out.numel() == images_.numel() and not func.is_view:  # noqa: B023
                        made.append((out.data_ptr(), out.dtype))  # noqa: B023
                    return out

            with Watch(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                model.patch_embed(images_)
            own = [pair for pair in set(made) if pair[0] != images_.data_ptr()]
            assert [dtype for _, dtype in own] == [torch.bfloat16]


def test_traces_without_graph_breaks() -> None:
    model = tiny(drop_path_rate=0.2).train()
    crops = [images(2, 3, 32, 32), images(3, 3, 12, 12)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    got = compiled(crops)
    assert got.shape == (5, 24) and got.isfinite().all()
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    torch.testing.assert_close(compiled(crops), model(crops), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": 33}, "patch_size 33 is larger than the image"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in"),
    ],
)
def test_bad_settings(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


def test_bad_images() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got shape \(2, 1, 32, 32\)"):
        model(images(2, 1, 32, 32))
    with pytest.raises(ValueError, match="at least one patch of 4 pixels, got 32 x 3 pixels"):
        model(images(2, 3, 32, 3))
    with pytest.raises(ValueError, match="empty sequence"):
        model([])
