"""The Triton form of Sinkhorn-Knopp, interpreted where there is no GPU, against the float64 oracle."""

from __future__ import annotations

import importlib

import pytest
import torch
from fastdino_kernels import reference
from fastdino_kernels.sinkhorn import sinkhorn_center, sinkhorn_knopp, softmax_over_batch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
gpu = importlib.import_module("fastdino_kernels.gpu.sinkhorn")
_start = gpu._start

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's, of masked lanes

SHAPES = [(1, 1), (3, 5), (1, 700), (70, 33), (9, 530)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = 8 * 1.2e-7  # as in test_sinkhorn.py


def problem(
    rows: int, k: int, device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    g = torch.Generator().manual_seed(rows * k)
    return (scale * torch.randn(rows, k, generator=g)).to(device, dtype)


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


def check(x: Tensor, temp: float, n_iters: int) -> None:
    got = sinkhorn_knopp(x, temp=temp, n_iters=n_iters)
    oracle = reference.sinkhorn_knopp(x.double(), temp=temp, n_iters=n_iters)
    eager = reference.sinkhorn_knopp(x, temp=temp, n_iters=n_iters)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert error(got, oracle) <= 2 * error(eager, oracle) + FLOOR * oracle.max().item()
    assert error(got.sum(1), torch.ones(len(x), device=x.device).double()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(
    triton_device: torch.device, poisoned: None, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = problem(*shape, triton_device, dtype)
    check(x, 0.0625, 2)


@pytest.mark.parametrize("scale,temp", [(1e4, 0.1), (1e4, 0.01), (30.0, 0.01), (1e-3, 1.0)])
def test_extreme_logits_and_temperatures(triton_device: torch.device, scale: float, temp: float) -> None:
    x = problem(10, 300, triton_device, scale=scale)
    for n_iters in (1, 3):
        check(x, temp, n_iters)


def test_wide_tiles_and_many_parts(
    triton_device: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = problem(18, 1300, triton_device)
    expected = sinkhorn_knopp(x, temp=0.05)
    assert gpu._parts(18, 1300) == 2 * gpu._parts(18, 1000) == 4 and gpu._parts(9000, 1 << 20) == 1
    assert gpu._parts(128, 65536) == gpu.MAX_PARTS and gpu._columns_tile(65536) == gpu.COLUMNS_TILE
    monkeypatch.setattr(gpu, "NARROW_TILE", gpu.COLUMNS_TILE)
    monkeypatch.setattr(gpu, "ROWS_TILE", (8, 64))
    assert gpu._parts(18, 1300) == 16  # more than there are blocks for: 21 blocks, two for each
    got = sinkhorn_knopp(x, temp=0.05)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-9)
    check(x, 0.05, 3)


def test_prototypes_and_logits_that_are_infinite_or_nan(triton_device: torch.device) -> None:
    x = problem(12, 300, triton_device)
    x[:, 40] = -float("inf")
    x[3, 200:] = -float("inf")
    kept = torch.arange(300, device=x.device) != 40
    for n_iters in (1, 3):
        got = sinkhorn_knopp(x, temp=0.05, n_iters=n_iters)
        expected = reference.sinkhorn_knopp(x[:, kept].double(), temp=0.05, n_iters=n_iters)
        assert (got[:, 40] == 0).all() and (got[3, 200:] == 0).all()
        assert error(got[:, kept], expected) <= 2e-6
    assert sinkhorn_center(x, temp=0.05)[40] == 0
    x[5] = -float("inf")
    assert sinkhorn_knopp(x, temp=0.05, n_iters=1)[5].isnan().all()
    x = problem(12, 300, triton_device)
    x[2, 250] = float("nan")
    assert sinkhorn_knopp(x, temp=0.05).isnan().all()


def test_strided_and_expanded_logits(triton_device: torch.device) -> None:
    x = problem(6, 100, triton_device)
    expected = sinkhorn_knopp(x, temp=0.05)
    assert torch.equal(sinkhorn_knopp(torch.stack([x, x], -1)[..., 0], temp=0.05), expected)
    assert torch.equal(sinkhorn_knopp(x.T.contiguous().T, temp=0.05), expected)
    got = sinkhorn_knopp(x[:1].expand(6, 100), temp=0.05)
    torch.testing.assert_close(got, torch.full_like(got, 1 / 100), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_the_result(triton_device: torch.device, dtype: torch.dtype) -> None:
    x = problem(6, 100, triton_device)
    got = sinkhorn_knopp(x, temp=0.05, dtype=dtype)
    expected = sinkhorn_knopp(x, temp=0.05).to(dtype)
    assert got.dtype == dtype
    # The interpreter truncates to bf16, a GPU rounds.
    rounding = dict(rtol=0.0078125, atol=1e-30) if dtype == torch.bfloat16 else dict(rtol=0, atol=0)
    torch.testing.assert_close(got, expected, **rounding)


def test_center_and_softmax_over_the_batch(triton_device: torch.device) -> None:
    x = problem(8, 300, triton_device)
    for n_iters in (1, 3):
        center = sinkhorn_center(x, temp=0.0625, n_iters=n_iters)
        q = reference.sinkhorn_knopp(x.double(), temp=0.0625, n_iters=n_iters)
        assert center.dtype == torch.float32 and error(((x.double() - center) / 0.0625).softmax(1), q) <= 4e-6
    p = (x.double() / 0.0625).softmax(0)
    assert error(softmax_over_batch(x, temp=0.0625), p / p.sum(1, keepdim=True)) <= 2e-6


def test_no_gradient_and_temperature_as_a_tensor(triton_device: torch.device) -> None:
    x = problem(6, 100, triton_device)
    expected = sinkhorn_knopp(x, temp=0.0625)
    got = sinkhorn_knopp(x.requires_grad_(), temp=torch.tensor(0.0625, device=x.device))
    assert torch.equal(got, expected) and not got.requires_grad


def test_bitwise_the_same_again(triton_device: torch.device) -> None:
    x = problem(20, 530, triton_device)
    assert torch.equal(sinkhorn_knopp(x, temp=0.05), sinkhorn_knopp(x, temp=0.05))


@triton.jit
def _starts_kernel(out_ptr, WIDTH: tl.constexpr):
    row = tl.arange(0, 4)
    tl.store(out_ptr + row, _start(row, WIDTH, True))


def test_64_bit_addresses(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.zeros(4, dtype=torch.int64, device=triton_device)
    _starts_kernel[(1,)](out, WIDTH=2**30 + 7)
    assert out.tolist() == [i * (2**30 + 7) for i in range(4)]
    x = problem(10, 300, triton_device)
    expected = sinkhorn_knopp(x, temp=0.05)
    seen = []
    monkeypatch.setattr(gpu, "needs_int64", lambda *tensors: seen.append([t.shape for t in tensors]) or True)
    assert torch.equal(sinkhorn_knopp(x, temp=0.05), expected)
    assert len(seen) == 7 and all(x.shape in shapes for shapes in seen)  # every launch asked about the logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_well_formed(triton_device: torch.device, dtype: torch.dtype) -> None:
    x = problem(4, 40, triton_device, dtype)
    temp = torch.tensor(0.05, device=x.device)
    c = gpu._columns(x, temp)
    torch.library.opcheck(gpu._columns, (x, temp))
    torch.library.opcheck(gpu._step, (x, temp, c))
    torch.library.opcheck(gpu._targets, (x, temp, c, torch.bfloat16))


def test_compiles_without_graph_breaks(triton_device: torch.device) -> None:
    x = problem(4, 60, triton_device)

    def step(x: Tensor, temp: Tensor) -> Tensor:
        return 2 * sinkhorn_knopp(x, temp=temp)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for temp in (torch.tensor(0.04, device=x.device), torch.tensor(0.07, device=x.device)):
        assert torch.equal(compiled(x, temp), step(x, temp))
