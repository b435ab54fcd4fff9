"""Triton form of the multi-crop DINO loss on logits: four launches forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import operator, register_gradient
from .dino_kernels import add_statistics, column_mean, new_records, result, rows_of, shape_of, write_gradient
from .launch import scalar


@operator("fastdino::dino_loss_triton_fwd", device="default")
def _forward(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    n_global: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss [], entropy [], batch center [K], state."""
    shape, temps = shape_of(student, teacher, n_global), (student_temp, teacher_temp)
    student, teacher = rows_of(student), rows_of(teacher)
    batch_center = torch.empty_like(center)
    column_mean(teacher, batch_center)
    records = new_records(student, shape, student.shape[1])
    add_statistics(records, student, teacher, center, temps, shape)
    loss, entropy, state = result(records, temps, shape)
    return loss, entropy, batch_center, state


@torch.library.register_fake(_forward)
def _(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    n_global: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalars = center.new_empty(()), center.new_empty(())
    return *scalars, torch.empty_like(center), center.new_empty(2, student.shape[0] + teacher.shape[0])


@operator("fastdino::dino_loss_triton_bwd", device="default")
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
    shape, temps = shape_of(student, teacher, n_global), (student_temp, teacher_temp)
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    write_gradient(out, state, grad_loss, rows_of(student), rows_of(teacher), center, temps, shape)
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


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    n_global: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, batch center, teacher entropy, of checked arguments; the logits' dtypes may differ."""
    loss, entropy, batch_center, _ = _forward(
        student_logits,
        teacher_logits,
        center.float().contiguous(),
        scalar(student_temp, student_logits),
        scalar(teacher_temp, student_logits),
        n_global,
    )
    return loss, batch_center, entropy
