"""Processes: torchrun's environment, collectives that are no-ops in a single process, sums of gradients."""

from __future__ import annotations

import datetime
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 8 * 1024 * 1024  # elements per all-reduce: enough for bandwidth, few enough to start early
_store: dist.Store | None = None  # what the processes found each other by
_turns = 0


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size`` on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def device_of(choice: str) -> torch.device:
    """Of ``--device``; with several GPUs the one of this process.

    Raises ValueError when ``choice`` is cuda and there is none.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start(device: str = "auto") -> World:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs), or be the only one.

    Raises ValueError when ``device`` is cuda and there is none.
    """
    place, size = device_of(device), int(os.environ.get("WORLD_SIZE", "1"))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        _join(place)
    return World(dist.get_rank() if size > 1 else 0, size, place)


def _join(device: torch.device) -> None:
    global _store
    timeout = datetime.timedelta(minutes=30)
    found, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # Workers that torchrun restarted must not meet those before them: all share one key-value store, in which
    # the addresses of the dead ones still stand. Several nodes count their restarts differently; there the
    # launcher must not share its store (README).
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        found = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", found)
    _store = found
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=timeout,
        store=found,
        rank=rank,
        world_size=size,
        device_id=device if cuda else None,
    )


def stop() -> None:
    """Leave the process group; the barrier keeps a fast process from tearing down a slow one's
    connections.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def after_main() -> None:
    """Wait for what rank 0 does alone before it comes here, however long it takes (collectives give up after
    half an hour).
    """
    global _turns
    if _store is None:
        barrier()
        return
    _turns += 1
    if rank() == 0:
        _store.set(f"main {_turns}", "done")
    else:
        _store.wait([f"main {_turns}"], datetime.timedelta(days=30))


def another_store(name: str) -> dist.Store | None:
    """A connection of its own to the processes' key-value store, for another thread: an operation that waits
    holds up all others of its connection. Its keys are those of ``name`` alone. None in a single process.
    """
    if _store is None:
        return None
    store = dist.PrefixStore(name, _store.clone())  # type: ignore[attr-defined]  # missing in torch's stubs
    store.set_timeout(datetime.timedelta(seconds=5))
    return store


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_(tensor: Tensor) -> Tensor:
    """Add ``tensor`` up over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(rows: Tensor) -> Tensor:
    """Equal numbers of ``rows`` [n, ...] of all processes, one process after another, on each of them."""
    if size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on any process."""
    return float(sum_(torch.tensor(float(flag), device=device))) > 0.0


def broadcast_object(value: object) -> object:
    """Rank 0's picklable ``value`` on every process (only between processes of one job)."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class GradientBuckets:
    """Adds up the gradients of all processes, each bucket of them as soon as backward has filled it.

    Buckets are launched in a fixed order, that of backward, whatever the order in which hooks run, so that
    all processes issue the same collectives; a parameter that got no gradient counts as zero.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(reversed(parameters))  # about the order in which backward reaches them
        self.overlap = True  # launch from the hooks of backward: off before the last micro-batch
        self.begin(without=())
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def begin(self, without: Collection[nn.Parameter]) -> None:
        """A new step, in which the parameters ``without`` get no gradient on any process."""
        left_out = {id(p) for p in without}
        self.buckets: list[list[nn.Parameter]] = []
        elements = _BUCKET
        for parameter in self.parameters:
            if id(parameter) in left_out:
                continue
            if elements + parameter.numel() > _BUCKET:
                self.buckets.append([])
                elements = 0
            self.buckets[-1].append(parameter)
            elements += parameter.numel()
        self.bucket_of = {id(p): i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]
        self.running: list[tuple[Tensor, dist.Work]] = []

    def _ready(self, parameter: Tensor) -> None:
        if not self.overlap:
            return
        self.missing[self.bucket_of[id(parameter)]] -= 1
        while len(self.running) < len(self.buckets) and self.missing[len(self.running)] == 0:
            self._launch()

    def _launch(self) -> None:
        bucket = self.buckets[len(self.running)]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in grads])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.running.append((flat, work))

    def launch(self) -> None:
        """Launch what is left."""
        while len(self.running) < len(self.buckets):
            self._launch()

    def finish(self) -> None:
        """Wait, and put the sums where the gradients are."""
        self.launch()
        for bucket, (flat, work) in zip(self.buckets, self.running, strict=True):
            work.wait()
            parts = flat.split([p.numel() for p in bucket])
            sums = {p: part.view_as(p) for p, part in zip(bucket, parts, strict=True)}
            present = {p: p.grad for p in bucket if p.grad is not None}
            if present:
                torch._foreach_copy_(list(present.values()), [sums[p] for p in present])
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = sums[parameter]
