"""EMA and clipping of lists of tensors."""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels import backend, clip_grad_per_tensor_, ema_update_
from fastdino_kernels.ema import grad_norms
from torch import Tensor

SIZES = [(3,), (257, 129), (), (1, 1, 5), (0, 4), (20000,)]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in SIZES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_ema_update(library: object, kind: str, dtype: torch.dtype) -> None:
    teacher, student = tensors(0), tensors(1, dtype)
    expected = [0.996 * t.double() + 0.004 * s.double() for t, s in zip(teacher, student, strict=True)]
    with backend(kind):
        ema_update_(teacher, student, 0.996)
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t.double(), e, rtol=2e-7, atol=2e-7)


def test_every_half_precision_number_is_read_exactly(library: object) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = bits.view(dtype), torch.zeros(2**16)
        ema_update_([teacher], [student], 0.0)
        assert torch.equal(teacher.isnan(), student.isnan())
        ok = ~student.isnan()
        assert torch.equal(teacher[ok], student[ok].float())


def test_ema_of_other_layouts(library: object) -> None:
    teacher, student = torch.zeros(4, 6).T, torch.randn(6, 4)
    ema_update_([teacher], [student], 0.0)
    assert torch.equal(teacher, student)
    both = torch.zeros(4, 6).T, torch.randn(4, 6).T
    ema_update_([both[0]], [both[1]], 0.0)
    assert torch.equal(*both)


def test_ema_ends_are_exact_and_parameters_are_taken(library: object) -> None:
    student = torch.nn.Parameter(torch.randn(100))
    teacher = torch.randn(100)
    before = teacher.clone()
    ema_update_([teacher], [student], torch.tensor(1.0))
    assert torch.equal(teacher, before)
    ema_update_([teacher], [student], 0.0)
    assert torch.equal(teacher, student)
    ema_update_([], [], 0.5)


@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_norms(library: object, kind: str, threads: None) -> None:
    grads: list[Tensor | None] = [*tensors(0), None, 1e30 * torch.ones(40000), 1e-30 * torch.ones(40000)]
    with backend(kind):
        norms = grad_norms(grads, grad_scale=4.0)
        truth = [0.0 if g is None else g.double().norm().item() / 4 for g in grads]
        torch.testing.assert_close(norms, torch.tensor(truth), rtol=2e-7, atol=0)
        if kind == "cpu":
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                assert torch.equal(grad_norms(grads, grad_scale=4.0), norms)
        bad = torch.ones(50000)
        for i in (0, 31, 32, 8191, 8192, 49999):
            for value in (float("nan"), float("inf")):
                bad[i] = value
                assert not grad_norms([bad])[0].isfinite()
                bad[i] = 1.0
    assert len(grad_norms([])) == 0 and grad_norms([None])[0] == 0


@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_clipping_is_the_official_loop(library: object, kind: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(s)) for s in SIZES] + [torch.nn.Parameter(torch.zeros(2))]
    grads = tensors(3)
    for p, g in zip(params, grads, strict=False):
        p.grad = 8 * g
    with backend(kind):
        norms = clip_grad_per_tensor_(params, 2.0, grad_scale=8.0)
    for p, g, norm in zip(params, grads, norms, strict=False):
        torch.testing.assert_close(norm, g.norm(), rtol=1e-6, atol=0)
        factor = 2.0 / (g.norm() + 1e-6)
        torch.testing.assert_close(p.grad, g * factor if factor < 1 else g, rtol=1e-6, atol=0)
    assert params[-1].grad is None and norms[-1] == 0
    clip_grad_per_tensor_(params, 0.0)
    assert params[-2].grad.norm() == pytest.approx(2.0)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="student: expected 1 tensors"):
        ema_update_([torch.ones(1)], [], 0.5)
    with pytest.raises(ValueError, match=r"student\[0\]: expected \[1\] on cpu, got \[2\] on cpu"):
        ema_update_([torch.ones(1)], [torch.ones(2)], 0.5)
    with pytest.raises(ValueError, match="momentum: expected a number in"):
        ema_update_([torch.ones(1)], [torch.ones(1)], -0.1)
    with pytest.raises(ValueError, match="max_norm: expected a number >= 0"):
        clip_grad_per_tensor_([], -1.0)
