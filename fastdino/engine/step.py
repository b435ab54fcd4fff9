"""One optimizer step as device code: nothing here waits for the device or branches on what it computed.

Forward and backward of every micro-batch, one reduction over processes, one update. EMA, center, queue and
schedules move once per optimizer step, however many micro-batches it accumulates. A step with a loss, center
or gradient that is not finite on any process changes no byte of student, teacher, optimizer and method;
that, too, is decided on the device, and the host reads of it in the rows of :class:`~.metrics.Ring`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from fastdino_kernels import grad_square_sums
from torch import Tensor, nn

from fastdino.data.decoding import TooManyUnreadable
from fastdino.data.loader import Crops
from fastdino.engine import parallel, repeat, rows
from fastdino.engine.metrics import Clock, Ring, StepResult
from fastdino.engine.optim import Updater
from fastdino.engine.schedules import Hyper
from fastdino.methods import Method
from fastdino.methods.queue import Queue


class Scalars:
    """The numbers that change from step to step, in one tensor on the device, uploaded by one copy."""

    def __init__(self, device: torch.device):
        self.values = torch.zeros(5, dtype=torch.float64, device=device)
        self.lr, self.weight_decay, self.momentum, self.teacher_temp, self.use_queue = self.values.unbind()

    def set(self, hyper: Hyper) -> None:
        numbers = (hyper.lr, hyper.weight_decay, hyper.momentum, hyper.teacher_temp, hyper.use_queue)
        host = torch.tensor(numbers, dtype=torch.float64, pin_memory=self.values.is_cuda)
        self.values.copy_(host, non_blocking=True)


class Scaler:
    """Dynamic loss scaling for fp16 on the device (growth 2 after 2000 good steps, halved by a bad one, as
    torch.amp.GradScaler).
    """

    def __init__(self, device: torch.device, enabled: bool, scale: float = 2.0**16):
        self.enabled = enabled
        self.scale = torch.tensor(scale if enabled else 1.0, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor, undone: Tensor) -> None:
        """``overflow`` [] bool: a gradient was not finite; ``undone`` [] bool: the step did not happen."""
        if self.enabled:
            before = self.scale.clone(), self.good_steps.clone()
            torch._amp_update_scale_(self.scale, self.good_steps, overflow.float(), 2.0, 0.5, 2000)
            self.scale.copy_(torch.where(undone, before[0], self.scale.clamp(min=1.0)))
            self.good_steps.copy_(torch.where(undone, before[1], self.good_steps))

    def state(self) -> dict[str, float] | None:
        """None where nothing is scaled."""
        return {"scale": float(self.scale), "good_steps": int(self.good_steps)} if self.enabled else None

    def load_state(self, state: dict[str, float] | None) -> None:
        """A run that did not scale before begins as a new one."""
        if self.enabled and state is not None:
            self.scale.fill_(state["scale"])
            self.good_steps.fill_(int(state["good_steps"]))


class TrainStep:
    """Trains ``method`` through ``updater`` on one global batch per call.

    ``dtype`` is the compute type: GEMMs run in it; parameters, statistics and the update stay in fp32.
    ``accumulate`` is the number of micro-batches of a step. ``reducer`` adds up the gradients of all
    processes (none: one process, or FSDP, which averages them itself).
    """

    def __init__(
        self,
        method: Method,
        updater: Updater,
        *,
        dtype: torch.dtype,
        accumulate: int = 1,
        reducer: parallel.GradientBuckets | None = None,
        scaler: Scaler | None = None,
    ):
        self.method, self.updater, self.dtype, self.accumulate = method, updater, dtype, accumulate
        self.reducer = reducer
        device = updater.parameters[0].device
        self.scalars = Scalars(device)
        self.scaler = scaler or Scaler(device, enabled=dtype == torch.float16)
        self.center = dict(method.named_buffers()).get("center")
        measured = ("grad_norm",) if self.center is None else ("grad_norm", "center_norm")
        self.ring = Ring(device, (*method.signs, *measured))
        # [statistics, loss, signs, seconds of each process, stop], sums over micro-batches and processes
        size = parallel.size()
        self.sums = torch.zeros(method.statistics_size + len(method.signs) + size + 2, device=device)
        self.row = torch.zeros(len(self.ring.signs) + size + 4, device=device)
        self.loss = self.sums[method.statistics_size]
        self.worked = self.sums[parallel.rank() - size - 1]
        self.parts = accumulate * size
        self.beat: Callable[[str], None] = lambda phase: None  # told of the phase that begins
        self.twice = False  # compute the coming step twice and compare
        self.no_data: TooManyUnreadable | None = None  # why there are no more batches
        # A skipped step must not show in the running statistics either.
        norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [(b, b.clone()) for m in norms for b in m.buffers()]
        # Collectives inside of forward and backward must be the same on every process: no way out in between.
        alone = parallel.size() == 1 or not method.communicates
        alone = alone and not any(isinstance(m, nn.SyncBatchNorm) for m in norms)
        self.may_abandon = alone and not updater.sharded

    def run(self, batches: Iterator[Crops], hyper: Hyper, stop: Callable[[], bool] = bool) -> StepResult:
        """:meth:`enqueue`, then wait for its result."""
        self.enqueue(batches, hyper, stop)
        return list(self.ring.take(every=True))[-1]

    def enqueue(self, batches: Iterator[Crops], hyper: Hyper, stop: Callable[[], bool] = bool) -> None:
        """Train on the next ``accumulate`` of ``batches``, this process's part of the global batch.

        ``stop`` is asked before each forward and backward pass; once it is true on any process, the step
        changes nothing on all of them and its result says so. So it does where too many images cannot be read
        (``no_data``), unless the processes must all go through the same passes: then that is raised.

        Raises UnequalError, with nothing changed, if the step is computed ``twice`` with different results.
        """
        clock = Clock(self.sums.device)
        self.scalars.set(hyper)
        frozen = hyper.freeze_last_layer
        self.begin(frozen)
        try:
            stopped = self.no_data is not None or self.compute(batches, frozen, clock, stop)
        except TooManyUnreadable as error:
            if not self.may_abandon:
                raise
            self.no_data, stopped = error, True
        if stopped or stop():
            self.sums[-1].fill_(1.0)
        self.worked.fill_(self.ring.worked * self.parts)
        self.loss += self.taint()
        self.beat("reduction")
        self.reduce()
        self.beat("update")
        self.update()
        clock.lap("update")
        self.ring.push(self.row, clock)

    def compute(self, batches: Iterator[Crops], frozen: bool, clock: Clock, stop: Callable[[], bool]) -> bool:
        """:meth:`passes`, or them ``twice`` and a comparison."""
        if not self.twice:
            return self.passes(batches, frozen, clock, stop)
        crops = repeat.kept(batches, self.accumulate)
        first = self.rehearse(crops, frozen, clock, stop)
        stopped = self.passes(iter(crops), frozen, clock, stop)
        if not stopped:
            repeat.compare(first, self.computed())
        return stopped

    def passes(
        self,
        batches: Iterator[Crops],
        frozen: bool,
        clock: Clock,
        stop: Callable[[], bool],
        *,
        overlap: bool = True,
    ) -> bool:
        """Forward and backward of every micro-batch; True when ``stop`` came in between. The reduction over
        processes begins in the last backward pass, with ``overlap``.
        """
        for i in range(self.accumulate):
            self.beat("data")
            crops = next(batches)
            clock.lap("data")
            self.beat("forward")
            last = overlap and i + 1 == self.accumulate
            if (self.may_abandon and stop()) or not self.micro_batch(crops, frozen, last, clock, stop):
                return True
        return False

    def rehearse(
        self, crops: list[Crops], frozen: bool, clock: Clock, stop: Callable[[], bool]
    ) -> dict[str, Tensor]:
        """What :meth:`passes` computes of ``crops``; afterwards everything is as before it."""
        with torch.random.fork_rng(devices=()):
            self.passes(iter(crops), frozen, clock, stop, overlap=self.updater.sharded)
        first = self.computed()
        for statistic, before in self.statistics:
            statistic.copy_(before)
        for queue in (m for m in self.method.modules() if isinstance(m, Queue)):
            queue.pending.clear()
        self.begin(frozen)
        return first

    def computed(self) -> dict[str, Tensor]:
        """Gradients of the passes by parameter name, before any reduction of ours, and loss and signs."""
        grads = [(self.updater.names[p], p.grad) for p in self.updater.parameters]
        return {name: rows.local(g) for name, g in grads if g is not None} | {"loss": self.sums.clone()}

    def begin(self, frozen: bool) -> None:
        """Forget the gradients of the step before."""
        self.zero_grad()
        self.sums.zero_()
        for statistic, before in self.statistics:
            before.copy_(statistic)
        if self.reducer is not None:
            self.reducer.begin(without=self.updater.last_layer if frozen else ())

    def zero_grad(self) -> None:
        self.updater.zero_grad()

    def micro_batch(
        self, crops: Crops, frozen: bool, last: bool, clock: Clock, stop: Callable[[], bool] = bool
    ) -> bool:
        """Forward and backward pass of one micro-batch; False when ``stop`` came in between."""
        out = self.forward(crops, frozen)
        clock.lap("forward")
        if self.may_abandon and stop():
            return False
        if self.reducer is not None:
            self.reducer.overlap = last
        self.updater.set_sync(last)
        self.beat("backward")
        self.backward(*out)
        clock.lap("backward")
        return True

    def forward(self, crops: Crops, frozen: bool) -> tuple[Tensor, Tensor]:
        """The loss, to be differentiated, and the micro-batch's part of the first numbers of ``sums``."""
        with torch.autocast(self.sums.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            out = self.method(
                crops.global_,
                crops.local,
                teacher_temp=self.scalars.teacher_temp,
                freeze_last_layer=frozen,
                use_queue=self.scalars.use_queue,
            )
        signs = [out.signs[name] for name in self.method.signs]
        numbers = [x.detach().float() for x in (out.loss, *signs)]
        return out.loss, torch.cat([out.statistics.float(), torch.stack(numbers)])

    def backward(self, loss: Tensor, summand: Tensor) -> None:
        (loss * self.scaler.scale if self.scaler.enabled else loss).backward()
        self.sums[: len(summand)] += summand

    def taint(self) -> Tensor:
        """[] fp32: 0, but NaN if what earlier steps left besides the weights is not finite: center, queue,
        running statistics, moments. Finite batches cannot make it so, broken memory can, and it need not show
        in the loss before it is in the weights.
        """
        kept = [x for x in (*self.method.buffers(), *self.updater.moments()) if x.is_floating_point()]
        squares = grad_square_sums(kept) if kept else self.loss  # in double: none overflows
        return (0.0 * squares.sum()).to(self.loss)

    def reduce(self) -> None:
        """Add up over processes; the gradients first, as backward has begun to."""
        if self.reducer is not None:
            self.reducer.launch()
        self.beat("exchange")  # who hangs before this is missed by the others, who wait in it
        if self.reducer is not None:
            self.reducer.finish()
        parallel.sum_(self.sums)

    def update(self) -> None:
        """Student, optimizer, teacher, method and loss scale, unless anything is not finite; the row."""
        parts = self.parts
        means = self.sums / parts
        stopped = self.sums[-1] > 0
        refused = stopped | ~torch.isfinite(means).all()
        # what one process has not averaged over, the update divides by
        parts = parts if self.reducer is not None else self.accumulate
        scale = self.scaler.scale * parts if self.scaler.enabled else float(parts)
        found_inf = self.updater.step(self.scalars, grad_scale=scale, skip=refused)
        skipped = refused | found_inf
        size = self.method.statistics_size
        self.method.update(means[:size], skipped)
        for statistic, before in self.statistics:
            statistic.copy_(torch.where(skipped, before, statistic))
        self.scaler.update(skipped, stopped)
        signs, worked = means[size:-1].split([1 + len(self.method.signs), parallel.size()])
        norms = [self.updater.grad_norm.float()]
        norms += [] if self.center is None else [torch.linalg.vector_norm(self.center)]
        flags = torch.stack([skipped.float(), stopped.float(), self.scaler.scale])
        self.row.copy_(torch.cat([signs, torch.stack(norms), worked, flags]))
