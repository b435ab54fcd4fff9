"""solo-learn's DINO loss: ``from fastdino_kernels.adapters.solo_learn import DINOLoss``."""

from __future__ import annotations

from torch import Tensor

from .. import modules


class DINOLoss(modules.DINOLoss):
    """``solo.losses.dino.DINOLoss``: same constructor, ``epoch`` attribute, forward and state dict.

    ``forward(student_output, teacher_output)`` takes the logits of all views [num_large_crops * B, K] and of
    the first two [2 * B, K], view-major, at the temperature of the attribute ``epoch``, which the training
    loop sets; then it moves ``center`` [1, K].

    Raises: ValueError for row counts that do not fit ``num_large_crops``, IndexError for an epoch beyond
        ``num_epochs``.
    """

    _crops_argument = "num_large_crops"

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__(
            num_prototypes,
            num_large_crops,
            warmup_teacher_temp,
            teacher_temp,
            int(warmup_teacher_temp_epochs),
            num_epochs,
            student_temp,
            center_momentum,
        )
        self.epoch = 0
        self.num_large_crops = num_large_crops

    def forward(self, student_output: Tensor, teacher_output: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(student_output, teacher_output, self.epoch)
