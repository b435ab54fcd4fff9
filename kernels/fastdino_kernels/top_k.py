"""The k largest of each row of a matrix that is never there as a whole: nearest neighbours of many queries.

The matrix comes block by block of columns, as the product of the queries with a part of the memory bank. Each
row keeps its k best so far; the C++ kernel compares 32 numbers at a time with the k-th best and touches its
list only where one of them is larger, which soon becomes rare: of N numbers in random order about
k (1 + ln(N / k)). Elsewhere (CUDA, or no compiled library) blocks are merged by torch's topk and sorts.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .backend import resolve
from .native import call, empty, int64, pointer, zeros

_SLACK = 32  # numbers that the kernel compares at a time
_MOST = (1 << 30) - _SLACK  # twice as many and the slack are an int of C
_LAST = 1 << 62  # column of what is not there yet: behind all others


class RunningTopK:
    """State for ``rows`` rows; equal numbers rank by ascending column, so the result is a function of the
    matrix, whatever the blocks.

    Memory: 16 k + 264 bytes per row with the C++ kernel, 12 k elsewhere. Columns of a row must be added in
    ascending order, numbers must be finite.
    """

    def __init__(self, rows: int, k: int, device: torch.device | str = "cpu") -> None:
        if not (isinstance(rows, int) and isinstance(k, int)) or rows < 1 or not 1 <= k <= _MOST:
            expected = f"whole numbers, at least 1, k at most {_MOST}"
            raise ValueError(f"rows, k: expected {expected}, got {rows!r} and {k!r}")
        self.rows, self.k, self.device = rows, k, torch.device(device)
        self.native = resolve(torch.empty(0, device=self.device)) == "cpu"
        self.seen = zeros(rows, dtype=torch.int64)  # columns so far
        if self.native:
            self.room = 2 * k + _SLACK
            self.keys = empty(rows, self.room, dtype=torch.int64)
            self.counts = zeros(rows, dtype=torch.int32)
            self.thresholds = torch.full((rows,), -torch.inf, dtype=torch.float32, device="cpu")
        else:
            self.values = torch.full((rows, k), -torch.inf, device=self.device)
            self.columns = torch.full((rows, k), _LAST, device=self.device)

    def add(self, scores: Tensor, column: int, row: int = 0) -> None:
        """A block of the matrix: fp32 [r, c], whose first element is in ``row`` and ``column``."""
        if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.layout is not torch.strided:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"scores: expected a dense tensor [r, c], got {got}")
        r, c = scores.shape
        here = scores.device.type == self.device.type
        if scores.dtype != torch.float32 or not here or (c > 1 and scores.stride(1) != 1):
            raise ValueError(
                f"scores: expected float32 on {self.device} with contiguous rows, got {scores.dtype} on "
                f"{scores.device} with strides {scores.stride()}"
            )
        if row < 0 or row + r > self.rows:
            raise ValueError(f"row: expected {r} rows inside {self.rows}, got {row}")
        if column < 0 or column + c >= 1 << 32:
            raise ValueError(f"column: expected numbers below 2**32, got {column} to {column + c}")
        rows = slice(row, row + r)
        self.seen[rows] += c
        if self.native:
            call(
                "fdk_top_k_add",
                pointer(scores),
                *int64(r, c, scores.stride(0), column),
                *(ctypes.c_int(self.k), ctypes.c_int(self.room)),
                *(pointer(x[rows]) for x in (self.keys, self.counts, self.thresholds)),
            )
            return
        values, columns = _largest(scores, self.k)
        values = torch.cat([self.values[rows], values], dim=1)
        columns, order = torch.cat([self.columns[rows], columns + column], dim=1).sort(dim=1)
        values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        self.values[rows] = values[:, : self.k]
        self.columns[rows] = columns.gather(1, best)[:, : self.k]

    def best(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows ``start`` to ``stop``: the largest numbers, descending, fp32 [r, k'], and their columns, int64
        [r, k']; k' is k, or the fewest columns that one of the rows has had.
        """
        rows = slice(start, self.rows if stop is None else stop)
        seen = self.seen[rows]
        if not len(seen) or not int(seen.min()):
            raise ValueError(f"best: rows {start} to {rows.stop} of {self.rows} have had no numbers yet")
        wanted = min(self.k, int(seen.min()))
        if not self.native:
            return self.values[rows, :wanted], self.columns[rows, :wanted]
        values = empty(len(seen), wanted)
        columns = empty(len(seen), wanted, dtype=torch.int64)
        call(
            "fdk_top_k_finish",
            *int64(len(seen), wanted),
            ctypes.c_int(self.room),
            *(pointer(x[rows]) for x in (self.keys, self.counts)),
            *(pointer(x) for x in (values, columns)),
        )
        return values, columns


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row and their columns, in any order; among equal values the lower columns."""
    if values.shape[1] <= k:
        return values, torch.arange(values.shape[1], device=values.device).expand_as(values)
    top, index = values.topk(k + 1, dim=1)
    # topk takes any of the values that equal the k-th; where one is left over, a stable sort decides instead
    tied = torch.nonzero(top[:, k - 1] == top[:, k])[:, 0]
    if len(tied):
        index[tied, :k] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return top[:, :k], index[:, :k]
