"""Which tokens attend to which in a Swin, as index tensors made once per set of crop sizes.

The tokens of all crops are the rows of one matrix. In front of every block they are put into the order of its
windows: windows of one :class:`Kind` (of whatever crop) lie one after another, and inside of a window its
tokens. Norms, projections and MLPs do not care about the order, so nothing is put back.

A map of H x W tokens is padded at the right and at the bottom to whole windows of w x w, rolled by the shift
s (row r then holds row r + s of the padded map) and cut into windows. Regions are bounded by the last w and
the last s rows and columns of the rolled map; between regions -100 is added to the logits. Padding is not
masked: tokens attend to pads.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Maps = tuple[tuple[int, int, int], ...]  # (crops, height, width) in tokens, one per resolution
SEPARATED = -100.0


class Kind(NamedTuple):
    """Windows that hold their tokens and pads, if any, at the same places."""

    windows: int
    tokens: int
    pads: int


class Move(NamedTuple):
    """New rows from old ones: new[i] = old[source[i]], where len(old) stands for zeros."""

    source: Tensor  # [new rows] int32
    inverse: Tensor  # [old rows] int32
    padded: bool


class Layout(NamedTuple):
    """The rows in the order of a block's windows; the entries of ``pairs`` and ``mask`` are, kind by kind, a
    matrix of tokens x (tokens, then pads).
    """

    enter: Move | None  # from the order before; None if nothing moves
    raster: Move | None  # to crop after crop, row by row
    crop: Tensor  # [T] int32: whose row it is
    kinds: tuple[Kind, ...]
    pairs: Tensor  # [sum of tokens x (tokens + pads)] int64: rows of the bias table
    mask: Tensor  # like pairs, float32: 0 or -100


class Stage(NamedTuple):
    """What the blocks of a stage need, and how its tokens merge, [4 T'] rows, four for each of the next."""

    maps: Maps
    blocks: tuple[Layout, ...]
    merge: Move | None


def relative_position_index(window: int) -> Tensor:
    """[w^2, w^2] int64: of query i and key j the row of the bias table, (dy + w - 1)(2w - 1) + dx + w - 1."""
    place = torch.arange(window)
    delta = place[:, None] - place + window - 1  # [w, w]
    rows, columns = delta[:, None, :, None], delta[None, :, None, :]
    return (rows * (2 * window - 1) + columns).reshape(window**2, window**2)


def plan(
    maps: Maps, windows: tuple[tuple[tuple[int, int], ...], ...], device: torch.device, keep: bool
) -> tuple[Stage, ...]:
    """The stages for crops of ``maps``; ``windows`` gives (side, shift) for each block of each stage.

    ``keep`` is for training, whose sizes are few and whose CUDA graphs read the tensors: they stay for ever.
    """
    return (_kept if keep else _recent)(maps, windows, device)


def _make_plan(
    maps: Maps, windows: tuple[tuple[tuple[int, int], ...], ...], device: torch.device
) -> tuple[Stage, ...]:
    sizes, sources, orders = [maps], [], []
    for pairs in windows:
        orders.append({pair: _Arrangement(sizes[-1], *pair) for pair in set(pairs)})
        merged = _merge(sizes[-1])
        sources.append(merged[0])
        sizes.append(merged[1])
    stages = []
    with torch.inference_mode(False):  # in case that an evaluation comes first
        for i, pairs in enumerate(windows):
            layouts = {pair: arrangement.on(device) for pair, arrangement in orders[i].items()}
            between = cache(lambda a, b, here=orders[i]: _move(here[a].order, here[b].order, device))
            # The merging before a stage brings its tokens into the order of its first block.
            raster = np.arange(len(orders[i][pairs[0]].order))
            enter = None if i else _move(raster, orders[i][pairs[0]].order, device)
            moves = [enter, *(between(*change) for change in pairwise(pairs))]
            blocks = [layouts[p]._replace(enter=move) for p, move in zip(pairs, moves, strict=True)]
            merge = None
            if i + 1 < len(windows):
                following = orders[i + 1][windows[i + 1][0]].order
                merge = _move(orders[i][pairs[-1]].order, sources[i][following].reshape(-1), device)
            stages.append(Stage(sizes[i], tuple(blocks), merge))
    return tuple(stages)


_kept = cache(_make_plan)
_recent = lru_cache(8)(_make_plan)


class _Arrangement:
    """The windows of one side and shift over all maps, on the host."""

    def __init__(self, maps: Maps, window: int, shift: int):
        # Rows by what their windows look like along both axes: real places, and the regions of all places.
        found: dict[Any, list[np.ndarray]] = {}
        first = 0
        for crops, height, width in maps:
            base = first + np.arange(crops)[:, None, None, None, None] * (height * width)
            down, across = _axis(height, window, shift), _axis(width, window, shift)
            for (vertical, rows), (horizontal, columns) in product(down.items(), across.items()):
                tokens = rows[:, None, :, None] * width + columns[None, :, None, :]  # [a, b, r, c]
                found.setdefault((vertical, horizontal), []).append(
                    (base + tokens).reshape(-1, rows.shape[1] * columns.shape[1])
                )
            first += crops * height * width
        self.order = np.concatenate([part.reshape(-1) for parts in found.values() for part in parts])
        self.crops = np.concatenate(
            [np.arange(c).repeat(h * w) + sum(n for n, _, _ in maps[:i]) for i, (c, h, w) in enumerate(maps)]
        )[self.order]
        index = relative_position_index(window).numpy()
        pairs, masks, kinds = [], [], []
        for ((real_rows, row_regions), (real_columns, column_regions)), parts in found.items():
            inside = np.zeros((window, window), bool)
            inside[np.ix_(real_rows, real_columns)] = True
            real, pads = (np.flatnonzero(inside == wanted) for wanted in (True, False))
            keys = np.concatenate([real, pads])
            region = np.add.outer(3 * np.array(row_regions), np.array(column_regions)).reshape(-1)
            pairs.append(index[np.ix_(real, keys)].reshape(-1))
            apart = region[real][:, None] != region[keys]
            masks.append(np.where(apart, SEPARATED, 0.0).reshape(-1))
            kinds.append(Kind(sum(len(part) for part in parts), len(real), len(pads)))
        self.kinds, self.pairs, self.mask = tuple(kinds), np.concatenate(pairs), np.concatenate(masks)

    def on(self, device: torch.device) -> Layout:
        return Layout(
            None,
            _move(self.order, np.arange(len(self.order)), device),
            torch.from_numpy(self.crops.astype(np.int32)).to(device),
            self.kinds,
            torch.from_numpy(self.pairs).to(device),
            torch.from_numpy(self.mask.astype(np.float32)).to(device),
        )


def _axis(size: int, window: int, shift: int) -> dict[Any, np.ndarray]:
    """Windows along one axis by (places in the window that are no padding, regions of all places) -> the
    rows of the map at these places, [windows, places].
    """
    padded = -(-size // window) * window
    rolled = np.arange(padded)
    source = (rolled + shift) % padded
    region = np.zeros(padded, int)
    if shift:
        region = (rolled >= padded - window).astype(int) + (rolled >= padded - shift)
    kinds: dict[Any, list[np.ndarray]] = {}
    for start in range(0, padded, window):
        rows, regions = source[start : start + window], region[start : start + window]
        real = np.flatnonzero(rows < size)
        kinds.setdefault((tuple(real), tuple(regions)), []).append(rows[real])
    return {kind: np.stack(windows) for kind, windows in kinds.items()}


def _merge(maps: Maps) -> tuple[np.ndarray, Maps]:
    """The four tokens, in raster order, that each token of the halved maps is made of, [T', 4]; T for those
    beyond the edge of an odd map.
    """
    total = sum(n * h * w for n, h, w in maps)
    parts, merged, first = [], [], 0
    for crops, height, width in maps:
        grid = np.full((crops, height + height % 2, width + width % 2), total)
        grid[:, :height, :width] = first + np.arange(crops * height * width).reshape(crops, height, width)
        corners = [grid[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        parts.append(np.stack(corners, axis=-1).reshape(-1, 4))
        merged.append((crops, grid.shape[1] // 2, grid.shape[2] // 2))
        first += crops * height * width
    return np.concatenate(parts), tuple(merged)


def _move(present: np.ndarray, wanted: np.ndarray, device: torch.device) -> Move | None:
    """From rows that hold the tokens ``present`` to rows that hold ``wanted``, both raster numbers."""
    total = len(present)
    if np.array_equal(present, wanted):
        return None
    row_of = np.full(total + 1, total)
    row_of[present] = np.arange(total)
    index = row_of[wanted]
    inverse = np.empty(total + 1, int)
    inverse[index] = np.arange(len(index))
    source, target = (torch.from_numpy(a.astype(np.int32)).to(device) for a in (index, inverse[:total]))
    return Move(source, target, bool((index == total).any()))
