"""The step as CUDA graphs: recorded once, then replayed, two launches instead of thousands.

A small model on a fast GPU waits for its launches. Two graphs, one of a micro-batch's forward and backward
pass and one of the update, serve any number of micro-batches; the reduction over processes runs between them
as it is. What a graph reads lies at fixed addresses: crops, schedule values, gradients. When the last layer
begins to be trained the graphs are recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastdino.data.loader import Crops
from fastdino.engine.metrics import Clock
from fastdino.engine.schedules import Hyper
from fastdino.engine.step import TrainStep

WARM_UP = 3  # eager steps before recording: they make optimizer states, workspaces and compiled code


class GraphStep(TrainStep):
    """:class:`TrainStep` on a GPU, replayed after ``WARM_UP`` steps, and again after as many from when the
    last layer begins to be trained. Crops must not change shape, nor optimizer states their place.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # Recording is refused on the default stream, and must find its warm-up on the same stream.
        self.stream = torch.cuda.Stream(self.sums.device)
        self.frozen: bool | None = None
        self.steps = 0  # since the last layer began, or ceased, to be frozen
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.static: Crops | None = None
        self.may_abandon = False

    def enqueue(self, batches: Iterator[Crops], hyper: Hyper, stop: Callable[[], bool] = bool) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            super().enqueue(batches, hyper, stop)
        torch.cuda.current_stream().wait_stream(self.stream)

    @property
    def recorded(self) -> bool:
        """Whether this step replays graphs, or records them."""
        return self.steps > WARM_UP

    def begin(self, frozen: bool) -> None:
        if frozen != self.frozen:
            self.frozen, self.steps, self.graphs = frozen, 0, {}
        self.steps += 1
        super().begin(frozen)

    def zero_grad(self) -> None:
        if self.recorded:
            torch._foreach_zero_([p.grad for p in self.updater.parameters if p.grad is not None])
        else:
            super().zero_grad()

    def micro_batch(
        self, crops: Crops, frozen: bool, last: bool, clock: Clock, stop: Callable[[], bool] = bool
    ) -> bool:
        if not self.recorded:
            return super().micro_batch(crops, frozen, last=False, clock=clock, stop=stop)
        self._stage(crops)
        static = self.static
        assert static is not None
        self._replay("micro-batch", lambda: self.backward(*self.forward(static, frozen)))
        clock.lap("forward")  # and backward
        return True

    def update(self) -> None:
        if self.recorded:
            self._replay("update", super().update)
        else:
            super().update()

    def _stage(self, crops: Crops) -> None:
        """Copy the crops to where the graph reads them."""
        if self.static is None:
            local = None if crops.local is None else torch.empty_like(crops.local)
            self.static = Crops(torch.empty_like(crops.global_), local, crops.ids)
        for target, source in ((self.static.global_, crops.global_), (self.static.local, crops.local)):
            if target is not None and source is not None:
                if target.shape != source.shape:
                    raise ValueError(f"--cuda_graph: expected crops {[*target.shape]}, got {[*source.shape]}")
                target.copy_(source, non_blocking=True)

    def _replay(self, name: str, body: Callable[[], None]) -> None:
        if name not in self.graphs:
            self.graphs[name] = record(body, self.stream)
        self.graphs[name].replay()


def record(body: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """The work that ``body`` gives the GPU, recorded and not done."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, of the data loader or of NCCL, may call CUDA meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        body()
    return graph
