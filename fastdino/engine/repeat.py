"""A step computed twice must give the same bits.

Memory and arithmetic units that fail silently leave finite, plausible numbers, which no test for NaN sees.
From the same crops, weights and random numbers a CPU computes the same gradients, bit by bit, so that a
difference is a fault of the machine (or of a kernel, which is as bad).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch
from torch import Tensor

from fastdino.data.loader import Crops


class UnequalError(ArithmeticError):
    """One step, computed twice, gave different numbers."""


def kept(batches: Iterator[Crops], number: int) -> list[Crops]:
    """The next ``number`` of ``batches``, in memory of their own: the loader fills its own again."""
    copies = []
    for _ in range(number):
        crops = next(batches)
        local = None if crops.local is None else crops.local.clone()
        copies.append(Crops(crops.global_.clone(), local, crops.ids))
    return copies


def compare(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Raises UnequalError naming the first tensor that differs in a bit."""
    for name in first.keys() | second.keys():
        if name not in first or name not in second:
            raise UnequalError(f"of two equal computations one gave no gradient of {name}")
    for name, one in first.items():
        other = second[name]
        if torch.equal(_bits(one), _bits(other)):
            continue
        differ = (_bits(one) != _bits(other)).view(one.numel(), -1).any(dim=1)
        where = int(differ.nonzero()[0])
        values = [x.flatten()[where].item() for x in (one, other)]
        raise UnequalError(
            f"two equal computations gave different numbers: {int(differ.sum())} of {one.numel()} of {name}, "
            f"first {values[0]!r} and then {values[1]!r} at {where}. Memory or arithmetic of the machine "
            f"{platform.node()} is not to be trusted. Nothing was changed by this step; the same command "
            "continues from the newest checkpoint, best on another machine"
        )


def _bits(values: Tensor) -> Tensor:
    """Bytes, in which a NaN equals itself."""
    return values.detach().contiguous().view(-1).view(torch.uint8)
