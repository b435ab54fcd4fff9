"""Multi-crop DINO loss on logits, all pairs of views in one pass.

With ``x_v = student_v / s`` and ``p_g = softmax((teacher_g - c) / u)``, ``w = 1 / (pairs B)``, ``pairs = G (V
- 1)``:

    loss        = w sum_{b, g != v} ( logsumexp(x_vb) - p_gb . x_vb )
    dloss/dx_vb = w ( n_v softmax(x_vb) - sum_{g != v} p_gb ),  n_v = number of teacher views paired with v
    entropy     = mean_{g, b} ( logsumexp(t_gb) - p_gb . t_gb ),  t = (teacher - c) / u;   KL = loss - entropy

The CPU kernels (csrc/dino_loss.cpp) read each logit once for the loss and once for the gradient, and keep one
small record of statistics per image between the two; nothing of size [rows, K] but the gradient itself is
allocated. The functions below them work on any block of columns, which is how
:func:`fastdino_kernels.prototype_loss` uses them as well. gpu/dino_loss.py does the same with Triton.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import reference
from .backend import resolve
from .native import call, empty, int64, on_huge_pages, pointer, tensor
from .operators import operator, register_gradient
from .reference import DinoLoss
from .validate import check_no_grad, check_prototypes, check_temperature, check_tensor, check_views

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def new_state(images: int, views: int, n_global: int) -> Tensor:
    """Empty statistics of ``images`` images: float64 [images * (2 V + 3 G + V G)]."""
    state = empty(images * state_size(views, n_global), dtype=torch.float64)
    call("fdk_dino_state_init", *int64(images, views, n_global), pointer(state))
    return state


def state_size(views: int, n_global: int) -> int:
    return 2 * views + 3 * n_global + views * n_global


def add_statistics(
    state: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    shape: tuple[int, int, int],
    temps: tuple[float, float],
) -> None:
    """Add some columns of the logits to the state: student [V*B, C], teacher [G*B, C], center [C] fp32."""
    call("fdk_dino_statistics", *_logits(student, teacher, center, shape, temps), pointer(state))


def result(state: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Loss and mean teacher entropy, fp32 [], of a complete state."""
    values = (ctypes.c_double * 2)()
    call("fdk_dino_result", *int64(*shape), pointer(state), values)
    return tensor(values[0]), tensor(values[1])


def write_gradient(
    out: Tensor,
    state: Tensor,
    grad_loss: float,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    shape: tuple[int, int, int],
    temps: tuple[float, float],
) -> None:
    """``out`` [V*B, C] <- grad_loss * d loss / d student for these columns."""
    arguments = _logits(student, teacher, center, shape, temps)
    grad = ctypes.c_double(grad_loss)
    call("fdk_dino_gradient", *arguments, pointer(state), grad, pointer(out), *int64(out.stride(0)))


def _logits(
    student: Tensor, teacher: Tensor, center: Tensor, shape: tuple[int, int, int], temps: tuple[float, float]
) -> tuple[object, ...]:
    assert student.dtype == teacher.dtype and student.dtype in KERNEL_DTYPES and center.dtype == torch.float32
    assert student.stride(1) == teacher.stride(1) == 1 and center.is_contiguous()
    return (
        *map(pointer, (student, teacher, center)),
        *int64(*shape, student.shape[1], student.stride(0), teacher.stride(0)),
        ctypes.c_int(student.dtype == torch.bfloat16),
        *map(ctypes.c_double, temps),
    )


@operator("fastdino::dino_loss_fwd")
def _forward(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    n_global: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss [], entropy [], batch center [K], state."""
    shape = _shape(student, teacher, n_global)
    state = new_state(*shape)
    add_statistics(state, student, teacher, center, shape, (student_temp.item(), teacher_temp.item()))
    return *result(state, shape), teacher.mean(0, dtype=torch.float32), state


@torch.library.register_fake(_forward)
def _(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    n_global: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, views, _ = _shape(student, teacher, n_global)
    scalar = student.new_empty((), dtype=torch.float32)
    state = student.new_empty(images * state_size(views, n_global), dtype=torch.float64)
    return scalar, torch.empty_like(scalar), student.new_empty(student.shape[1], dtype=torch.float32), state


@operator("fastdino::dino_loss_bwd")
def _backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    state: Tensor,
    n_global: int,
) -> Tensor:
    """-> gradient of the student's logits, [V*B, K] in their dtype."""
    out = on_huge_pages(torch.empty_like(student))
    temps = (student_temp.item(), teacher_temp.item())
    write_gradient(
        out, state, grad_loss.item(), student, teacher, center, _shape(student, teacher, n_global), temps
    )
    return out


@torch.library.register_fake(_backward)
def _(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    state: Tensor,
    n_global: int,
) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


register_gradient(_forward, _backward, leaves=1, kept=3, passed=1)


def _shape(student: Tensor, teacher: Tensor, n_global: int) -> tuple[int, int, int]:
    images = teacher.shape[0] // n_global
    return images, student.shape[0] // images, n_global


def temperature(value: float | Tensor) -> Tensor:
    """0-dim float64 CPU tensor, so that a compiled graph need not be rebuilt when a schedule moves it."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    return tensor(value, dtype=torch.float64)


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    n_global: int = 2,
) -> DinoLoss:
    """Cross-entropy of each teacher view with each other student view (Caron et al. 2021, eq. 1-4).

    Args:
        student_logits: [V*B, K], view-major: row ``v * B + b``; fp32, bf16, fp16 or float64.
        teacher_logits: [n_global*B, K] of the first ``n_global`` views; must not require grad.
        center: [K], as it was before this step's update.
        student_temp, teacher_temp: numbers > 0, or 0-dim tensors.

    Returns:
        DinoLoss of fp32 tensors (float64 for float64 logits); ``loss`` is differentiable in
        ``student_logits``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_tensor("student_logits", student_logits, ("V*B", "K"))
    k = student_logits.shape[1]
    check_tensor("teacher_logits", teacher_logits, ("G*B", k), like=student_logits)
    check_tensor("center", center, (k,), like=student_logits)
    check_no_grad("center", center)
    check_prototypes("student_logits", k)
    check_no_grad("teacher_logits", teacher_logits)
    check_temperature("student_temp", student_temp)
    check_temperature("teacher_temp", teacher_temp)
    check_views(
        "student_logits", student_logits.shape[0], "teacher_logits", teacher_logits.shape[0], n_global
    )
    chosen = resolve(student_logits, teacher_logits)
    if chosen == "triton":
        from .gpu.dino_loss import dino_loss as on_gpu

        loss, batch_center, entropy = on_gpu(
            student_logits, teacher_logits, center, student_temp, teacher_temp, n_global
        )
        return DinoLoss(loss, batch_center, entropy, loss.detach() - entropy)
    if chosen == "reference":
        return reference.dino_loss(
            student_logits,
            teacher_logits,
            center,
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            n_global=n_global,
        )
    dtype = student_logits.dtype if student_logits.dtype == teacher_logits.dtype else torch.float32
    dtype = dtype if dtype in KERNEL_DTYPES else torch.float32
    loss, entropy, batch_center, _ = _forward(
        student_logits.to(dtype).contiguous(),
        teacher_logits.to(dtype).contiguous(),
        center.float().contiguous(),
        temperature(student_temp),
        temperature(teacher_temp),
        n_global,
    )
    return DinoLoss(loss, batch_center, entropy, loss.detach() - entropy)
