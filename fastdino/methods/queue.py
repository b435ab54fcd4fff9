"""Embeddings of earlier batches, the same on every process, as buffers that checkpoints hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdino.engine import parallel


class Queue(nn.Module):
    """A ring of ``length`` columns [D, length]; each update overwrites the oldest with the step's rows of all
    processes: micro-batch by micro-batch, in each of them process by process.
    """

    columns: Tensor
    ptr: Tensor

    def __init__(self, start: Tensor):
        super().__init__()
        self.register_buffer("columns", start)
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.int64))  # where the next column goes
        self.pending: list[Tensor] = []

    @property
    def full(self) -> Tensor:
        """[] bool: the last column has been written, in a queue that began as zeros."""
        return (self.columns[:, -1] != 0).any()

    def add(self, rows: Tensor) -> None:
        """Rows [n, D] of a micro-batch, for the next :meth:`update`."""
        self.pending.append(rows.detach())

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """Write what was added since the last one, unless ``skip`` [] bool; forget it in any case."""
        parts, self.pending = self.pending, []
        if not parts:  # of a step that was abandoned before its first micro-batch
            return
        new = torch.cat([parallel.gather(part) for part in parts]).T.to(self.columns.dtype)
        length = self.columns.shape[1]
        where = (self.ptr + torch.arange(new.shape[1], device=new.device)) % length
        self.columns.index_copy_(1, where, torch.where(skip, self.columns[:, where], new))
        self.ptr.copy_(torch.where(skip, self.ptr, (self.ptr + new.shape[1]) % length))
