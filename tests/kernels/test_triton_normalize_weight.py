"""The Triton form of weight normalisation against torch's in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from fastdino_kernels import normalize_weight, reference
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of the interpreter
gpu = importlib.import_module("fastdino_kernels.gpu.normalize_weight")

SHAPES = [(1, 1), (5, 3), (70, 256), (33, 47), (2, 1000), (3, 5000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(k: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(k * d)
    v, upstream = torch.randn(k, d, generator=g), torch.randn(k, d, generator=g)
    return [x.to(device, dtype) for x in (v, torch.rand(k, 1, generator=g) + 0.5, upstream)]


def with_grads(function, v: Tensor, g: Tensor, upstream: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    v, g = v.detach().requires_grad_(), g.detach().requires_grad_()
    w = function(v, g)
    w.backward(upstream.to(w.dtype))
    assert v.grad is not None and g.grad is not None
    return [w.detach(), v.grad, g.grad]


def plain(v: Tensor, g: Tensor) -> Tensor:
    return torch._weight_norm(v, g, 0)


def check(values: list[Tensor], inputs: list[Tensor]) -> None:
    """As near to float64 as eager code in the same dtype."""
    truth = with_grads(plain, *(x.double() for x in inputs))
    eager = with_grads(reference.normalize_weight, *inputs)
    for value, base, exact in zip(values, eager, truth, strict=True):
        bound = (
            2 * (base.double() - exact).abs().max()
            + torch.finfo(value.dtype).eps * inputs[2].norm(dim=1).max()
        )
        assert (value.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    triton_device: torch.device, poisoned: None, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = problem(*shape, triton_device, dtype)
    values = with_grads(normalize_weight, *inputs)
    assert all(x.dtype == dtype for x in values)
    check(values, inputs)


def test_rows_too_long_for_the_kernel(triton_device: torch.device) -> None:
    inputs = problem(2, gpu.MAX_COLUMNS + 1, triton_device)
    check(with_grads(normalize_weight, *inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_gives_its_dtype(triton_device: torch.device, dtype: torch.dtype) -> None:
    if triton_device.type == "cpu" and dtype == torch.float16:
        pytest.skip("on a CPU only bf16 is taken from autocast")
    inputs = problem(40, 64, triton_device)
    expected = with_grads(normalize_weight, *inputs)
    with torch.autocast(triton_device.type, dtype=dtype):
        cast = with_grads(normalize_weight, *inputs)
    torch.testing.assert_close(cast[0], expected[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    rounded = with_grads(normalize_weight, *inputs[:2], inputs[2].to(dtype).float())
    assert torch.equal(cast[1], rounded[1]) and torch.equal(cast[2], rounded[2])
    assert cast[1].dtype == cast[2].dtype == torch.float32


def test_mixed_dtypes(triton_device: torch.device) -> None:
    v, g, upstream = problem(9, 20, triton_device)
    values = with_grads(normalize_weight, v.half(), g, upstream)
    assert [x.dtype for x in values] == [torch.float16, torch.float16, torch.float32]
    truth = with_grads(plain, v.half().double(), g.double(), upstream.half().double())
    for value, exact in zip(values, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-3, atol=2e-3)


def test_strided_inputs_expanded_gradients_and_frozen_inputs(triton_device: torch.device) -> None:
    v, g, _ = problem(6, 4, triton_device)
    expected = with_grads(plain, v, g, torch.ones_like(v))
    leaf = v.T.contiguous().T.requires_grad_()
    normalize_weight(leaf, torch.cat([g, g], 1)[:, :1]).sum().backward()  # sum() gives an expanded scalar
    torch.testing.assert_close(leaf.grad, expected[1], rtol=1e-5, atol=1e-6)
    gain = g.clone().requires_grad_()
    normalize_weight(v, gain).sum().backward()
    torch.testing.assert_close(gain.grad, expected[2], rtol=1e-5, atol=1e-6)
    assert not normalize_weight(v, g).requires_grad


def test_backward_twice_and_bitwise_the_same_again(triton_device: torch.device) -> None:
    inputs = problem(70, 100, triton_device)
    first, second = with_grads(normalize_weight, *inputs), with_grads(normalize_weight, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    v, g = inputs[0].requires_grad_(), inputs[1].requires_grad_()
    w = normalize_weight(v, g)
    w.backward(inputs[2], retain_graph=True)
    w.backward(2 * inputs[2])
    torch.testing.assert_close(v.grad, 3 * first[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g.grad, 3 * first[2], rtol=1e-5, atol=1e-5)


def test_zero_and_nan_rows_stay_in_their_row(triton_device: torch.device) -> None:
    inputs = problem(6, 20, triton_device)
    inputs[0][1], inputs[0][4, 3] = 0.0, float("nan")
    values = with_grads(normalize_weight, *inputs)
    for value in values:
        assert value.isnan().any(1).tolist() == [False, True, False, False, True, False]


def test_64_bit_offsets_change_nothing(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(33, 47, triton_device)
    expected = with_grads(normalize_weight, *inputs)
    asked = []
    monkeypatch.setattr(gpu, "needs_int64", lambda *tensors: asked.append(tensors) or True)
    got = with_grads(normalize_weight, *inputs)
    assert len(asked) == 2 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_operators_are_well_formed(triton_device: torch.device) -> None:
    v, g, upstream = problem(6, 4, triton_device)
    leaves = v.clone().requires_grad_(), g.clone().requires_grad_()
    torch.library.opcheck(gpu._forward, (*leaves, torch.float32))
    torch.library.opcheck(gpu._forward, (v, g, torch.bfloat16))
    for needs_g in (True, False):
        torch.library.opcheck(gpu._backward, (upstream, v, g, needs_g))
    assert gpu._backward(upstream, v, g, False)[1].numel() == 0


def test_compiles_without_graph_breaks(triton_device: torch.device) -> None:
    inputs = problem(9, 20, triton_device)
    compiled = torch.compile(normalize_weight, fullgraph=True, backend="aot_eager")
    got, expected = with_grads(compiled, *inputs), with_grads(normalize_weight, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
