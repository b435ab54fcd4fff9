"""The contrastive loss in blocks of the queue against the whole matrix of similarities, in float64."""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import backend, reference
from fastdino_kernels.dino_loss import temperature
from fastdino_kernels.info_nce import info_nce
from fastdino_kernels.native import call, int64, pointer
from torch import Tensor

implementation = importlib.import_module("fastdino_kernels.info_nce")

SHAPES = [(1, 1, 1), (1, 16, 700), (5, 24, 1), (7, 33, 1300), (40, 128, 2048)]  # R, D, Q
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP32 = 1.2e-7


def moco(query: Tensor, key: Tensor, queue: Tensor, temp: float) -> Tensor:
    """As its definition reads."""
    positive = torch.stack([q @ k for q, k in zip(query, key, strict=True)])
    logits = torch.cat([positive[:, None], query @ queue], 1) / temp
    return -logits.log_softmax(1)[:, 0].mean()


def problem(rows: int, d: int, q: int, dtype: torch.dtype = torch.float32, scale: float = 1.0):
    g = torch.Generator().manual_seed(rows * d + q)
    query = torch.randn(rows, d, generator=g)
    key = query + torch.randn(rows, d, generator=g)
    queue = torch.randn(d, q, generator=g)
    return tuple((scale * F.normalize(x, dim=dim)).to(dtype) for x, dim in ((query, 1), (key, 1), (queue, 0)))


def loss_and_grad(function, query: Tensor, *rest, factor: float = 1.0, **options) -> tuple[Tensor, Tensor]:
    query = query.detach().requires_grad_()
    loss = function(query, *rest, **options)
    loss = loss if isinstance(loss, Tensor) else loss.loss
    (factor * loss).backward()
    assert query.grad is not None
    return loss.detach(), query.grad


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks of the queue, so that there are several."""
    monkeypatch.setattr(implementation, "CHUNK_BYTES", 1)


def within(got, eager, oracle, dtype: torch.dtype) -> None:
    """The loss and the gradient, within twice the eager error and rounding, the loss's and the dtype's."""
    for value, base, truth, eps in zip(got, eager, oracle, (4 * FP32, torch.finfo(dtype).eps), strict=True):
        assert error(value, truth) <= 2 * error(base, truth) + eps * max(1e-3, truth.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_whole_matrix(
    library: None, poisoned: None, blocks: None, shape: tuple, dtype: torch.dtype
) -> None:
    inputs = problem(*shape, dtype)
    for temp in (0.2, 0.07):
        got = loss_and_grad(info_nce, *inputs, temp=temp)
        oracle = loss_and_grad(moco, *(x.double() for x in inputs), temp)
        within(got, loss_and_grad(reference.info_nce, *inputs, temp=temp), oracle, dtype)
        assert got[0].dtype == torch.float32 and got[1].dtype == dtype


def test_the_reference_is_the_definition() -> None:
    inputs = tuple(x.double() for x in problem(6, 5, 30))
    expected = loss_and_grad(moco, *inputs, 0.2)
    for function in (reference.info_nce, info_nce):
        got = loss_and_grad(function, *inputs, temp=0.2)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    query = inputs[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda q: reference.info_nce(q, *inputs[1:], temp=0.2).loss, (query,))


def test_formulas_of_the_gradient(library: None) -> None:
    query, key, queue = problem(6, 16, 700)
    _, grad = loss_and_grad(info_nce, query, key, queue, temp=0.2)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1).double() / 0.2
    p = logits.softmax(1)
    expected = (p[:, 1:] @ queue.T.double() - (1 - p[:, :1]) * key) / (6 * 0.2)
    assert error(grad, expected) <= 1e-6 * expected.abs().max().item()


def test_accuracy_counts_keys_that_are_strictly_closest(library: None, blocks: None) -> None:
    query = torch.eye(4)
    key = torch.diag(torch.tensor([1.0, 0.5, 0.25, 0.5]))
    queue = torch.zeros(4, 1200)
    queue[1, 7], queue[2, 900], queue[3, 1100] = 0.25, 0.5, 0.5  # below, above, equal to the key
    for kind in ("auto", "reference"):
        with backend(kind):
            assert info_nce(query, key, queue, temp=0.2).accuracy == 0.5
            alike = torch.ones(5, 3)  # collapsed features are no success
            assert info_nce(alike, alike, torch.ones(3, 600), temp=0.2).accuracy == 0


@pytest.mark.parametrize("scale,temp", [(100.0, 0.07), (100.0, 0.01), (10.0, 0.01), (1e-3, 1.0)])
def test_extreme_similarities(library: None, blocks: None, scale: float, temp: float) -> None:
    inputs = problem(9, 24, 1300, scale=scale)
    got = loss_and_grad(info_nce, *inputs, temp=temp)
    oracle = loss_and_grad(moco, *(x.double() for x in inputs), temp)
    eager = loss_and_grad(reference.info_nce, *inputs, temp=temp)
    for value, base, truth in zip(got, eager, oracle, strict=True):
        assert value.isfinite().all()
        assert error(value, truth) <= 2 * error(base, truth) + 4 * FP32 * truth.abs().max().item()


def test_a_growing_maximum_moves_what_was_added(library: None, blocks: None) -> None:
    query, key, queue = problem(3, 8, 4000)
    queue = queue * torch.logspace(-2, 2, 4000)  # the largest similarities come last
    for order in (queue, queue.flip(1)):
        got = loss_and_grad(info_nce, query, key, order, temp=0.1)
        oracle = loss_and_grad(moco, *(x.double() for x in (query, key, order)), 0.1)
        within(got, loss_and_grad(reference.info_nce, query, key, order, temp=0.1), oracle, torch.float32)


def test_nan_and_infinity_reach_the_loss(library: None, blocks: None) -> None:
    for which, at in ((0, (2, 3)), (1, (2, 3)), (2, (3, 1100))):
        inputs = problem(5, 8, 1300)
        inputs[which][at] = float("nan")
        assert info_nce(*inputs, temp=0.1).loss.isnan()
    for which, at in ((0, (2, 3)), (2, (3, 1100))):
        inputs = problem(5, 8, 1300)
        inputs[which][at] = float("inf")
        assert not info_nce(*inputs, temp=0.1).loss.isfinite()


def test_backward_scales_repeats_and_takes_expanded_gradients(library: None) -> None:
    inputs = problem(5, 16, 700)
    _, base = loss_and_grad(info_nce, *inputs, temp=0.1)
    _, tripled = loss_and_grad(info_nce, *inputs, temp=0.1, factor=3.0)
    torch.testing.assert_close(tripled, 3 * base, rtol=1e-6, atol=1e-12)
    leaf = inputs[0].clone().requires_grad_()
    loss = info_nce(leaf, *inputs[1:], temp=0.1).loss
    loss.expand(5).sum().backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 5 * base, rtol=1e-6, atol=1e-12)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 6 * base, rtol=1e-6, atol=1e-12)


def test_strided_inputs_and_mixed_dtypes(library: None, blocks: None) -> None:
    query, key, queue = problem(5, 16, 1300)
    expected = loss_and_grad(info_nce, query, key, queue, temp=0.1)
    wide = torch.stack([query, query], -1)[..., 0]
    got = loss_and_grad(info_nce, wide, key.T.contiguous().T, queue.T.contiguous().T, temp=0.1)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    one = key[:1].expand(5, 16)
    assert torch.equal(
        info_nce(query, one, queue, temp=0.1).loss, info_nce(query, one.contiguous(), queue, temp=0.1).loss
    )
    half = info_nce(query, key.bfloat16(), queue.half(), temp=0.1).loss
    assert torch.equal(half, info_nce(query, key.bfloat16().float(), queue.half().float(), temp=0.1).loss)


def test_autocast_computes_in_bf16(library: None, blocks: None) -> None:
    inputs = problem(9, 64, 1300)
    truth = loss_and_grad(moco, *(x.double() for x in inputs), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_and_grad(info_nce, *inputs, temp=0.1)
        eager = loss_and_grad(reference.info_nce, *inputs, temp=0.1)
    for value, base, exact in zip(got, eager, truth, strict=True):
        assert value.dtype == torch.float32
        assert 0 < error(value, exact) <= 2 * error(base, exact) + 2**-8 * exact.abs().max().item()


def test_only_the_loss_carries_a_gradient(library: None) -> None:
    query, key, queue = problem(5, 16, 700)
    for kind in ("auto", "reference"):
        with backend(kind):
            out = info_nce(query.requires_grad_(), key, queue, temp=0.1)
            assert [x.requires_grad for x in out] == [True, False]
            with torch.no_grad():
                frozen = info_nce(query, key, queue, temp=0.1)
            assert not frozen.loss.requires_grad and torch.equal(frozen.loss, out.loss)
            assert torch.equal(info_nce(query.detach(), key, queue, temp=0.1).loss, out.loss)


def test_bitwise_the_same_again(library: None, blocks: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = problem(9, 32, 1300, dtype)
        first, second = (loss_and_grad(info_nce, *inputs, temp=0.1) for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_threads_change_only_the_rounding_of_the_gemms(library: None, threads: None, blocks: None) -> None:
    inputs = problem(9, 32, 1300)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(loss_and_grad(info_nce, *inputs, temp=0.1))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert error(a, b.double()) <= 1e-5 * b.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_are_the_same_for_any_number_of_threads(
    library: None, threads: None, dtype: torch.dtype
) -> None:
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        block = torch.randn(70, 5001, generator=torch.Generator().manual_seed(0)).to(dtype)
        largest, total, mean = torch.zeros(70), torch.ones(70, dtype=torch.float64), torch.ones(70, 16)
        options = (ctypes.c_int(dtype == torch.bfloat16), ctypes.c_double(0.1), ctypes.c_int(1))
        arguments = (pointer(block), *int64(70, 5001), *options, *map(pointer, (largest, total, mean)))
        call("fdk_info_nce_fold", *arguments, *int64(16))
        results.append((block, largest, total, mean))
    assert (results[0][1] > 0).all() and (results[0][3] < 1).all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_similarities_with_the_queue_are_not_stored(
    library: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    query, key, queue = problem(64, 16, 16384, dtype)
    monkeypatch.setattr(implementation, "CHUNK_BYTES", 64 * 1024 * dtype.itemsize)
    whole = 64 * 16384 * dtype.itemsize
    largest = {}
    for kind in ("cpu", "reference"):
        with backend(kind), torch.profiler.profile(profile_memory=True) as profile:
            loss_and_grad(info_nce, query, key, queue, temp=0.1)
        largest[kind] = max(event.cpu_memory_usage for event in profile.events())
    assert largest["cpu"] <= whole / 8 < whole <= largest["reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_is_well_formed(library: None, dtype: torch.dtype) -> None:
    query, key, queue = problem(5, 8, 40, dtype)
    for needs_grad in (True, False):
        arguments = (query.requires_grad_(needs_grad), key, queue, temperature(0.1), dtype, needs_grad)
        torch.library.opcheck(implementation._forward, arguments)


def test_compiles_without_graph_breaks(library: None) -> None:
    query, key, queue = problem(5, 8, 700)

    def step(query: Tensor, temp: Tensor) -> Tensor:
        return 2 * info_nce(query, key, queue, temp=temp).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for temp in (torch.tensor(0.1), torch.tensor(0.2)):
        got, expected = loss_and_grad(compiled, query, temp), loss_and_grad(step, query, temp)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


BAD = [
    (dict(query=None), TypeError, "query: expected a tensor, got NoneType"),
    (dict(query=torch.zeros(8)), ValueError, r"query: expected shape \[R, D\], got \[8\]"),
    (dict(key=torch.zeros(7, 4)), ValueError, r"key: expected shape \[8, 4\], got \[7, 4\]"),
    (dict(queue=torch.zeros(6, 4)), ValueError, r"queue: expected shape \[4, Q\], got \[6, 4\]"),
    (dict(queue=torch.zeros(4, 6, dtype=torch.int32)), TypeError, "queue: expected a floating-point"),
    (dict(queue=torch.zeros(4, 6, device="meta")), ValueError, "queue: expected device cpu, got meta"),
    (dict(queue=torch.zeros(4, 0)), ValueError, r"queue: expected no empty dimension, got \[4, 0\]"),
    (dict(query=torch.zeros(0, 4), key=torch.zeros(0, 4)), ValueError, "query: expected no empty dimension"),
    (dict(key=torch.zeros(8, 4, requires_grad=True)), ValueError, "key: .* must not require grad"),
    (dict(queue=torch.zeros(4, 6, requires_grad=True)), ValueError, "queue: .* must not require grad"),
    (dict(temp=0.0), ValueError, "temp: expected a temperature > 0, got 0.0"),
    (dict(temp="hot"), TypeError, "temp: expected a number"),
]


@pytest.mark.parametrize("change,kind,message", BAD, ids=[message for _, _, message in BAD])
def test_errors_name_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    arguments = dict(query=torch.zeros(8, 4), key=torch.zeros(8, 4), queue=torch.zeros(4, 6), temp=0.1)
    with pytest.raises(kind, match=message):
        info_nce(**{**arguments, **change})
