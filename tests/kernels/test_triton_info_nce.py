"""The Triton forms of the contrastive loss, interpreted where there is no GPU, against the float64 oracle."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import reference
from fastdino_kernels.info_nce import info_nce
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
gpu = importlib.import_module("fastdino_kernels.gpu.info_nce")
_start = gpu._start

implementation = importlib.import_module("fastdino_kernels.info_nce")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's, of masked lanes

SHAPES = [(1, 1, 1), (1, 16, 200), (5, 24, 700), (66, 20, 70)]  # R, D, Q
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["flash", "chunked"]
FP32 = 1.2e-7


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either form, whatever would be chosen; small blocks of the queue, so that there are several."""
    monkeypatch.setattr(implementation, "CHUNK_BYTES", 1)
    monkeypatch.setattr(gpu, "_uses_flash", lambda query, dtype: request.param == "flash")
    return request.param


def problem(
    rows: int, d: int, q: int, device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows * d + q)
    query = torch.randn(rows, d, generator=g)
    key = query + torch.randn(rows, d, generator=g)
    queue = F.normalize(torch.randn(d, q, generator=g), dim=0)
    query, key, queue = (scale * x for x in (F.normalize(query), F.normalize(key), queue))
    return query.to(device, dtype), key.to(device, dtype), queue.to(device, dtype)


def loss_and_grad(function, query: Tensor, *rest, factor: float = 1.0, **options) -> tuple[Tensor, Tensor]:
    query = query.detach().requires_grad_()
    loss = function(query, *rest, **options)
    loss = loss if isinstance(loss, Tensor) else loss.loss
    (factor * loss).backward()
    assert query.grad is not None
    return loss.detach(), query.grad


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


def check(inputs: tuple[Tensor, Tensor, Tensor], temp: float) -> None:
    dtype = inputs[0].dtype
    got = loss_and_grad(info_nce, *inputs, temp=temp)
    oracle = loss_and_grad(reference.info_nce, *(x.double() for x in inputs), temp=temp)
    eager = loss_and_grad(reference.info_nce, *inputs, temp=temp)
    for value, base, truth, eps in zip(got, eager, oracle, (4 * FP32, torch.finfo(dtype).eps), strict=True):
        assert value.isfinite().all()
        assert error(value, truth) <= 2 * error(base, truth) + eps * max(1e-3, truth.abs().max().item())
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    expected = reference.info_nce(*(x.double() for x in inputs), temp=temp).accuracy
    assert error(info_nce(*inputs, temp=temp).accuracy, expected) <= FP32


@pytest.mark.parametrize(
    "form,dtype",
    [("flash", dtype) for dtype in DTYPES[1:]] + [("chunked", dtype) for dtype in DTYPES],
    indirect=["form"],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(
    triton_device: torch.device, form: str, poisoned: None, shape: tuple, dtype: torch.dtype
) -> None:
    check(problem(*shape, triton_device, dtype), 0.1)


@pytest.mark.parametrize("scale,temp", [(100.0, 0.07), (100.0, 0.01), (10.0, 0.01), (1e-2, 1.0)])
def test_extreme_similarities(triton_device: torch.device, form: str, scale: float, temp: float) -> None:
    dtype = torch.bfloat16 if form == "flash" else torch.float32
    check(problem(9, 24, 530, triton_device, dtype, scale), temp)


def test_a_growing_maximum_moves_what_was_added(triton_device: torch.device, form: str) -> None:
    dtype = torch.bfloat16 if form == "flash" else torch.float32
    query, key, queue = problem(3, 16, 1100, triton_device, dtype)
    queue = (queue * torch.logspace(-2, 1, 1100, device=queue.device)).to(dtype)
    check((query, key, queue), 0.1)
    check((query, key, queue.flip(1)), 0.1)


def test_which_form_answers(triton_device: torch.device) -> None:
    x = torch.zeros(2, 256, device=triton_device)
    assert not gpu._uses_flash(x, torch.float32) and not gpu._uses_flash(torch.zeros(2, 257), torch.bfloat16)
    if not x.is_cuda or torch.cuda.get_device_capability()[0] >= 8:
        assert gpu._uses_flash(x, torch.bfloat16) and gpu._uses_flash(x, torch.float16)


def test_parts_cover_the_queue() -> None:
    for rows, q, programs in (
        (256, 65536, 132),
        (64, 65536, 132),
        (1, 1, 132),
        (4096, 4097, 108),
        (2, 700, 7),
    ):
        parts, per_part = gpu._parts(rows, q, programs)
        blocks = -(-q // gpu.FLASH_COLUMNS)
        assert parts <= gpu.MAX_PARTS and (parts - 1) * per_part < blocks <= parts * per_part
    assert gpu._parts(256, 65536, 132) == (32, 32)


def test_nan_and_infinity_reach_the_loss(triton_device: torch.device, form: str) -> None:
    for which, at in ((0, (2, 3)), (1, (2, 3)), (2, (3, 130))):
        inputs = problem(5, 16, 140, triton_device, torch.bfloat16)
        inputs[which][at] = float("nan")
        assert info_nce(*inputs, temp=0.1).loss.isnan()
    for which, at in ((0, (2, 3)), (2, (3, 130))):
        inputs = problem(5, 16, 140, triton_device, torch.bfloat16)
        inputs[which][at] = float("inf")
        assert not info_nce(*inputs, temp=0.1).loss.isfinite()


def test_backward_scales_repeats_and_takes_expanded_gradients(triton_device: torch.device, form: str) -> None:
    inputs = tuple(x.float() for x in problem(5, 16, 140, triton_device))
    with torch.autocast(triton_device.type, dtype=torch.bfloat16):
        _, base = loss_and_grad(info_nce, *inputs, temp=0.1)
        _, tripled = loss_and_grad(info_nce, *inputs, temp=0.1, factor=3.0)
        leaf = inputs[0].clone().requires_grad_()
        loss = info_nce(leaf, *inputs[1:], temp=0.1).loss
    assert base.dtype == torch.float32
    torch.testing.assert_close(tripled, 3 * base, rtol=1e-6, atol=1e-12)
    loss.expand(5).sum().backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 5 * base, rtol=1e-6, atol=1e-12)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 6 * base, rtol=1e-6, atol=1e-12)


def test_strided_inputs_and_mixed_dtypes(triton_device: torch.device, form: str) -> None:
    query, key, queue = problem(5, 16, 140, triton_device, torch.bfloat16)
    expected = loss_and_grad(info_nce, query, key, queue, temp=0.1)
    wide = torch.stack([query, query], -1)[..., 0]
    got = loss_and_grad(info_nce, wide, key.T.contiguous().T, queue.T.contiguous().T, temp=0.1)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    mixed = loss_and_grad(info_nce, query, key.float(), queue.float(), temp=0.1)
    assert torch.equal(mixed[0], expected[0]) and torch.equal(mixed[1], expected[1])
    one = key[:1].expand(5, 16)
    a, b = (info_nce(query, k, queue, temp=0.1).loss for k in (one, one.contiguous()))
    assert torch.equal(a, b)


def test_only_the_loss_carries_a_gradient(triton_device: torch.device, form: str) -> None:
    query, key, queue = problem(5, 16, 140, triton_device, torch.bfloat16)
    out = info_nce(query.requires_grad_(), key, queue, temp=0.1)
    assert [x.requires_grad for x in out] == [True, False]
    with torch.no_grad():
        frozen = info_nce(query, key, queue, temp=0.1)
    assert not frozen.loss.requires_grad and torch.equal(frozen.loss, out.loss)


def test_bitwise_the_same_again(triton_device: torch.device, form: str) -> None:
    inputs = problem(9, 32, 300, triton_device, torch.bfloat16)
    first, second = (loss_and_grad(info_nce, *inputs, temp=0.1) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_fp16_sums_do_not_overflow(
    triton_device: torch.device, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "CHUNK_BYTES", 8 << 20)
    ones = torch.ones(2, 16, device=triton_device, dtype=torch.float16)
    queue = torch.ones(16, 70000, device=triton_device, dtype=torch.float16)
    if form == "flash":
        queue = queue[:, :2000].contiguous()
    loss, grad = loss_and_grad(info_nce, ones, ones / 2, queue, temp=0.1)
    assert loss.isfinite() and grad.isfinite().all() and (grad > 0).all()


@triton.jit
def _starts_kernel(out_ptr, WIDTH: tl.constexpr):
    row = tl.arange(0, 4)
    tl.store(out_ptr + row, _start(row, WIDTH, True))


def test_64_bit_addresses(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.zeros(4, dtype=torch.int64, device=triton_device)
    _starts_kernel[(1,)](out, WIDTH=2**30 + 7)
    assert out.tolist() == [i * (2**30 + 7) for i in range(4)]
    inputs = problem(9, 32, 300, triton_device, torch.bfloat16)
    expected = loss_and_grad(info_nce, *inputs, temp=0.1)
    seen = []
    monkeypatch.setattr(gpu, "needs_int64", lambda *tensors: seen.append([x.shape for x in tensors]) or True)
    got = loss_and_grad(info_nce, *inputs, temp=0.1)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert len(seen) == 1 and inputs[0].shape in seen[0] and inputs[2].shape in seen[0]


def test_operator_is_well_formed(triton_device: torch.device, form: str) -> None:
    query, key, queue = problem(3, 16, 70, triton_device, torch.bfloat16)
    temp = torch.tensor(0.1, device=triton_device)
    for needs_grad in (True, False):
        arguments = (query.requires_grad_(needs_grad), key, queue, temp, torch.bfloat16, needs_grad)
        torch.library.opcheck(gpu._forward, arguments)


def test_compiles_without_graph_breaks(triton_device: torch.device, form: str) -> None:
    query, key, queue = problem(3, 16, 70, triton_device, torch.bfloat16)

    def step(query: Tensor, temp: Tensor) -> Tensor:
        return 2 * info_nce(query, key, queue, temp=temp).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for temp in (torch.tensor(0.1, device=query.device), torch.tensor(0.2, device=query.device)):
        got, expected = loss_and_grad(compiled, query, temp), loss_and_grad(step, query, temp)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
