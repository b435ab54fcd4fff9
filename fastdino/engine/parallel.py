"""Processes: torchrun's environment, collectives that are no-ops in a single process, gradient averaging."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_BUCKET = 8 * 1024 * 1024  # elements per all-reduce: enough for bandwidth, yet the copy stays small


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size`` on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start(device: str = "auto") -> World:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs), or be the only one.

    Raises ValueError when ``device`` is cuda and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30)
        )
    return World(dist.get_rank() if size > 1 else 0, size, place)


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


def mean_(tensor: torch.Tensor) -> torch.Tensor:
    """Average ``tensor`` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on any process."""
    return float(mean_(torch.tensor(float(flag), device=device))) > 0.0


def broadcast_object(value: object) -> object:
    """Rank 0's picklable ``value`` on every process (only between processes of one job)."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average the gradients over all processes; every process must hold gradients for the same parameters."""
    if not dist.is_initialized():
        return
    bucket: list[torch.Tensor] = []
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= _BUCKET:
            _average(bucket)
            bucket = []
    if bucket:
        _average(bucket)


def _average(gradients: list[torch.Tensor]) -> None:
    flat = mean_(torch.cat([g.reshape(-1) for g in gradients]))
    pieces = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
