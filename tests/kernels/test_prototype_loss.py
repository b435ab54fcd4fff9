"""The loss fused with the prototype layer against the float64 double loop over views."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import normalize_weight, prototype_loss, reference
from fastdino_kernels.dino_loss import temperature
from torch import Tensor

implementation = importlib.import_module("fastdino_kernels.prototype_loss")

SHAPES = [  # views, n_global, images, K, D
    (10, 2, 3, 65, 16),
    (2, 2, 1, 1, 1),
    (2, 1, 2, 4097, 8),
    (4, 3, 2, 9000, 24),
    (12, 2, 1, 8192, 64),
]
TEMPS = dict(student_temp=0.1, teacher_temp=0.04)


def double_loop(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, n_global: int = 2) -> Tensor:
    images = len(y) // n_global
    students = (F.linear(z, w) / 0.1).split(images)
    targets = ((F.linear(y, wt) - c) / 0.04).softmax(-1).split(images)
    pairs = [(p, x) for g, p in enumerate(targets) for v, x in enumerate(students) if g != v]
    return torch.stack([-(p * x.log_softmax(-1)).sum(-1).mean() for p, x in pairs]).mean()


def problem(views: int, n_global: int, images: int, k: int, d: int, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(views * k + d)
    z, w = torch.randn(views * images, d, generator=g), torch.randn(k, d, generator=g)
    y, wt = torch.randn(n_global * images, d, generator=g), torch.randn(k, d, generator=g)
    return (*(F.normalize(x, dim=1).to(dtype) for x in (z, w, y, wt)), 0.3 * torch.randn(k, generator=g))


def loss_and_grads(
    function, z: Tensor, w: Tensor, *rest, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    z, w = z.detach().requires_grad_(), w.detach().requires_grad_()
    loss = function(z, w, *rest)
    loss = loss if isinstance(loss, Tensor) else loss.loss
    (factor * loss).backward()
    assert z.grad is not None and w.grad is not None
    return loss.detach(), z.grad, w.grad


def fused(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, n_global: int = 2) -> Tensor:
    return prototype_loss(z, w, y, wt, c, n_global=n_global, **TEMPS).loss


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


@pytest.fixture(params=["kept", "recomputed"])
def logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the backward to the logits; small chunks, so that there are several."""
    monkeypatch.setattr(implementation, "CHUNK_BYTES", 1)
    if request.param == "recomputed":
        monkeypatch.setattr(implementation, "KEEP_BYTES", 0)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_double_loop(
    library: None, poisoned: None, logits: str, shape: tuple, dtype: torch.dtype
) -> None:
    n_global = shape[1]
    inputs = problem(*shape, dtype)
    kernel = loss_and_grads(fused, *inputs, n_global)
    oracle = loss_and_grads(double_loop, *(x.double() for x in inputs), n_global)
    # Eager code in the same dtype: GEMMs in bf16, the loss in fp32; fp16 is computed in fp32 on a CPU.
    z, w, y, wt, c = inputs
    if dtype == torch.bfloat16:
        lower = dict(device_type="cpu", dtype=dtype)
    else:
        lower = dict(device_type="cpu", enabled=False)
        z, w, y, wt = (x.float() for x in (z, w, y, wt))
    with torch.autocast(**lower):
        eager = loss_and_grads(double_loop, z, w, y, wt, c, n_global)
    eps = torch.finfo(dtype).eps
    for value, base, truth in zip(kernel, eager, oracle, strict=True):
        assert error(value, truth) <= 2 * error(base, truth) + eps * truth.abs().max().item()
    assert kernel[1].dtype == dtype and kernel[2].dtype == dtype and kernel[0].dtype == torch.float32


def test_in_fp32_everything_agrees_to_rounding(library: None, logits: str) -> None:
    inputs = problem(10, 2, 4, 9000, 64)
    kernel, oracle = (
        loss_and_grads(fused, *inputs),
        loss_and_grads(double_loop, *(x.double() for x in inputs)),
    )
    for value, truth in zip(kernel, oracle, strict=True):
        assert error(value, truth) <= 3e-6 * truth.abs().max().item()
    out = prototype_loss(*inputs, **TEMPS)
    truth = reference.prototype_loss(*(x.double() for x in inputs), **TEMPS)
    for name in ("batch_center", "teacher_entropy", "kl"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-6)


def test_autocast_computes_in_bf16(library: None, logits: str) -> None:
    inputs = problem(10, 2, 4, 9000, 64)
    truth = loss_and_grads(double_loop, *(x.double() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, w = inputs[0].requires_grad_(), inputs[1].requires_grad_()
        loss = fused(z, w, *inputs[2:])
        eager = loss_and_grads(double_loop, *inputs)
    loss.backward()
    for value, base, exact in zip((loss.detach(), z.grad, w.grad), eager, truth, strict=True):
        assert value.dtype == torch.float32
        assert 0 < error(value, exact) <= 2 * error(base, exact) + 2**-8 * exact.abs().max().item()


def test_gradients_only_where_asked(library: None, logits: str) -> None:
    z, w, y, wt, c = problem(4, 2, 3, 5000, 16)
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


def test_backward_scales_repeats_and_takes_expanded_gradients(library: None, logits: str) -> None:
    z, w, y, wt, c = problem(4, 2, 3, 5000, 16)
    _, dz, dw = loss_and_grads(fused, z, w, y, wt, c)
    _, dz3, dw3 = loss_and_grads(fused, z, w, y, wt, c, factor=3.0)
    torch.testing.assert_close(dz3, 3 * dz, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(dw3, 3 * dw, rtol=1e-4, atol=1e-9)
    z, w = z.requires_grad_(), w.requires_grad_()
    loss = fused(z, w, y, wt, c)
    loss.expand(4).sum().backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(z.grad, 5 * dz, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(w.grad, 5 * dw, rtol=1e-4, atol=1e-9)


def test_strided_inputs(library: None) -> None:
    z, w, y, wt, c = problem(4, 2, 3, 500, 16)
    expected = loss_and_grads(fused, z, w, y, wt, c)
    strided = [x.T.contiguous().T for x in (z, w, y, wt)]
    got = loss_and_grads(fused, *strided, torch.stack([c, c], 1)[:, 0])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_extreme_features(library: None) -> None:
    z, w, y, wt, c = problem(5, 2, 2, 5000, 16)
    inputs = (100 * z, 100 * w, 100 * y, 100 * wt, c)
    kernel, oracle = (
        loss_and_grads(fused, *inputs),
        loss_and_grads(double_loop, *(x.double() for x in inputs)),
    )
    eager = loss_and_grads(double_loop, *inputs)
    for value, base, truth in zip(kernel, eager, oracle, strict=True):
        assert value.isfinite().all()
        assert error(value, truth) <= 2 * error(base, truth) + 1.2e-7 * truth.abs().max().item()


def test_bitwise_the_same_again(library: None, logits: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = problem(6, 2, 5, 9001, 32, dtype)
        first, second = loss_and_grads(fused, *inputs), loss_and_grads(fused, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_threads_change_only_rounding(library: None, threads: None) -> None:
    inputs = problem(6, 2, 5, 9001, 32)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(loss_and_grads(fused, *inputs))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert error(a, b.double()) <= 1e-5 * b.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_well_formed(library: None, logits: str, dtype: torch.dtype) -> None:
    z, w, y, wt, c = problem(4, 2, 3, 40, 8, dtype)
    tensors = (z.requires_grad_(), w.requires_grad_(), y, wt, c, temperature(0.1), temperature(0.04))
    torch.library.opcheck(implementation._forward, (*tensors, 2, dtype, True))
    *_, state, kept = implementation._forward(*tensors, 2, dtype, True)
    assert len(kept) == (18 * 40 if logits == "kept" else 0)
    detached = [x.detach() for x in tensors]
    for needs_z, needs_weight in ((True, True), (False, True), (True, False)):
        arguments = (torch.tensor(2.0), *detached, state, kept, 2, dtype, needs_z, needs_weight)
        torch.library.opcheck(implementation._backward, arguments)


def test_compiles_without_graph_breaks(library: None) -> None:
    z, w, y, wt, c = problem(4, 2, 3, 300, 16)
    v, g = 3 * w, torch.ones(300, 1)

    def step(z: Tensor, v: Tensor, u: Tensor) -> Tensor:
        weight = normalize_weight(v, g)
        return 2 * prototype_loss(z, weight, y, wt, c, student_temp=0.1, teacher_temp=u).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for u in (torch.tensor(0.04), torch.tensor(0.07)):
        for a, b in zip(loss_and_grads(compiled, z, v, u), loss_and_grads(step, z, v, u), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_float64_takes_the_reference() -> None:
    z, w, y, wt, c = (x.double() for x in problem(3, 2, 2, 6, 4))
    assert torch.autograd.gradcheck(
        lambda z, w: fused(z, w, y, wt, c), (z.requires_grad_(), w.requires_grad_())
    )


BAD = [
    (dict(student_z=None), TypeError, "student_z: expected a tensor, got NoneType"),
    (
        dict(student_z=torch.zeros(8, 4, 1)),
        ValueError,
        r"student_z: expected shape \[V\*B, D\], got \[8, 4, 1\]",
    ),
    (
        dict(student_weight=torch.zeros(6, 5)),
        ValueError,
        r"student_weight: expected shape \[K, 4\], got \[6, 5\]",
    ),
    (dict(teacher_z=torch.zeros(4, 3)), ValueError, r"teacher_z: expected shape \[G\*B, 4\]"),
    (
        dict(teacher_weight=torch.zeros(7, 4)),
        ValueError,
        r"teacher_weight: expected shape \[6, 4\], got \[7, 4\]",
    ),
    (
        dict(teacher_weight=torch.zeros(6, 4, requires_grad=True)),
        ValueError,
        "teacher_weight: .* not require grad",
    ),
    (dict(center=torch.zeros(5)), ValueError, r"center: expected shape \[6\], got \[5\]"),
    (dict(center=torch.zeros(6, device="meta")), ValueError, "center: expected device cpu, got meta"),
    (dict(teacher_temp=-1), ValueError, "teacher_temp: expected a temperature > 0, got -1"),
    (dict(student_z=torch.zeros(9, 4)), ValueError, r"student_z: expected V \* B"),
]


@pytest.mark.parametrize("change,kind,message", BAD, ids=[message for _, _, message in BAD])
def test_errors_name_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    arguments = dict(
        student_z=torch.zeros(8, 4),
        student_weight=torch.zeros(6, 4),
        teacher_z=torch.zeros(4, 4),
        teacher_weight=torch.zeros(6, 4),
        center=torch.zeros(6),
    )
    merged = {**arguments, **TEMPS, **change}
    with pytest.raises(kind, match=message):
        prototype_loss(**merged)
