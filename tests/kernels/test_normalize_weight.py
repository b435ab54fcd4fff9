"""Fused weight normalisation against torch's."""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels import normalize_weight
from fastdino_kernels.normalize_weight import _backward, _forward
from torch import Tensor

SHAPES = [(1, 1), (5, 3), (700, 256), (33, 47), (2, 1000)]


def problem(k: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(k * d)
    return torch.randn(k, d, generator=g), torch.rand(k, 1, generator=g) + 0.5, torch.randn(k, d, generator=g)


def with_grads(function, v: Tensor, g: Tensor, upstream: Tensor) -> list[Tensor]:
    v, g = v.detach().requires_grad_(), g.detach().requires_grad_()
    w = function(v, g)
    w.backward(upstream.to(w.dtype))
    assert v.grad is not None and g.grad is not None
    return [w.detach(), v.grad, g.grad]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(library: object, poisoned: None, shape: tuple[int, int]) -> None:
    inputs = problem(*shape)
    truth = with_grads(lambda v, g: torch._weight_norm(v, g, 0), *(x.double() for x in inputs))
    for value, expected in zip(with_grads(normalize_weight, *inputs), truth, strict=True):
        assert (value - expected).abs().max() <= 2e-6 * inputs[2].norm(dim=1).max() / shape[1] ** 0.5


def test_bf16_under_autocast(library: object) -> None:
    inputs = problem(40, 64)
    plain = with_grads(normalize_weight, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = with_grads(normalize_weight, *inputs)
    assert cast[0].dtype == torch.bfloat16 and torch.equal(cast[0], plain[0].bfloat16())
    rounded = with_grads(normalize_weight, *inputs[:2], inputs[2].bfloat16().float())
    assert torch.equal(cast[1], rounded[1]) and torch.equal(cast[2], rounded[2])


def test_strided_inputs_expanded_gradients_and_frozen_gain(library: object) -> None:
    v, g, _ = problem(6, 4)
    expected = with_grads(lambda v, g: torch._weight_norm(v, g, 0), v, g, torch.ones(6, 4))
    leaf = v.T.contiguous().T.requires_grad_()
    normalize_weight(leaf, g).sum().backward()  # the gradient of sum() is an expanded scalar
    torch.testing.assert_close(leaf.grad, expected[1], rtol=1e-5, atol=1e-6)
    gain = g.clone().requires_grad_()
    normalize_weight(v, gain).sum().backward()
    torch.testing.assert_close(gain.grad, expected[2], rtol=1e-5, atol=1e-6)
    assert not normalize_weight(v, g).requires_grad


def test_bitwise_the_same_for_any_number_of_threads(library: object, threads: None) -> None:
    inputs = problem(700, 256)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(with_grads(normalize_weight, *inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_operators_are_well_formed(library: object) -> None:
    v, g, upstream = problem(6, 4)
    torch.library.opcheck(_forward, (v.clone().requires_grad_(), g.clone().requires_grad_(), torch.float32))
    torch.library.opcheck(_forward, (v, g, torch.bfloat16))
    torch.library.opcheck(_backward, (upstream, v, g))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"weight_g: expected shape \[6, 1\], got \[6\]"):
        normalize_weight(torch.ones(6, 4), torch.ones(6))
    with pytest.raises(TypeError, match="weight_v: expected a tensor"):
        normalize_weight(None, torch.ones(6, 1))
