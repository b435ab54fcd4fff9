"""lightly's DINO loss: ``from fastdino_kernels.adapters.lightly import DINOLoss``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..dino_loss import dino_loss
from ..modules import mean_over_processes
from ..soft_cross_entropy import soft_cross_entropy
from ..validate import check_no_grad, check_tensor


class DINOLoss(nn.Module):
    """``lightly.loss.DINOLoss``: same constructor, forward, ``update_center``, state dict (center [1, 1, K]).

    ``forward(teacher_out, student_out, teacher_temp=None, epoch=None)`` takes one tensor [B, K] of logits per
    view. View i of the teacher meets every view of the student but the i-th. The teacher's temperature is
    ``teacher_temp`` if given, else that of ``epoch`` in the warm-up if given, else the constructor's. Then
    the center moves towards the mean of the teacher's logits over all processes.

    Raises: ValueError for an unknown ``center_mode``, for unequal shapes, for a teacher that requires grad,
        and where no pair of different views remains; TypeError for anything but lists of floating-point
        tensors.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
    ) -> None:
        super().__init__()
        if center_mode != "mean":
            raise ValueError(f"center_mode: expected 'mean', got {center_mode!r}")
        self.teacher_temp = teacher_temp
        self.student_temp = student_temp
        self.register_buffer("center", torch.zeros(1, 1, output_dim))
        self.center_momentum = center_momentum
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs
        )

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | Tensor | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        self._check(teacher_out, student_out)
        temp = self._teacher_temp(teacher_temp, epoch)
        # A view of the center: its data is replaced below, the backward needs what it is now.
        center = self.center.view(-1)  # [K]
        if len(student_out) >= len(teacher_out):
            out = dino_loss(
                torch.cat(tuple(student_out)),  # [V*B, K]
                torch.cat(tuple(teacher_out)),  # [G*B, K]
                center,
                student_temp=self.student_temp,
                teacher_temp=temp,
                n_global=len(teacher_out),
            )
            loss, batch_center = out.loss, out.batch_center
        else:
            loss = self._loss_of_few(teacher_out, student_out, center, temp)
            batch_center = None
        if batch_center is not None and type(self).update_center is DINOLoss.update_center:
            self._move_center(batch_center)
        else:
            self.update_center(torch.stack(tuple(teacher_out)))
        return loss

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Move the center by the logits ``teacher_out`` [views, B, K]; ``forward`` does so by itself."""
        dtype = torch.promote_types(teacher_out.dtype, torch.float32)
        self._move_center(teacher_out.mean((0, 1), keepdim=True, dtype=dtype))

    @torch.no_grad()
    def _move_center(self, batch_center: Tensor) -> None:
        m = self.center_momentum
        self.center.data = self.center * m + mean_over_processes(batch_center).to(self.center.dtype) * (1 - m)

    def _loss_of_few(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        center: Tensor,
        temp: float | Tensor,
    ) -> Tensor:
        """The loss when the student sees fewer views than the teacher."""
        with torch.no_grad():
            targets = ((torch.stack(tuple(teacher_out)).float() - center) / temp).softmax(-1)  # [G, B, K]
            total = targets.sum(0)
        rows = [
            soft_cross_entropy(x, total - targets[v], temp=self.student_temp)
            for v, x in enumerate(student_out)
        ]
        return torch.stack(rows).mean() / (len(teacher_out) - 1)

    def _teacher_temp(self, teacher_temp: float | Tensor | None, epoch: int | None) -> float | Tensor:
        if isinstance(teacher_temp, Tensor):
            return teacher_temp
        if teacher_temp is not None:
            return float(teacher_temp)
        if epoch is not None and epoch < self.warmup_teacher_temp_epochs:
            return float(self.teacher_temp_schedule[epoch])
        return self.teacher_temp

    def _check(self, teacher_out: Sequence[Tensor], student_out: Sequence[Tensor]) -> None:
        views = {"teacher_out": teacher_out, "student_out": student_out}
        for name, tensors in views.items():
            if not isinstance(tensors, (list, tuple)):
                raise TypeError(
                    f"{name}: expected a list of tensors, one per view, got {type(tensors).__name__}"
                )
            if not tensors:
                raise ValueError(f"{name}: expected at least one view, got an empty list")
        if len(teacher_out) == len(student_out) == 1:
            raise ValueError("teacher_out, student_out: expected two different views, got one of each")
        check_tensor("teacher_out[0]", teacher_out[0], ("B", self.center.shape[-1]), like=self.center)
        for name, tensors in views.items():
            for i, x in enumerate(tensors):
                check_tensor(f"{name}[{i}]", x, tuple(teacher_out[0].shape), like=self.center)
        for i, x in enumerate(teacher_out):
            check_no_grad(f"teacher_out[{i}]", x)
