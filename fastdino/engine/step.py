"""One optimizer step: forward and backward of every micro-batch, one reduction over processes, one update.

EMA, center and schedules move once per optimizer step, however many micro-batches it accumulates. A step with
a loss, center or gradient that is not finite on any process changes no byte of student, teacher, center or
optimizer anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdino.data.loader import Crops
from fastdino.engine import parallel
from fastdino.engine.optim import Updater
from fastdino.engine.schedules import Hyper
from fastdino.methods.dino import DINO


@dataclass
class Scaler:
    """Dynamic loss scaling for fp16 (growth 2 after 2000 good steps, halved by a bad one, as
    torch.amp.GradScaler).
    """

    enabled: bool
    scale: float = 2.0**16
    good_steps: int = 0

    def value(self) -> float:
        return self.scale if self.enabled else 1.0

    def update(self, skipped: bool) -> None:
        self.good_steps = 0 if skipped else self.good_steps + 1
        if skipped:
            self.scale = max(self.scale * 0.5, 1.0)
        elif self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2.0, 0


@dataclass
class StepResult:
    """Means over the global batch, in nats, and seconds per phase. ``stop``: a process asked to stop, the
    step was abandoned.
    """

    loss: float
    teacher_entropy: float
    kl: float
    skipped: bool
    stop: bool
    seconds: dict[str, float] = field(default_factory=dict)


class Clock:
    """Seconds per phase of a step; ``exact`` waits for a GPU at each phase's end, so only some steps should
    be exact.
    """

    def __init__(self, device: torch.device, exact: bool = True):
        self.wait = exact and device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.wait:
            torch.cuda.current_stream().synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def train_step(
    method: DINO,
    updater: Updater,
    batches: Iterator[Crops],
    hyper: Hyper,
    *,
    accumulate: int = 1,
    dtype: torch.dtype,
    scaler: Scaler,
    stop: Callable[[], bool] = bool,
    clock: Clock | None = None,
) -> StepResult:
    """Train on the next ``accumulate`` of ``batches`` (this process's part of the global batch); move teacher
    and center once.

    ``dtype`` is the compute type: GEMMs run in it, parameters, statistics and the update stay in fp32.
    ``stop`` is asked before each forward and backward pass; once it is true on any process, the step is
    abandoned on all and nothing has changed.
    """
    device = method.center.device
    clock = clock or Clock(device)
    share = 1.0 / accumulate
    updater.zero_grad()
    sums = torch.zeros(
        method.center.numel() + 4, device=device
    )  # [batch center (K), loss, entropy, KL, stop]
    for _ in range(accumulate):
        crops = next(batches)
        clock.lap("data")
        if stop():
            break
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = method(
                crops.global_,
                crops.local,
                teacher_temp=hyper.teacher_temp,
                freeze_last_layer=hyper.freeze_last_layer,
            )
        clock.lap("forward")
        if stop():
            break
        (out.loss * (share * scaler.value())).backward()
        clock.lap("backward")
        sums += share * _row(out.batch_center, out.loss, out.teacher_entropy, out.kl)
    sums[-1] = float(stop())
    parallel.mean_(sums)
    if float(sums[-1]) > 0.0:
        updater.zero_grad()
        return StepResult(math.nan, math.nan, math.nan, skipped=True, stop=True, seconds=clock.seconds)
    parallel.average_gradients(updater.parameters())
    finite = bool(torch.isfinite(sums).all())
    update = updater.step(hyper, grad_scale=scaler.value(), skip=not finite)
    if not update.skipped:
        method.update_center(sums[:-4])
    if scaler.enabled:
        scaler.update(update.skipped)
    loss, entropy, kl = sums[-4:-1].tolist()
    clock.lap("update")
    return StepResult(loss, entropy, kl, update.skipped, False, clock.seconds)


def _row(center: Tensor, *scalars: Tensor) -> Tensor:
    """``[center, scalars..., 0]`` in fp32."""
    tail = torch.stack(
        [s.detach().float() for s in scalars] + [scalars[0].new_zeros((), dtype=torch.float32)]
    )
    return torch.cat([center.float(), tail])
