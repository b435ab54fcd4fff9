"""Schedules as pure functions of the optimizer step: nothing to save, nothing to rebuild on resume.

They reproduce the official ``cosine_scheduler`` (linear warm-up from 0, both ends of the warm-up included,
then a half cosine) and the per-epoch teacher temperature of the official ``DINOLoss``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdino.config import Config


def cosine(step: int, *, base: float, final: float, total: int, warmup: int = 0) -> float:
    """Value at ``step`` of a linear warm-up from 0 to ``base`` over ``warmup`` steps followed by a cosine to
    ``final``.

    Steps at or beyond ``total`` give the value of the last scheduled step.
    """
    step = min(step, total - 1)
    if step < warmup:
        return base * step / (warmup - 1) if warmup > 1 else 0.0
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def teacher_temperature(epoch: int, *, warmup_value: float, value: float, warmup_epochs: int) -> float:
    """Teacher temperature of ``epoch``: linear from ``warmup_value`` to ``value`` over ``warmup_epochs``,
    then constant.
    """
    if epoch >= warmup_epochs:
        return value
    if warmup_epochs == 1:
        return warmup_value
    return warmup_value + (value - warmup_value) * epoch / (warmup_epochs - 1)


@dataclass(frozen=True)
class Hyper:
    """Everything that changes from step to step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    freeze_last_layer: bool
    use_queue: bool = True


@dataclass(frozen=True)
class Schedule:
    """Maps an optimizer step to its :class:`Hyper`."""

    config: Config
    steps_per_epoch: int
    global_batch: int

    @property
    def total_steps(self) -> int:
        return self.config.optim.epochs * self.steps_per_epoch

    def __call__(self, step: int) -> Hyper:
        optim, loss = self.config.optim, self.config.loss
        epoch = step // self.steps_per_epoch
        return Hyper(
            lr=cosine(
                step,
                base=optim.lr * self.global_batch / 256.0,
                final=optim.min_lr,
                total=self.total_steps,
                warmup=optim.warmup_epochs * self.steps_per_epoch,
            ),
            weight_decay=cosine(
                step, base=optim.weight_decay, final=optim.weight_decay_end, total=self.total_steps
            ),
            momentum=self._momentum(step),
            teacher_temp=teacher_temperature(
                epoch,
                warmup_value=loss.warmup_teacher_temp,
                value=loss.teacher_temp,
                warmup_epochs=loss.warmup_teacher_temp_epochs,
            ),
            freeze_last_layer=epoch < optim.freeze_last_layer,
            use_queue=epoch >= self.config.method.epoch_queue_starts,
        )

    def _momentum(self, step: int) -> float:
        """Of the update at the end of ``step``. A teacher that is the student of the last epoch moves in that
        epoch's last step alone; one that is the student before this step is not moved by momentum at all.
        """
        follows = self.config.method.teacher
        if follows == "ema":
            return cosine(step, base=self.config.loss.momentum_teacher, final=1.0, total=self.total_steps)
        moves = follows == "copy" or (follows == "prev_epoch" and (step + 1) % self.steps_per_epoch == 0)
        return 0.0 if moves else 1.0
