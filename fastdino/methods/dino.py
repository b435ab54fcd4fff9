"""DINO: student and teacher of one architecture, cross-entropy between the teacher's centered, sharpened
softmax and the student's softmax over all pairs of different views ("Emerging Properties in Self-Supervised
Vision Transformers", Algorithm 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fastdino_kernels import prototype_loss
from torch import Tensor, nn

from fastdino.config import Config
from fastdino.models import build_student_teacher


class LossOutput(NamedTuple):
    """``loss`` (0-dim, differentiable), ``batch_center`` [K], and the detached 0-dim ``teacher_entropy`` and
    ``kl``, in nats.
    """

    loss: Tensor
    batch_center: Tensor
    teacher_entropy: Tensor
    kl: Tensor


class DINO(nn.Module):
    """Student, teacher and center; knows nothing of optimizers and loops.

    The teacher stays in training mode as in the official code: batch normalisation in its head, if any, uses
    batch statistics, and it has no stochastic depth."""

    center: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.student, self.teacher = build_student_teacher(config)
        self.student_temp = config.loss.student_temp
        self.center_momentum = config.loss.center_momentum
        self.register_buffer("center", torch.zeros(config.model.out_dim))

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        *,
        teacher_temp: float | Tensor,
        freeze_last_layer: bool,
    ) -> LossOutput:
        """Loss of ``global_crops`` [2B, C, H, W] and ``local_crops`` [N*B, C, h, w], both view-major.

        While the last layer is frozen its gradient is not even computed: no gradient means no optimizer step
        for it."""
        with torch.no_grad():
            teacher_z, teacher_weight = self.teacher([global_crops])  # [2B, D], [K, D]
        views = [global_crops] if local_crops is None else [global_crops, local_crops]
        student_z, student_weight = self.student(views)  # [V*B, D], [K, D]
        return LossOutput(
            *prototype_loss(
                student_z,
                student_weight.detach() if freeze_last_layer else student_weight,
                teacher_z,
                teacher_weight,
                self.center,
                student_temp=self.student_temp,
                teacher_temp=teacher_temp,
            )
        )

    @torch.no_grad()
    def update_center(self, batch_center: Tensor, skip: Tensor) -> None:
        """Equation 4: c <- m c + (1 - m) mean of the teacher's logits over the global batch; unless ``skip``
        [] bool.
        """
        moved = self.center.lerp(batch_center.to(self.center.dtype), 1.0 - self.center_momentum)
        self.center.copy_(torch.where(skip, self.center, moved))
