"""The chunked form of the prototype loss on Triton's kernels against the float64 double loop over views."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import normalize_weight, prototype_loss, reference
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of the interpreter
chunked = importlib.import_module("fastdino_kernels.gpu.prototype_chunked")
entry = importlib.import_module("fastdino_kernels.gpu.prototype_loss")

SHAPES = [  # views, n_global, images, K, D
    (6, 2, 1, 65, 16),
    (2, 2, 1, 1, 1),
    (2, 1, 1, 2100, 8),
    (4, 3, 1, 1024, 24),
]
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, dtype) for shape in SHAPES[::2] for dtype in (torch.bfloat16, torch.float16)]
TEMPS = dict(student_temp=0.1, teacher_temp=0.04)


@pytest.fixture(autouse=True)
def form(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(entry, "FORM", "chunked")
    yield


@pytest.fixture(params=["kept", "recomputed"])
def logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the backward to the logits: one chunk that is kept, or several small ones."""
    if request.param == "recomputed":
        monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)
        monkeypatch.setattr(chunked, "_keeps", lambda *_: False)
    return request.param


def double_loop(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, n_global: int = 2) -> Tensor:
    images = len(y) // n_global
    students = (F.linear(z, w) / 0.1).split(images)
    targets = ((F.linear(y, wt) - c) / 0.04).softmax(-1).split(images)
    pairs = [(p, x) for g, p in enumerate(targets) for v, x in enumerate(students) if g != v]
    return torch.stack([-(p * x.log_softmax(-1)).sum(-1).mean() for p, x in pairs]).mean()


def problem(
    views: int,
    n_global: int,
    images: int,
    k: int,
    d: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(views * k + d)
    rows = (views * images, k, n_global * images, k)
    inputs = (F.normalize(torch.randn(n, d, generator=g), dim=1).to(device, dtype) for n in rows)
    return (*inputs, 0.3 * torch.randn(k, generator=g).to(device))


def loss_and_grads(
    function: Callable[..., Tensor], z: Tensor, w: Tensor, *rest: Tensor | int, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    z, w = z.detach().requires_grad_(), w.detach().requires_grad_()
    loss = function(z, w, *rest)
    (factor * loss).backward()
    assert z.grad is not None and w.grad is not None
    return loss.detach(), z.grad, w.grad


def fused(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, n_global: int = 2) -> Tensor:
    return prototype_loss(z, w, y, wt, c, n_global=n_global, **TEMPS).loss


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


def eager(inputs: tuple[Tensor, ...], n_global: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Eager code in the inputs' dtype: GEMMs in it, the loss in fp32."""

    def function(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor) -> Tensor:
        images = len(y) // n_global
        students = (F.linear(z, w).float() / 0.1).split(images)
        targets = ((F.linear(y, wt).float() - c) / 0.04).softmax(-1).split(images)
        pairs = [(p, x) for g, p in enumerate(targets) for v, x in enumerate(students) if g != v]
        return torch.stack([-(p * x.log_softmax(-1)).sum(-1).mean() for p, x in pairs]).mean()

    return loss_and_grads(function, *inputs)


def check(
    kernel: tuple[Tensor, ...], inputs: tuple[Tensor, ...], dtype: torch.dtype, n_global: int = 2
) -> None:
    """As near to float64 as eager code with GEMMs in ``dtype``."""
    oracle = loss_and_grads(double_loop, *(x.double() for x in inputs), n_global)
    rounded = (*(x.to(dtype) for x in inputs[:4]), inputs[4])
    eps = torch.finfo(dtype).eps
    for value, base, truth in zip(kernel, eager(rounded, n_global), oracle, strict=True):
        assert error(value, truth) <= 2 * error(base, truth) + 2 * eps * truth.abs().max().item()


@pytest.mark.parametrize("shape,dtype", CASES, ids=str)
def test_against_the_double_loop(
    triton_device: torch.device,
    poisoned: None,
    logits: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
) -> None:
    inputs = problem(*shape, triton_device, dtype)
    kernel = loss_and_grads(fused, *inputs, shape[1])
    assert [x.dtype for x in kernel] == [torch.float32, dtype, dtype]
    check(kernel, inputs, dtype, shape[1])


def test_statistics_beside_the_loss(triton_device: torch.device, logits: str) -> None:
    inputs = problem(3, 2, 2, 1100, 16, triton_device)
    out = prototype_loss(*inputs, **TEMPS)
    truth = reference.prototype_loss(*(x.double() for x in inputs), **TEMPS)
    for name in ("batch_center", "teacher_entropy", "kl"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_sets_the_dtype_of_the_gemms(
    triton_device: torch.device, logits: str, dtype: torch.dtype
) -> None:
    inputs = problem(3, 2, 2, 1100, 16, triton_device)
    exact = loss_and_grads(fused, *inputs)
    with torch.autocast(triton_device.type, dtype=dtype):
        z, w = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
        loss = fused(z, w, *inputs[2:])
    loss.backward()
    kernel = (loss.detach(), z.grad, w.grad)
    assert all(x.dtype == torch.float32 for x in kernel)
    assert all(error(value, truth.double()) > 0 for value, truth in zip(kernel, exact, strict=True))
    check(kernel, inputs, dtype)


def test_mixed_dtypes_compute_in_the_wider(triton_device: torch.device) -> None:
    z, w, y, wt, c = problem(3, 2, 1, 90, 16, triton_device)
    lower = (z.half(), w.bfloat16(), y, wt.half())
    kernel = loss_and_grads(fused, *lower, c.double())
    wide = loss_and_grads(fused, *(x.float() for x in lower), c)
    assert [x.dtype for x in kernel] == [torch.float32, torch.float16, torch.bfloat16]
    assert torch.equal(kernel[0], wide[0]) and torch.equal(kernel[1], wide[1].half())
    assert torch.equal(kernel[2], wide[2].bfloat16())


def test_small_fp16_gradients_do_not_underflow(triton_device: torch.device, logits: str) -> None:
    """Without a loss scale, elements of dx are far below fp16's smallest number."""
    inputs = problem(3, 2, 1, 1100, 16, triton_device)
    truth = loss_and_grads(double_loop, *(x.double() for x in inputs))
    with torch.autocast(triton_device.type, dtype=torch.float16):
        z, w = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
        loss = fused(z, w, *inputs[2:])
    (1e-6 * loss).backward()
    for value, exact in ((z.grad, truth[1]), (w.grad, truth[2])):
        assert (1e6 * value.double() - exact).norm() <= 0.01 * exact.norm()


def test_gradients_only_where_asked(triton_device: torch.device, logits: str) -> None:
    z, w, y, wt, c = problem(3, 2, 1, 1100, 16, triton_device)
    _, dz, dw = loss_and_grads(fused, z, w, y, wt, c)
    z.requires_grad_()
    fused(z, w, y, wt, c).backward()
    assert torch.equal(z.grad, dz) and w.grad is None
    w.requires_grad_()
    fused(z.detach(), w, y, wt, c).backward()
    assert torch.equal(w.grad, dw)
    with torch.no_grad():
        assert not fused(z, w, y, wt, c).requires_grad
    out = prototype_loss(z, w, y, wt, c, **TEMPS)
    assert [x.requires_grad for x in out] == [True, False, False, False]


def test_backward_scales_repeats_and_takes_expanded_gradients(
    triton_device: torch.device, logits: str
) -> None:
    z, w, y, wt, c = problem(3, 2, 1, 1100, 16, triton_device)
    _, dz, dw = loss_and_grads(fused, z, w, y, wt, c)
    _, dz3, dw3 = loss_and_grads(fused, z, w, y, wt, c, factor=3.0)
    torch.testing.assert_close(dz3, 3 * dz, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(dw3, 3 * dw, rtol=1e-4, atol=1e-8)
    z, w = z.requires_grad_(), w.requires_grad_()
    loss = fused(z, w, y, wt, c)
    loss.expand(4).sum().backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(z.grad, 5 * dz, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(w.grad, 5 * dw, rtol=1e-4, atol=1e-8)


def test_strided_inputs(triton_device: torch.device) -> None:
    z, w, y, wt, c = problem(3, 2, 1, 200, 16, triton_device)
    expected = loss_and_grads(fused, z, w, y, wt, c)
    strided = [x.T.contiguous().T for x in (z, w, y, wt)]
    got = loss_and_grads(fused, *strided, torch.stack([c, c], 1)[:, 0])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_extreme_features(triton_device: torch.device) -> None:
    z, w, y, wt, c = problem(3, 2, 1, 1100, 16, triton_device)
    inputs = (100 * z, 100 * w, 100 * y, 100 * wt, c)
    kernel = loss_and_grads(fused, *inputs)
    assert all(x.isfinite().all() for x in kernel)
    check(kernel, inputs, torch.float32)


def test_bitwise_the_same_again(triton_device: torch.device, logits: str) -> None:
    inputs = problem(3, 2, 2, 1100, 16, triton_device, torch.float16)
    first, second = loss_and_grads(fused, *inputs), loss_and_grads(fused, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_chunks_cover_the_columns_within_the_budget() -> None:
    for k, rows, size in ((65536, 896, 2), (65536, 896, 4), (262144, 14, 2), (1500, 7, 4), (1, 4, 2)):
        dtype = torch.float32 if size == 4 else torch.float16
        width, chunks = chunked._chunks(k, rows, dtype)
        parts = list(chunks)
        assert [i for part in parts for i in (part.start, part.stop)][1:-1:2] == [p.start for p in parts[1:]]
        assert parts[0].start == 0 and parts[-1].stop == k
        assert all(part.start % chunked.BLOCK == 0 for part in parts)
        assert max(part.stop - part.start for part in parts) <= width
        assert rows * width * size <= chunked.CHUNK_BYTES + rows * chunked.BLOCK * size


def test_the_table_of_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "FORM", "auto")
    half, full = torch.float16, torch.float32
    assert entry.choose_form(90, 256, half) == "flash"
    assert entry.choose_form(80, 64, torch.bfloat16) == "flash"
    assert entry.choose_form(90, 384, half) == "flash"
    for capability, d, dtype in ((70, 256, half), (90, 256, full), (90, 1024, half)):
        assert entry.choose_form(capability, d, dtype) == "chunked"


def test_operators_are_well_formed(triton_device: torch.device, logits: str) -> None:
    dtype = torch.float32 if logits == "kept" else torch.float16
    z, w, y, wt, c = problem(3, 2, 1, 40, 8, triton_device, dtype)
    temps = torch.tensor(0.1, device=z.device), torch.tensor(0.04, device=z.device)
    tensors = (z.requires_grad_(), w.requires_grad_(), y, wt, c, *temps)
    torch.library.opcheck(chunked._forward, (*tensors, 2, dtype, True))
    *_, state, kept = chunked._forward(*tensors, 2, dtype, True)
    assert kept.shape == ((5, 40) if logits == "kept" else (0, 0))
    detached = [x.detach() for x in tensors]
    grad = torch.tensor(2.0, device=z.device)
    for needs in ((True, True), (False, True)) if logits == "kept" else ((True, False),):
        torch.library.opcheck(chunked._backward, (grad, *detached, state, kept, 2, dtype, *needs))


def test_compiles_without_graph_breaks(triton_device: torch.device) -> None:
    z, w, y, wt, c = problem(3, 2, 1, 100, 16, triton_device)
    v, g = 3 * w, torch.ones(100, 1, device=z.device)

    def step(z: Tensor, v: Tensor, u: Tensor) -> Tensor:
        weight = normalize_weight(v, g)
        return 2 * prototype_loss(z, weight, y, wt, c, student_temp=0.1, teacher_temp=u).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for u in (torch.tensor(0.04, device=z.device), torch.tensor(0.07, device=z.device)):
        for a, b in zip(loss_and_grads(compiled, z, v, u), loss_and_grads(step, z, v, u), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    with torch.autocast(triton_device.type, dtype=torch.bfloat16):
        got, expected = compiled(z, v, u), step(z, v, u)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
