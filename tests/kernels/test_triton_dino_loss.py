"""The Triton form of the loss on logits against the float64 double loop over views."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from fastdino_kernels import dino_loss, reference
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of the interpreter
kernels = importlib.import_module("fastdino_kernels.gpu.dino_kernels")
operators = importlib.import_module("fastdino_kernels.gpu.dino_loss")

SHAPES = [  # views, n_global, images, K
    (10, 2, 2, 65),
    (2, 2, 1, 1),
    (3, 1, 1, 2100),
    (4, 3, 1, 600),
    (5, 5, 1, 257),
    (3, 2, 2, 1024),
]
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, dtype) for shape in (SHAPES[0], SHAPES[5]) for dtype in (torch.bfloat16, torch.float16)]


def double_loop(
    student: Tensor, teacher: Tensor, center: Tensor, s: float = 0.1, u: float = 0.04, n_global: int = 2
) -> Tensor:
    images = len(teacher) // n_global
    students = (student / s).split(images)
    targets = ((teacher - center) / u).softmax(-1).split(images)
    pairs = [(p, x) for g, p in enumerate(targets) for v, x in enumerate(students) if g != v]
    return torch.stack([-(p * x.log_softmax(-1)).sum(-1).mean() for p, x in pairs]).mean()


def problem(
    views: int,
    n_global: int,
    images: int,
    k: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(views * k)
    x, t = ((scale * torch.randn(n * images, k, generator=g)).to(device, dtype) for n in (views, n_global))
    return x, t, torch.randn(k, generator=g).to(device)


def loss_and_grad(
    function: Callable[..., Tensor], x: Tensor, *rest: Tensor | float, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = function(x, *rest)
    (factor * loss).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def fused(x: Tensor, t: Tensor, c: Tensor, s: float = 0.1, u: float = 0.04, n_global: int = 2) -> Tensor:
    return dino_loss(x, t, c, student_temp=s, teacher_temp=u, n_global=n_global).loss


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


def check(
    x: Tensor, t: Tensor, c: Tensor, s: float = 0.1, u: float = 0.04, n_global: int = 2
) -> tuple[Tensor, Tensor]:
    """The fused loss and gradient are as near to float64 as eager code in fp32."""
    kernel = loss_and_grad(fused, x, t, c, s, u, n_global)
    oracle = loss_and_grad(double_loop, x.double(), t.double(), c.double(), s, u, n_global)
    eager = loss_and_grad(lambda x: double_loop(x.float(), t.float(), c, s, u, n_global), x)
    eps = torch.finfo(torch.float32).eps, torch.finfo(x.dtype).eps
    for value, base, truth, rounding in zip(kernel, eager, oracle, (2 * eps[0], eps[1]), strict=True):
        assert error(value, truth) <= 2 * error(base, truth) + rounding * truth.abs().max().item()
    return kernel


@pytest.mark.parametrize("shape,dtype", CASES, ids=str)
def test_against_the_double_loop(
    triton_device: torch.device, poisoned: None, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    x, t, c = problem(*shape, triton_device, dtype)
    loss, grad = check(x, t, c, n_global=shape[1])
    assert grad.dtype == dtype and loss.dtype == torch.float32
    temps = dict(student_temp=0.1, teacher_temp=0.04)
    out = dino_loss(x, t, c, **temps, n_global=shape[1])
    truth = reference.dino_loss(x.double(), t.double(), c.double(), **temps, n_global=shape[1])
    for name in ("batch_center", "teacher_entropy", "kl"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("scale,s,u", [(1e4, 0.1, 0.04), (30.0, 0.01, 0.01), (1e-3, 1.0, 1.0)])
def test_extreme_logits_and_temperatures(
    triton_device: torch.device, scale: float, s: float, u: float
) -> None:
    check(*problem(3, 2, 1, 1100, triton_device, scale=scale), s, u)


def test_shifts_change_nothing(triton_device: torch.device) -> None:
    x, t, c = problem(3, 2, 1, 1100, triton_device)
    x, t = (x * 64).round() / 64, (t * 64).round() / 64  # so that the shift below is exact
    plain = loss_and_grad(fused, x, t, c * 0)
    moved = loss_and_grad(fused, x + 4096, t - 4096, c * 0)
    assert torch.equal(plain[0], moved[0]) and torch.equal(plain[1], moved[1])


def test_nan_and_infinity_reach_the_loss(triton_device: torch.device) -> None:
    def changed(row: int | None = None, teacher_row: int | None = None, value: float = 0.0):  # type: ignore[no-untyped-def]
        x, t, c = problem(3, 2, 2, 1100, triton_device)
        if row is not None:
            x[row, 1050] = value
        if teacher_row is not None:
            t[teacher_row, 17] = value
        return x, t, c

    temps = dict(student_temp=0.1, teacher_temp=0.04)
    for bad in (float("nan"), float("inf")):
        assert fused(*changed(row=3, value=bad)).isnan()
        out = dino_loss(*changed(teacher_row=1, value=bad), **temps)
        assert out.loss.isnan() and out.teacher_entropy.isnan()
    x, t, c = changed(teacher_row=1, value=-float("inf"))  # a prototype the teacher excludes is fine
    check(x, t, c)
    assert dino_loss(x, t, c, **temps).teacher_entropy.isfinite()
    t[:, :1024] = -float("inf")  # and so is a whole block of them
    torch.testing.assert_close(fused(x, t, c).double(), double_loop(x.double(), t.double(), c.double()))
    x, t, c = changed(row=2, value=-float("inf"))
    t[0, 1050] = 5.0  # the student excludes what the teacher does not: infinite surprise
    assert fused(x, t, c) == float("inf")


def test_backward_scales_repeats_and_takes_expanded_gradients(triton_device: torch.device) -> None:
    x, t, c = problem(3, 2, 1, 150, triton_device)
    _, base = loss_and_grad(fused, x, t, c)
    _, tripled = loss_and_grad(fused, x, t, c, factor=3.0)
    torch.testing.assert_close(tripled, 3 * base, rtol=1e-6, atol=1e-12)
    leaf = x.clone().requires_grad_()
    loss = fused(leaf, t, c)
    loss.expand(5).sum().backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 6 * base, rtol=1e-6, atol=1e-12)


def test_strided_inputs_and_mixed_dtypes(triton_device: torch.device) -> None:
    x, t, c = problem(3, 2, 2, 150, triton_device)
    expected = loss_and_grad(fused, x, t, c)
    columns = torch.stack([x, x], -1)[..., 0], t.T.contiguous().T
    rows = torch.cat([x, x], 1)[:, :150], torch.stack([t, t], 1).flatten(0, 1)[::2]
    for strided in (columns, rows):
        got = loss_and_grad(fused, *strided, torch.stack([c, c], 1)[:, 0])
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    same = t[:1].expand(4, -1)
    assert torch.equal(fused(x, same, c), fused(x, same.contiguous(), c))
    mixed = fused(x, t.bfloat16(), c)
    assert torch.equal(mixed, fused(x, t.bfloat16().float(), c))
    loss, grad = loss_and_grad(fused, x.half(), t, c.double())
    assert torch.equal(loss, fused(x.half().float(), t, c)) and grad.dtype == torch.float16


def test_only_the_loss_carries_a_gradient(triton_device: torch.device) -> None:
    x, t, c = problem(3, 2, 1, 20, triton_device)
    out = dino_loss(x.requires_grad_(), t, c, student_temp=0.1, teacher_temp=0.04)
    assert [y.requires_grad for y in out] == [True, False, False, False]
    assert all(y.dtype == torch.float32 for y in out)
    with torch.no_grad():
        assert not fused(x, t, c).requires_grad
    assert not fused(x.detach(), t, c).requires_grad


def test_autocast_changes_nothing(triton_device: torch.device) -> None:
    x, t, c = problem(3, 2, 1, 150, triton_device)
    expected = loss_and_grad(fused, x, t, c)
    with torch.autocast(triton_device.type, dtype=torch.bfloat16):
        got = loss_and_grad(fused, x, t, c)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_bitwise_the_same_again(triton_device: torch.device) -> None:
    x, t, c = problem(4, 2, 2, 1500, triton_device)
    first, second = (loss_and_grad(fused, x, t, c) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_blocks_of_columns_add_up(triton_device: torch.device, poisoned: None) -> None:
    x, t, c = problem(3, 2, 2, 2100, triton_device)
    shape, temps = (2, 3, 2), (torch.tensor(0.1, device=x.device), torch.tensor(0.04, device=x.device))
    whole, parts = kernels.new_records(x, shape, 2100), kernels.new_records(x, shape, 2100)
    kernels.add_statistics(whole, x, t, c, temps, shape)
    for begin, end in ((0, 1024), (1024, 2100)):
        kernels.add_statistics(
            parts, x[:, begin:end], t[:, begin:end].contiguous(), c[begin:end], temps, shape, begin
        )
    assert whole.isfinite().all() and torch.equal(whole, parts)


def test_offsets_beyond_31_bits(triton_device: torch.device) -> None:
    """Rows 2^30 elements apart: virtual memory alone, of which three short rows are touched."""
    x, t, c = problem(3, 3, 1, 40, triton_device, torch.float16)
    stride = 2**30 + 8
    try:
        memory = torch.empty(2 * stride + 40, dtype=torch.float16, device=triton_device)
    except RuntimeError:
        pytest.skip("no 4.3 GB of address space")
    far = memory.as_strided((3, 40), (stride, 1))
    assert kernels.needs_int64(far) and not kernels.needs_int64(x)
    far.copy_(x)
    expected, got = (
        loss_and_grad(fused, x, x, c, 0.1, 0.04, 3),
        loss_and_grad(fused, far, far, c, 0.1, 0.04, 3),
    )
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    center = torch.empty_like(c)
    kernels.column_mean(far, center)
    torch.testing.assert_close(center, x.float().mean(0), rtol=1e-6, atol=1e-7)
    out = memory.as_strided((3, 40), (stride, 1), 0)
    temps = torch.tensor(0.1, device=x.device), torch.tensor(0.04, device=x.device)
    *_, state = operators._forward(x, x, c, *temps, 3)
    one = torch.ones((), device=x.device)
    kernels.write_gradient(out, state, one, x, x, c, temps, (1, 3, 3))
    assert torch.equal(out, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_well_formed(triton_device: torch.device, dtype: torch.dtype) -> None:
    x, t, c = problem(3, 2, 1, 20, triton_device, dtype)
    temps = torch.tensor(0.1, device=x.device), torch.tensor(0.04, device=x.device)
    torch.library.opcheck(operators._forward, (x.requires_grad_(), t, c, *temps, 2))
    *_, state = operators._forward(x, t, c, *temps, 2)
    grad = torch.tensor(2.0, device=x.device)
    torch.library.opcheck(operators._backward, (grad, x.detach(), t, c, *temps, state, 2))


def test_compiles_without_graph_breaks(triton_device: torch.device) -> None:
    x, t, c = problem(3, 2, 1, 100, triton_device)

    def step(x: Tensor, u: Tensor) -> Tensor:
        return 2 * dino_loss(x, t, c, student_temp=0.1, teacher_temp=u).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for u in (torch.tensor(0.04, device=x.device), torch.tensor(0.07, device=x.device)):
        got, expected = loss_and_grad(compiled, x, u), loss_and_grad(step, x, u)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
