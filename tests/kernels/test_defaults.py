"""Results do not depend on torch's default type and device, which belong to the caller's own tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import fastdino_kernels as fk
import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels.top_k import RunningTopK
from torch import Tensor

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def losses() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Name: a function of tensors, and these; the first is differentiated."""
    torch.manual_seed(0)
    logits, targets, center = torch.randn(12, 70), torch.randn(6, 70), torch.randn(70)
    z, w, y, v = unit(12, 16), unit(70, 16), unit(6, 16), unit(70, 16)
    probabilities = torch.randn(12, 70).softmax(1)
    return {
        "dino_loss": (lambda x, t, c: fk.dino_loss(x, t, c, **TEMPS).loss, [logits, targets, center]),
        "prototype_loss": (lambda *x: fk.prototype_loss(*x, **TEMPS).loss, [z, w, y, v, center]),
        "patch_loss": (
            lambda *x: fk.patch_loss(*x, **TEMPS).loss,
            [z, w, unit(12, 16), v, center],
        ),
        "info_nce": (lambda *x: fk.info_nce(*x, temp=0.1).loss, [z, unit(12, 16), unit(70, 16).t()]),
        "soft_cross_entropy": (
            lambda x, p: fk.soft_cross_entropy(x, p, temp=0.1).sum(), [logits, probabilities],
        ),
        "normalize_weight": (lambda x, g: fk.normalize_weight(x, g).sum(), [w, torch.rand(70, 1)]),
        "sinkhorn_knopp": (lambda x: fk.sinkhorn_knopp(x, temp=0.1), [targets]),
        "softmax_over_batch": (lambda x: fk.softmax_over_batch(x, temp=0.1), [targets]),
        "centered_softmax": (lambda x, c: fk.centered_softmax(x, c, temp=0.1), [targets, center]),
    }  # fmt: skip


@contextmanager
def defaults(kind: torch.dtype | str) -> Iterator[None]:
    if isinstance(kind, str):
        with torch.device(kind):
            yield
        return
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["cpu", "triton"])
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with fk.backend(request.param):
        yield request.param


KINDS = [torch.bfloat16, torch.float64, "meta"]  # what lands on "meta" cannot be computed with


def skip_interpreter(kind: torch.dtype | str, library: str) -> None:
    if kind == "meta" and library == "triton":
        pytest.skip("Triton's interpreter makes tensors on the default device")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(losses()))
def test_losses(name: str, kind: torch.dtype | str, library: str) -> None:
    def run() -> list[Tensor]:
        first = tensors[0].clone().requires_grad_()
        result = function(first, *tensors[1:])
        if not result.requires_grad:
            return [result]
        result.backward()
        assert first.grad is not None
        return [result.detach(), first.grad]

    skip_interpreter(kind, library)
    function, tensors = losses()[name]
    expected = run()
    with defaults(kind):
        found = run()
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two), name


@pytest.mark.parametrize("kind", KINDS)
def test_updates(kind: torch.dtype | str, library: str) -> None:
    def run(under: torch.dtype | str | None) -> list[Tensor]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(40, 3)), torch.nn.Parameter(torch.randn(7))]
        teachers = [p.detach().clone() for p in params]
        optimizers = [fk.AdamWEMA([p], teacher_params=[t]) for p, t in zip(params, teachers, strict=True)]
        for p in params:
            p.grad = torch.randn(p.shape)
        ours = [torch.zeros(5), torch.randn(5)]
        with defaults(under or torch.float32):
            norms = [opt.step(momentum=0.9).grad_norms for opt in optimizers]
            fk.ema_update_(ours[:1], ours[1:], 0.5)
            norms.append(fk.clip_grad_per_tensor_(params, 0.1))
        return [*(p.detach() for p in params), *teachers, *norms, ours[0]]

    skip_interpreter(kind, library)
    for one, two in zip(run(kind), run(None), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k(kind: torch.dtype | str) -> None:
    scores = torch.randn(4, 50)
    expected = scores.topk(3)
    with defaults(kind):
        best = RunningTopK(4, 3)
        best.add(scores, 0)
        values, columns = best.best()
    assert torch.equal(values, expected.values) and torch.equal(columns, expected.indices)


def test_what_would_get_no_gradient_is_refused() -> None:
    x, t, c = torch.randn(8, 5), torch.randn(4, 5), torch.zeros(5)
    with pytest.raises(ValueError, match="student_temp: expected a temperature that is not trained"):
        fk.dino_loss(x, t, c, student_temp=torch.tensor(0.1, requires_grad=True), teacher_temp=0.04)
    with pytest.raises(ValueError, match="center: .* must not require grad"):
        fk.dino_loss(x, t, c.requires_grad_(), **TEMPS)


@pytest.mark.parametrize("library", ["cpu", "triton", "reference"], indirect=True)
def test_an_update_tells_autograd_of_all_that_it_writes(library: str) -> None:
    param = torch.nn.Parameter(torch.ones(64))
    teacher, copy, of_teacher = param.detach().clone(), param.detach().bfloat16(), param.detach().bfloat16()
    optimizer = fk.AdamWEMA(
        [param],
        lr=0.1,
        teacher_params=[teacher],
        low_precision_params=[copy],
        low_precision_teacher=[of_teacher],
    )
    param.grad = torch.ones(64)
    optimizer.step(momentum=0.5)
    state = optimizer.state[param]
    written = [param, teacher, copy, of_teacher, state["exp_avg"], state["exp_avg_sq"], state["step"]]
    before = [x._version for x in written]
    optimizer.step(momentum=0.5)
    assert all(x._version > version for x, version in zip(written, before, strict=True))
