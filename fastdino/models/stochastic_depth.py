"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382) of crops packed in one matrix.

A residual branch is dropped for a crop with the block's rate ``p`` and otherwise scaled such that its
expectation is kept, in one of two forms. Up to ``SUBSET_ABOVE`` every crop draws for itself, all branches
are computed and multiplied with 0 or 1 / (1 - p). Above, ``round((1 - p) n)`` of a group's ``n`` crops are
kept, chosen at random, their branch is scaled with n / kept, and the others' is not computed: work and memory
shrink with p, which pays for gathering and adding rows only then. Both work on the device alone, with static
shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdino.models.attention import Groups, Packing, join, pack, split_groups

SUBSET_ABOVE = 0.1


class Kept(NamedTuple):
    """The crops of a batch that go through a branch."""

    rows: Tensor  # [t] int64: their tokens
    scale: Tensor  # [t, 1]
    crops: Tensor  # [c] int64
    crop_scale: Tensor  # [c, 1]
    packing: Packing  # of rows


Drop = Tensor | Kept | None  # Tensor: the scale of every row, [T, 1]; None: nothing is dropped
NOTHING: tuple[Drop, Drop] = (None, None)


def draw(rate: float, depth: int, tokens: Tensor, packing: Packing) -> list[tuple[Drop, Drop]]:
    """What happens to the two branches of each of ``depth`` blocks, at rates from 0 to ``rate``."""
    counts = [crops for crops, _ in packing.groups]
    draws = torch.rand(depth, sum(counts), 2, device=tokens.device)
    values = [rate * i / max(depth - 1, 1) for i in range(depth)]
    masked = sum(value <= SUBSET_ABOVE for value in values)
    rates = torch.linspace(0, rate, depth, dtype=tokens.dtype, device=tokens.device)[:masked, None, None]
    scales = (draws[:masked] >= rates) / (1 - rates)  # [masked, crops, 2]
    parts = zip(scales.split(counts, dim=1), packing.groups, strict=True)
    repeated = [part[:, :, None].expand(-1, -1, n, -1).flatten(1, 2) for part, (_, n) in parts]
    branches: list[tuple[Drop, Drop]] = [(x[:, :1], x[:, 1:]) for x in join(repeated, dim=1).unbind(0)]
    for value, pair in zip(values[masked:], draws[masked:], strict=True):
        branches.append(
            (_choose(pair[:, 0], value, tokens, packing), _choose(pair[:, 1], value, tokens, packing))
        )
    return branches


def branch_input(x: Tensor, drop: Drop) -> Tensor:
    """The rows of ``x`` for which the branch is computed."""
    return x.index_select(0, drop.rows) if isinstance(drop, Kept) else x


def add_branch(x: Tensor, y: Tensor, drop: Drop) -> Tensor:
    """``x`` plus the scaled output ``y`` of a branch."""
    if drop is None:
        return x + y
    if isinstance(drop, Kept):
        return x.index_add(0, drop.rows, (y * drop.scale).to(x.dtype))
    return torch.addcmul(x, y, drop)


def first_rows(drop: Drop, groups: Groups) -> Drop:
    """``drop`` for a matrix that holds the first token of every crop alone."""
    if isinstance(drop, Kept):
        return drop._replace(rows=drop.crops, scale=drop.crop_scale)
    return None if drop is None else cls_rows(drop, groups)


def cls_rows(x: Tensor, groups: Groups) -> Tensor:
    """[T, D] -> [crops, D]: the first token of every crop."""
    parts = zip(split_groups(x, groups), groups, strict=True)
    return join([part.view(*group, -1)[:, 0] for part, group in parts])


def _choose(draws: Tensor, rate: float, tokens: Tensor, packing: Packing) -> Kept:
    """The crops of each group with the smallest of ``draws``, [crops]."""
    rows, scales, crops, crop_scales, groups = [], [], [], [], []
    first_row = first_crop = 0
    for part, (number, n) in zip(draws.split([c for c, _ in packing.groups]), packing.groups, strict=True):
        kept = max(1, round(number * (1 - rate)))
        chosen = part.argsort()[:kept]
        rows.append((first_row + chosen[:, None] * n + torch.arange(n, device=draws.device)).flatten())
        crops.append(first_crop + chosen)
        scales.append(tokens.new_full((kept * n, 1), number / kept))
        crop_scales.append(tokens.new_full((kept, 1), number / kept))
        groups.append((kept, n))
        first_row, first_crop = first_row + number * n, first_crop + number
    packed = pack(tuple(groups), packing.backend, tokens.device, packing.dtype)
    return Kept(join(rows), join(scales), join(crops), join(crop_scales), packed)
