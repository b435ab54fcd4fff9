"""This process's rows of tensors that FSDP has sharded over processes, by rows, in equal chunks; a plain
tensor is its own rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdino.engine import parallel
from fastdino.engine.checkpoint import Piece

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    return type(x).__name__ == "DTensor"  # importing the class takes a second, which few runs need


def local(x: Tensor) -> Tensor:
    """The rows of ``x`` here: a view of the same memory, without history."""
    return x.to_local().detach() if is_sharded(x) else x


def span(x: Tensor) -> tuple[int, int]:
    """``(first, number)`` of the rows of ``x`` here."""
    if not is_sharded(x):
        return 0, x.shape[0]
    dim = _shard_dim(x)
    size, rank = x.device_mesh.size(dim), x.device_mesh.get_local_rank(dim)
    chunk = -(-x.shape[0] // size)
    start = min(rank * chunk, x.shape[0])
    return start, min(chunk, x.shape[0] - start)


def rows_like(whole: Tensor, like: Tensor) -> Tensor:
    """Those rows of a whole tensor that are here of ``like``."""
    if not is_sharded(like):
        return whole
    start, number = span(like)
    return whole[start : start + number]


def piece(x: Tensor, like: Tensor) -> Tensor | Piece:
    """``x``, the rows here of a tensor sharded as ``like`` is, as a checkpoint takes it."""
    if not is_sharded(like):
        return x
    return Piece(local(x), span(like)[0], like.shape[0])


def shard_group(module: nn.Module) -> dist.ProcessGroup | None:
    """The processes that together hold all rows of a module's parameters; None if they are not sharded."""
    for x in module.parameters():
        if is_sharded(x):
            return x.device_mesh.get_group(_shard_dim(x))
    return None


def writer(module: nn.Module) -> tuple[int | None, int]:
    """``(number of this process among those that save the module, how many they are)``: the first replica's
    processes, None on all others.
    """
    for x in module.parameters():
        if is_sharded(x):
            shard, mesh = _shard_dim(x), x.device_mesh
            others = (mesh.get_local_rank(dim) for dim in range(mesh.ndim) if dim != shard)
            return (None if any(others) else mesh.get_local_rank(shard)), mesh.size(shard)
    return (0 if parallel.rank() == 0 else None), 1


def sum_over(group: dist.ProcessGroup | None, x: Tensor) -> Tensor:
    """``x`` added up over the processes of ``group``, in place."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


@torch.no_grad()
def assign(target: Tensor, whole: Tensor) -> None:
    """Set the rows here of ``target`` from a whole tensor."""
    local(target).copy_(rows_like(whole, target))


def _shard_dim(x: DTensor) -> int:
    """Dimension of the mesh along which the rows are dealt."""
    (dim,) = [i for i, placement in enumerate(x.placements) if placement.is_shard(0)]
    return dim
