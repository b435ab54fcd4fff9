"""What the host learns of a step, and when: rows of numbers on their way from the device, and phase times."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepResult:
    """Means over the global batch, in nats where they are entropies, and seconds per phase.

    ``signs``: the method's signs of collapse, and norms, by name. ``skipped``: nothing changed, because
    something was not finite or because of ``stop``: a process asked to stop. ``scale``: the loss scale after
    the step.
    ``worked``: seconds that each process worked on an earlier step, without waiting for others.
    """

    loss: float
    signs: dict[str, float]
    skipped: bool
    stop: bool
    scale: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)
    worked: Sequence[float] = ()


class Clock:
    """Seconds per phase of a step; on a GPU between events of its stream; the host waits for none."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, phase: str) -> None:
        """The time since the last mark belongs to ``phase``."""
        self.marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Of every phase; on a GPU the last mark must have passed."""
        out: dict[str, float] = {}
        for (_, a), (phase, b) in zip(self.marks, self.marks[1:], strict=False):
            passed = a.elapsed_time(b) / 1e3 if self.cuda else b - a
            out[phase] = out.get(phase, 0.0) + passed
        return out


class Ring:
    """Rows of the newest steps. A row is read once ``lag`` newer ones are there, the oldest first.

    With a lag the host runs ahead of a GPU, but by no more than that, and all processes read the same rows
    after the same steps, so that they decide alike.
    """

    def __init__(self, device: torch.device, signs: Sequence[str], lag: int | None = None):
        self.signs = signs
        self.cuda = device.type == "cuda"
        self.lag = (2 if self.cuda else 0) if lag is None else lag
        self.rows: deque[tuple[Tensor, Any, Clock]] = deque()
        self.worked = 0.0  # seconds of the step read last before it met the other processes

    def push(self, row: Tensor, clock: Clock) -> None:
        """Send a row (loss, signs, worked, skipped, stop, scale) on its way."""
        host = torch.empty(row.shape, dtype=row.dtype, pin_memory=self.cuda)
        host.copy_(row, non_blocking=True)
        arrived = None
        if self.cuda:
            arrived = torch.cuda.Event(blocking=True)  # the host sleeps: its cores are the loader's
            arrived.record()
        self.rows.append((host, arrived, clock))

    def take(self, *, every: bool = False) -> Iterator[StepResult]:
        """The results that are due, or ``every`` one; waits for each."""
        while len(self.rows) > (0 if every else self.lag):
            host, arrived, clock = self.rows.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, *rest, skipped, stop, scale = host.tolist()
            signs, worked = rest[: len(self.signs)], rest[len(self.signs) :]
            named = dict(zip(self.signs, signs, strict=True))
            seconds = clock.seconds()
            self.worked = sum(seconds.values()) - seconds.get("update", 0.0)
            yield StepResult(loss, named, skipped > 0, stop > 0, scale, seconds, worked)


class Stragglers:
    """Names processes that are slower than the others, for which all of them wait, window by window of steps.

    Slow is a median of 1.2 times that of all processes and 20 ms more, in two windows in a row. Where forward
    itself exchanges tensors (sharded models, batch norm over processes), all of them look alike.
    """

    def __init__(self) -> None:
        self.steps: list[Sequence[float]] = []
        self.suspects: set[int] = set()
        self.named: set[int] = set()

    def add(self, worked: Sequence[float]) -> None:
        self.steps.append(worked)

    def take(self) -> list[tuple[int, float, float]]:
        """``(rank, its seconds, seconds of the others)`` of those not named yet; a new window begins."""
        steps, self.steps = self.steps, []
        if not steps or len(steps[0]) < 2:
            return []
        each = [statistics.median(times) for times in zip(*steps, strict=True)]
        usual = statistics.median_low(each)
        slow = {rank for rank, seconds in enumerate(each) if seconds > 1.2 * usual + 0.02}
        again, self.suspects = slow & self.suspects, slow
        new = sorted(again - self.named)
        self.named = (self.named | again) & slow
        return [(rank, each[rank], usual) for rank in new]
