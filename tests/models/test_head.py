"""The projection head: official names, exact counts, and its formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastdino.models import DINOHead


def count(head: DINOHead, trainable: bool = False) -> int:
    return sum(p.numel() for p in head.parameters() if p.requires_grad or not trainable)


@pytest.mark.parametrize(
    ("dim", "total", "trainable"),
    [(192, 21_958_912, 21_893_376), (384, 22_352_128, 22_286_592), (768, 23_138_560, 23_073_024)],
)
def test_counts_of_the_paper_head(dim, total, trainable) -> None:
    with torch.device("meta"):
        head, free = DINOHead(dim, 65536), DINOHead(dim, 65536, norm_last_layer=False)
        batch_norm = DINOHead(dim, 65536, use_bn=True)
    assert (count(head), count(head, trainable=True)) == (total, trainable)
    assert count(free, trainable=True) == total
    assert count(batch_norm) == total + 8192


@pytest.mark.parametrize(
    ("kwargs", "total"),
    [
        ({"out_dim": 1024}, 5_772_544),
        ({"out_dim": 4096}, 6_562_048),
        ({"out_dim": 16384}, 9_720_064),
        ({"out_dim": 262144}, 72_880_384),
        ({"out_dim": 4096, "nlayers": 1}, 1_151_232),
        ({"out_dim": 4096, "nlayers": 2}, 2_365_696),
        ({"out_dim": 4096, "nlayers": 3}, 6_562_048),
        ({"out_dim": 4096, "nlayers": 1, "bottleneck_dim": 0}, 1_576_960),
        ({"out_dim": 4096, "nlayers": 2, "bottleneck_dim": 0}, 9_181_184),
        ({"out_dim": 4096, "nlayers": 3, "bottleneck_dim": 0}, 13_377_536),
        ({"out_dim": 4096, "nlayers": 4, "bottleneck_dim": 0}, 17_573_888),
    ],
)
def test_counts_of_the_variants(kwargs, total) -> None:
    with torch.device("meta"):
        assert count(DINOHead(384, **kwargs)) == total


@pytest.mark.parametrize(
    ("dim", "total"), [(384, 5_509_376), (768, 6_295_808), (1024, 6_820_096), (2048, 8_917_248)]
)
def test_counts_of_the_mlp(dim, total) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in DINOHead(dim, 8).mlp.parameters()) == total


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({}, ["mlp.0", "mlp.2", "mlp.4"]),
        ({"nlayers": 1}, ["mlp"]),
        ({"nlayers": 2}, ["mlp.0", "mlp.2"]),
        ({"nlayers": 4}, ["mlp.0", "mlp.2", "mlp.4", "mlp.6"]),
        ({"use_bn": True}, ["mlp.0", "mlp.1", "mlp.3", "mlp.4", "mlp.6"]),
    ],
)
def test_official_names_in_order(kwargs, names) -> None:
    head = DINOHead(12, 40, hidden_dim=16, bottleneck_dim=8, **kwargs)
    expected = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert [name for name, _ in head.named_parameters()] == [
        *expected,
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
    assert head.last_layer.weight_g.shape == (40, 1) and head.last_layer.weight_v.shape == (40, 8)


def test_names_without_bottleneck() -> None:
    head = DINOHead(12, 40, hidden_dim=16, bottleneck_dim=0)
    assert list(head.state_dict()) == [
        f"{n}.{k}" for n in ("mlp.0", "mlp.2", "last_layer") for k in ("weight", "bias")
    ]


def test_initialisation() -> None:
    torch.manual_seed(0)
    head = DINOHead(384, 2000)
    for name, p in head.named_parameters():
        if name == "last_layer.weight_g":
            assert torch.all(p == 1) and not p.requires_grad
        elif name == "last_layer.weight_v":
            assert p.abs().max() <= 1 / 16
            assert abs(p.std().item() - 1 / 16 / math.sqrt(3)) < 1e-4
        elif name.endswith("bias"):
            assert not p.any()
        else:
            assert abs(p.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * p.numel())
    for name, p in DINOHead(384, 2000, bottleneck_dim=0).named_parameters():
        assert not p.any() if name.endswith("bias") else abs(p.std().item() / 0.02 - 1) < 0.02


@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("nlayers", [1, 2, 3, 4])
def test_forward_equals_formula_with_gradients(act, nlayers) -> None:
    torch.manual_seed(0)
    head = DINOHead(
        12, 40, norm_last_layer=False, nlayers=nlayers, hidden_dim=16, bottleneck_dim=8, act=act
    ).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    x = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    w = dict(head.named_parameters())
    layers = ["mlp"] if nlayers == 1 else [f"mlp.{2 * i}" for i in range(nlayers)]
    y = x
    for i, name in enumerate(layers):
        y = y @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        if i < nlayers - 1:
            y = y.clamp(min=0) if act == "relu" else y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    z = y / y.square().sum(1, keepdim=True).sqrt()
    v = w["last_layer.weight_v"]
    weight = w["last_layer.weight_g"] * v / v.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(head.bottleneck(x), z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.weight(), weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(x), z @ weight.T, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(9, 40, dtype=torch.float64)
    inputs = [x, *head.parameters()]
    got = torch.autograd.grad((head(x) * upstream).sum(), inputs)
    want = torch.autograd.grad((z @ weight.T * upstream).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_without_bottleneck_it_is_a_plain_mlp(use_bn, nlayers) -> None:
    torch.manual_seed(0)
    head = DINOHead(12, 40, use_bn=use_bn, nlayers=nlayers, hidden_dim=16, bottleneck_dim=0).double()
    torch.nn.init.normal_(head.last_layer.bias)
    x = torch.randn(9, 12, dtype=torch.float64)
    y = x
    for module in head.mlp:
        y = module(y)
    assert len([m for m in head.modules() if isinstance(m, torch.nn.Linear)]) == nlayers
    want = F.linear(y, head.last_layer.weight, head.last_layer.bias)
    torch.testing.assert_close(head(x), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.bottleneck(x) @ head.weight().T, want, rtol=1e-12, atol=1e-12)


def test_batch_norm_normalises_hidden_layers() -> None:
    torch.manual_seed(0)
    head = DINOHead(12, 40, use_bn=True, hidden_dim=16, bottleneck_dim=8)
    x = torch.randn(64, 12) * 5 + 3
    hidden = head.mlp[1](head.mlp[0](x))
    torch.testing.assert_close(hidden.mean(0), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden.std(0, unbiased=False), torch.ones(16), rtol=0, atol=1e-2)


def test_frozen_gains_take_no_gradient() -> None:
    head = DINOHead(12, 40, hidden_dim=16, bottleneck_dim=8)
    head(torch.randn(4, 12)).sum().backward()
    assert head.last_layer.weight_g.grad is None and head.last_layer.weight_v.grad is not None


def test_autocast_keeps_features_in_fp32_and_rounds_prototypes_once() -> None:
    head = DINOHead(12, 40, hidden_dim=16, bottleneck_dim=8)
    with torch.autocast("cpu", torch.bfloat16):
        z, weight = head.bottleneck(torch.randn(5, 12)), head.weight()
    assert z.dtype == torch.float32 and weight.dtype == torch.bfloat16
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(weight, head.weight().bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"out_dim": 0}, "out_dim must be at least 1, got 0"),
        ({"nlayers": 0}, "nlayers must be at least 1"),
        ({"bottleneck_dim": -1}, "bottleneck_dim must be positive, or 0 for none"),
        ({"act": "tanh"}, "act must be one of gelu, relu, got 'tanh'"),
    ],
)
def test_bad_settings(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        DINOHead(**{"in_dim": 12, "out_dim": 40, **kwargs})
