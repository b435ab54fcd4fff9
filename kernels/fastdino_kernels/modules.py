"""Drop-in modules: the classes of other code bases, on the fused losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .dino_loss import dino_loss


class DINOLoss(nn.Module):
    """The official ``DINOLoss``: same constructor, forward and state dict; one changed import line uses it.

    ``forward(student_output, teacher_output, epoch)`` takes the logits of all crops [ncrops * B, K] and of
    the two global crops [2 * B, K], returns the loss, then moves ``center`` [1, K] towards the mean of the
    teacher's logits over all processes. The teacher's temperature rises linearly over the first epochs.
    """

    center: Tensor

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
        rise = (teacher_temp - warmup_teacher_temp) / max(1, warmup_teacher_temp_epochs - 1)
        warmup = [warmup_teacher_temp + i * rise for i in range(warmup_teacher_temp_epochs)]
        self.teacher_temp_schedule = warmup + [teacher_temp] * (nepochs - warmup_teacher_temp_epochs)

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        if len(student_output) * 2 != len(teacher_output) * self.ncrops:
            expected = f"ncrops * B = {self.ncrops} * {len(teacher_output) / 2:g}"
            raise ValueError(f"student_output: expected {expected} rows, got {len(student_output)}")
        out = dino_loss(
            student_output,
            teacher_output.detach(),
            self.center[0],
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp_schedule[epoch],
        )
        self._move_center(out.batch_center)
        return out.loss

    @torch.no_grad()
    def _move_center(self, batch_center: Tensor) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(batch_center)
            batch_center /= dist.get_world_size()
        m = self.center_momentum
        self.center = self.center * m + batch_center.to(self.center.dtype) * (1 - m)
