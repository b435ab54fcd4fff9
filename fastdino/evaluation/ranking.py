"""Scores of rankings: average precision and precision at k, as retrieval benchmarks define them.

A ranking lists database indices, best first; positions count from 0. With the positions ``r_0 < r_1 < ...``
at which positives stand and ``n`` positives in all, average precision is the area under the precision-recall
curve by trapezoids: ``AP = sum over j of (p_j + (j + 1) / (r_j + 1)) / 2 / n`` with ``p_j = j / r_j``, or 1
where ``r_j = 0`` (Philbin et al. 2007; Jegou et al. 2008). Junk images count as if they were not in the
database (Radenovic et al. 2018, arXiv 1803.11285).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

_COSINES = 1 << 26  # per block of queries


@dataclass(frozen=True)
class RankingScores:
    """Scores in percent; the means are over the queries that have a positive."""

    mean_ap: float
    mean_precision: dict[int, float]
    """Precision at k, by k."""
    per_query: list[float | None]
    """Average precision in the order of the queries; None for one without positives."""


def rank(
    queries: Tensor, database: Tensor, keep: int | None = None, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Database indices by descending cosine, int64 [Q, N], or the first ``keep`` of them, [Q, keep].

    ``queries`` float [Q, D] and ``database`` float [N, D] need not be normalised. Equal cosines go to the
    lower index.
    """
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise ValueError(
            "rank: expected queries [Q, D] and database [N, D], "
            f"got {list(queries.shape)} and {list(database.shape)}"
        )
    bank = nn.functional.normalize(database.to(device).float(), dim=1)
    rows = max(1, _COSINES // max(1, len(bank)))
    orders = []
    for block in queries.split(rows):
        cosines = nn.functional.normalize(block.to(device).float(), dim=1) @ bank.T  # [q, N]
        order = cosines.sort(dim=1, descending=True, stable=True).indices
        orders.append(order[:, :keep].cpu())
    return torch.cat(orders).numpy()


def score(
    order: np.ndarray,
    positives: Sequence[np.ndarray],
    junk: Sequence[np.ndarray] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> RankingScores:
    """Scores of rankings ``order`` int [Q, n], whole or cut off: a positive beyond the end is not found.

    ``positives`` and ``junk`` hold database indices per query, int [any]. Queries without positives are left
    out. Raises ValueError if that leaves none.
    """
    junk = [np.empty(0, np.int64)] * len(order) if junk is None else junk
    if not len(order) == len(positives) == len(junk):
        raise ValueError(
            "score: expected one ranking, one list of positives and one of junk per query, "
            f"got {len(order)}, {len(positives)} and {len(junk)}"
        )
    aps: list[float | None] = []
    precisions = []
    for ranking, good, bad in zip(order, positives, junk, strict=True):
        if not len(good):
            aps.append(None)
            continue
        positions = positions_without_junk(ranking, good, bad)
        aps.append(100 * average_precision(positions, len(good)))
        precisions.append([100 * precision_at(positions, k) for k in ks])
    if not precisions:
        raise ValueError(f"none of {len(aps)} queries has a positive image")
    mean_ap = float(np.mean([ap for ap in aps if ap is not None]))
    at = {k: float(value) for k, value in zip(ks, np.mean(precisions, axis=0), strict=True)}
    return RankingScores(mean_ap, at, aps)


def positions_without_junk(ranking: np.ndarray, positives: np.ndarray, junk: np.ndarray) -> np.ndarray:
    """Ascending positions of the positives in ``ranking`` int [n] once the junk before them is gone."""
    is_junk = np.isin(ranking, junk)
    positions = np.flatnonzero(np.isin(ranking, positives))
    return positions - np.cumsum(is_junk)[positions] + is_junk[positions]


def average_precision(positions: np.ndarray, positives: int) -> float:
    """AP in [0, 1] of positives found at ascending ``positions``, of ``positives`` that there are."""
    before = np.arange(len(positions))
    left = np.where(positions == 0, 1.0, before / np.maximum(positions, 1))
    right = (before + 1) / (positions + 1)
    return float((left + right).sum() / 2 / positives)


def precision_at(positions: np.ndarray, k: int) -> float:
    """Share of positives among the first ``k``, or down to the last positive if that comes earlier."""
    if not len(positions):
        return 0.0
    depth = min(int(positions[-1]) + 1, k)
    return int((positions < depth).sum()) / depth
