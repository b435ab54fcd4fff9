"""The fused loss on logits against the float64 double loop over views."""

import pytest
import torch
from fastdino_kernels import backend, dino_loss, reference
from fastdino_kernels.dino_loss import _backward, _forward, new_state, temperature
from fastdino_kernels.modules import DINOLoss
from torch import Tensor

SHAPES = [  # views, n_global, images, K
    (10, 2, 3, 65),
    (2, 2, 1, 1),
    (2, 1, 2, 4097),
    (4, 3, 2, 9000),
    (3, 2, 5, 16),
    (12, 2, 1, 8192),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def double_loop(
    student: Tensor, teacher: Tensor, center: Tensor, s: float, u: float, n_global: int = 2
) -> Tensor:
    images = len(teacher) // n_global
    students = (student / s).split(images)
    targets = ((teacher - center) / u).softmax(-1).split(images)
    pairs = [(p, x) for g, p in enumerate(targets) for v, x in enumerate(students) if g != v]
    return torch.stack([-(p * x.log_softmax(-1)).sum(-1).mean() for p, x in pairs]).mean()


def problem(
    views: int, n_global: int, images: int, k: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
):
    g = torch.Generator().manual_seed(views * k)
    x = (scale * torch.randn(views * images, k, generator=g)).to(dtype)
    t = (scale * torch.randn(n_global * images, k, generator=g)).to(dtype)
    return x, t, torch.randn(k, generator=g)


def loss_and_grad(function, x: Tensor, *args, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = function(x, *args)
    loss = loss if isinstance(loss, Tensor) else loss.loss
    (factor * loss).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_double_loop(library: None, poisoned: None, shape: tuple, dtype: torch.dtype) -> None:
    n_global = shape[1]
    x, t, c = problem(*shape, dtype)
    out = dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04, n_global=n_global)
    kernel = loss_and_grad(
        lambda x: dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04, n_global=n_global), x
    )
    oracle = loss_and_grad(lambda x: double_loop(x, t.double(), c.double(), 0.1, 0.04, n_global), x.double())
    eager = loss_and_grad(lambda x: double_loop(x.float(), t.float(), c, 0.1, 0.04, n_global), x)
    eps = torch.finfo(dtype).eps
    for value, base, truth, rounding in zip(kernel, eager, oracle, (1.2e-7, eps), strict=True):
        assert error(value, truth) <= 2 * error(base, truth) + rounding * truth.abs().max().item()
    truth = reference.dino_loss(
        x.double(), t.double(), c.double(), student_temp=0.1, teacher_temp=0.04, n_global=n_global
    )
    for name in ("batch_center", "teacher_entropy", "kl"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name), rtol=3e-6, atol=3e-6)
    assert kernel[1].dtype == dtype and out.loss.dtype == torch.float32


@pytest.mark.parametrize(
    "scale,s,u", [(1e4, 0.1, 0.04), (1e4, 0.01, 0.01), (30.0, 0.01, 0.01), (1e-3, 1.0, 1.0)]
)
def test_extreme_logits_and_temperatures(library: None, scale: float, s: float, u: float) -> None:
    x, t, c = problem(5, 2, 2, 5001, scale=scale)
    kernel = loss_and_grad(lambda x: dino_loss(x, t, c, student_temp=s, teacher_temp=u), x)
    oracle = loss_and_grad(lambda x: double_loop(x, t.double(), c.double(), s, u), x.double())
    for value, truth in zip(kernel, oracle, strict=True):
        assert error(value, truth) <= 4e-6 * truth.abs().max().item()


def test_shifts_change_nothing(library: None) -> None:
    x, t, c = problem(4, 2, 2, 700)
    x, t = (x * 64).round() / 64, (t * 64).round() / 64  # so that the shift below is exact
    plain = loss_and_grad(lambda x: dino_loss(x, t, c * 0, student_temp=0.1, teacher_temp=0.04), x)
    moved = loss_and_grad(
        lambda x: dino_loss(x, t - 4096, c * 0, student_temp=0.1, teacher_temp=0.04), x + 4096
    )
    assert torch.equal(plain[0], moved[0]) and torch.equal(plain[1], moved[1])


def test_nan_and_infinity_reach_the_loss(library: None) -> None:
    for bad in (float("nan"), float("inf")):
        x, t, c = problem(4, 2, 2, 5000)
        x[3, 4500] = bad
        assert dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04).loss.isnan()
        x, t, c = problem(4, 2, 2, 5000)
        t[1, 17] = bad
        out = dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04)
        assert out.loss.isnan() and out.teacher_entropy.isnan()
    x, t, c = problem(4, 2, 2, 5000)
    t[1, 17] = -float("inf")  # a prototype the teacher excludes is fine
    out = dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04)
    torch.testing.assert_close(out.loss.double(), double_loop(x.double(), t.double(), c.double(), 0.1, 0.04))
    assert out.teacher_entropy.isfinite()
    x[2, 17], t[0, 17] = (
        -float("inf"),
        5.0,
    )  # one the student excludes but the teacher does not: infinite surprise
    assert dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04).loss == float("inf")


def test_backward_scales_repeats_and_takes_expanded_gradients(library: None) -> None:
    x, t, c = problem(4, 2, 3, 300)
    _, base = loss_and_grad(lambda x: dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04), x)
    _, tripled = loss_and_grad(
        lambda x: dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04), x, factor=3.0
    )
    torch.testing.assert_close(tripled, 3 * base, rtol=1e-6, atol=1e-12)
    leaf = x.clone().requires_grad_()
    loss = dino_loss(leaf, t, c, student_temp=0.1, teacher_temp=0.04).loss
    loss.expand(5).sum().backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 5 * base, rtol=1e-6, atol=1e-12)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 6 * base, rtol=1e-6, atol=1e-12)


def test_strided_inputs_and_mixed_dtypes(library: None) -> None:
    x, t, c = problem(4, 2, 3, 300)
    expected = loss_and_grad(lambda x: dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04), x)
    wide = torch.stack([x, x], -1)[..., 0]
    assert not wide.is_contiguous()
    got = loss_and_grad(
        lambda x: dino_loss(x, t.T.contiguous().T, c, student_temp=0.1, teacher_temp=0.04), wide
    )
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    mixed = dino_loss(x, t.bfloat16(), c, student_temp=0.1, teacher_temp=0.04).loss
    assert torch.equal(mixed, dino_loss(x, t.bfloat16().float(), c, student_temp=0.1, teacher_temp=0.04).loss)


def test_only_the_loss_carries_a_gradient(library: None) -> None:
    x, t, c = problem(4, 2, 3, 300)
    for kind in ("auto", "reference"):
        with backend(kind):
            out = dino_loss(x.requires_grad_(), t, c, student_temp=0.1, teacher_temp=0.04)
            assert [y.requires_grad for y in out] == [True, False, False, False]
            with torch.no_grad():
                assert not dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04).loss.requires_grad
    assert not dino_loss(x.detach(), t, c, student_temp=0.1, teacher_temp=0.04).loss.requires_grad


def test_bitwise_the_same_again_and_for_any_number_of_threads(library: None, threads: None) -> None:
    x, t, c = problem(6, 2, 5, 9001)
    results = []
    for n in (1, 1, 2, 3):
        torch.set_num_threads(n)
        results.append(loss_and_grad(lambda x: dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.04), x))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_well_formed(library: None, dtype: torch.dtype) -> None:
    x, t, c = problem(4, 2, 3, 40, dtype)
    arguments = (x.requires_grad_(), t, c, temperature(0.1), temperature(0.04), 2)
    torch.library.opcheck(_forward, arguments)
    state = _forward(*arguments)[3]
    assert state.shape == new_state(3, 4, 2).shape
    torch.library.opcheck(_backward, (torch.tensor(2.0), x.detach(), t, c, *arguments[3:5], state, 2))


def test_compiles_without_graph_breaks(library: None) -> None:
    x, t, c = problem(4, 2, 3, 300)

    def step(x: Tensor, u: Tensor) -> Tensor:
        return 2 * dino_loss(x, t, c, student_temp=0.1, teacher_temp=u).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for u in (torch.tensor(0.04), torch.tensor(0.07)):
        got, expected = loss_and_grad(compiled, x, u), loss_and_grad(step, x, u)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_float64_takes_the_reference() -> None:
    x, t, c = (y.double() for y in problem(3, 2, 2, 6))

    def loss(x: Tensor) -> Tensor:
        return dino_loss(x, t, c, student_temp=0.5, teacher_temp=0.3).loss

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(),))


BAD = [
    (dict(student_logits=[1.0]), TypeError, "student_logits: expected a tensor"),
    (
        dict(student_logits=torch.zeros(8, 4, dtype=torch.int64)),
        TypeError,
        "student_logits: expected a floating-point",
    ),
    (dict(student_logits=torch.zeros(8)), ValueError, r"student_logits: expected shape \[V\*B, K\]"),
    (
        dict(teacher_logits=torch.zeros(4, 5)),
        ValueError,
        r"teacher_logits: expected shape \[G\*B, 4\], got \[4, 5\]",
    ),
    (dict(center=torch.zeros(1, 4)), ValueError, r"center: expected shape \[4\], got \[1, 4\]"),
    (dict(center=torch.zeros(4, device="meta")), ValueError, "center: expected device cpu, got meta"),
    (
        dict(teacher_logits=torch.zeros(4, 4, requires_grad=True)),
        ValueError,
        "teacher_logits: .* must not require grad",
    ),
    (dict(student_temp=0.0), ValueError, "student_temp: expected a temperature > 0, got 0.0"),
    (dict(teacher_temp=float("nan")), ValueError, "teacher_temp: expected a temperature > 0"),
    (dict(teacher_temp="hot"), TypeError, "teacher_temp: expected a number"),
    (dict(teacher_temp=torch.ones(2)), ValueError, "teacher_temp: .* 0-dim"),
    (dict(student_logits=torch.zeros(7, 4)), ValueError, r"student_logits: expected V \* B = V \* 2 rows"),
    (dict(student_logits=torch.zeros(2, 4)), ValueError, "student_logits: .* V >= 2"),
    (dict(teacher_logits=torch.zeros(3, 4)), ValueError, "teacher_logits: expected n_global"),
    (dict(teacher_logits=torch.zeros(0, 4)), ValueError, "teacher_logits: expected n_global"),
    (dict(n_global=0), ValueError, "n_global: expected at least 1"),
]


@pytest.mark.parametrize("change,kind,message", BAD, ids=[message for _, _, message in BAD])
def test_errors_name_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    arguments = dict(
        student_logits=torch.zeros(8, 4), teacher_logits=torch.zeros(4, 4), center=torch.zeros(4)
    )
    options = dict(student_temp=0.1, teacher_temp=0.04)
    merged = {**arguments, **options, **change}
    with pytest.raises(kind, match=message):
        dino_loss(**merged)


def test_official_module(library: None) -> None:
    loss = DINOLoss(50, 4, 0.04, 0.07, 3, 10)
    assert list(loss.state_dict()) == ["center"] and loss.center.shape == (1, 50)
    assert loss.teacher_temp_schedule == pytest.approx([0.04, 0.055] + [0.07] * 8)
    x, t, _ = problem(4, 2, 3, 50)
    x.requires_grad_(), t.requires_grad_()
    center = torch.zeros(50)
    for epoch in (0, 5):
        value = loss(x, t, epoch)
        expected = double_loop(x.detach(), t.detach(), center, 0.1, loss.teacher_temp_schedule[epoch])
        torch.testing.assert_close(value.detach(), expected)
        center = 0.9 * center + 0.1 * t.detach().mean(0)
        torch.testing.assert_close(loss.center, center[None])
    value.backward()
    assert x.grad is not None and t.grad is None
    with pytest.raises(ValueError, match="student_output: expected ncrops"):
        loss(x[:-1], t, 0)
