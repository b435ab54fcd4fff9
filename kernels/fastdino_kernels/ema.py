"""Multi-tensor updates outside the fused optimizer: the teacher's EMA and the official per-tensor clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import reference


def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """``teacher <- momentum * teacher + (1 - momentum) * student`` for lists of tensors of equal shapes, in place."""
    if len(teacher) != len(student):
        raise ValueError(f"student: expected {len(teacher)} tensors, as many as teacher, got {len(student)}")
    reference.ema_update_(teacher, student, momentum)


@torch.no_grad()
def clip_grad_per_tensor_(params: Iterable[Tensor], max_norm: float, *, grad_scale: float = 1.0) -> Tensor:
    """Divide each gradient by ``grad_scale``, then scale it by ``min(1, max_norm / (norm + 1e-6))`` of its own norm.

    Returns the norms before clipping, fp32 [n], 0 for a parameter without gradient; ``max_norm`` 0 clips nothing.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm: expected a number >= 0, got {max_norm}")
    grads = [p.grad for p in params]
    norms = reference.grad_norms(grads, grad_scale)
    for grad, norm in zip(grads, norms.tolist(), strict=True):
        if grad is not None:
            grad.mul_(reference.clip_coefficient(norm, max_norm) / grad_scale)
    return norms
