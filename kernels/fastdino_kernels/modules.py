"""Drop-in modules: the classes of other code bases, on the fused losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .dino_loss import dino_loss


def teacher_temp_schedule(start: float, end: float, warmup_epochs: int, epochs: int) -> list[float]:
    """One temperature per epoch: evenly spaced from ``start`` to ``end`` in the warm-up, then ``end``."""
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(
            f"warmup_teacher_temp_epochs: expected 0 to {epochs} (all epochs), got {warmup_epochs}"
        )
    rise = (end - start) / max(1, warmup_epochs - 1)
    return [start + i * rise for i in range(warmup_epochs)] + [end] * (epochs - warmup_epochs)


def scheduled(schedule: list[float], epoch: int) -> float:
    if not -len(schedule) <= epoch < len(schedule):
        raise IndexError(f"epoch: expected 0 to {len(schedule) - 1}, got {epoch}")
    return schedule[epoch]


def mean_over_processes(x: Tensor) -> Tensor:
    """Mean of ``x`` over the default process group, in place; ``x`` itself where there is no group."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class DINOLoss(nn.Module):
    """The official ``DINOLoss``: same constructor, forward and state dict; one changed import line uses it.

    ``forward(student_output, teacher_output, epoch)`` takes the logits of all crops [ncrops * B, K] and of
    the two global crops [2 * B, K], returns the loss, then moves ``center`` [1, K] towards the mean of the
    teacher's logits over all processes. The teacher's temperature rises linearly over the first epochs.

    Raises: ValueError for row counts that do not fit ``ncrops``, IndexError for an epoch beyond ``nepochs``.
    """

    center: Tensor
    _crops_argument = "ncrops"

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_temp_schedule = teacher_temp_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        if len(student_output) * 2 != len(teacher_output) * self.ncrops:
            expected = f"{self._crops_argument} * B = {self.ncrops} * {len(teacher_output) / 2:g}"
            raise ValueError(f"student_output: expected {expected} rows, got {len(student_output)}")
        out = dino_loss(
            student_output,
            teacher_output.detach(),
            self.center[0],
            student_temp=self.student_temp,
            teacher_temp=scheduled(self.teacher_temp_schedule, epoch),
        )
        if type(self).update_center is DINOLoss.update_center:
            self._move_center(out.batch_center)  # already at hand: the logits need not be read again
        else:
            self.update_center(teacher_output)
        return out.loss

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Move the center by the logits ``teacher_output`` [rows, K]; ``forward`` does so by itself."""
        self._move_center(
            teacher_output.mean(0, dtype=torch.promote_types(teacher_output.dtype, torch.float32))
        )

    @torch.no_grad()
    def _move_center(self, batch_center: Tensor) -> None:
        m = self.center_momentum
        self.center = self.center * m + mean_over_processes(batch_center).to(self.center.dtype) * (1 - m)
