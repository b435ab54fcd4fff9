"""Region similarity J and boundary accuracy F of DAVIS 2017 (Pont-Tuset et al., arXiv 1704.00675).

J is intersection over union of two masks. F compares their outlines: precision is the share of one's outline
within a few pixels of the other's, recall the reverse, F their harmonic mean. Definitions, down to outlines
at the edge of the picture, are those of the official davis2017-evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.008
"""How far apart outlines may be, as a share of the picture's diagonal."""


@dataclass(frozen=True)
class SequenceScores:
    """J and F in percent, float64 [objects, frames]."""

    j: np.ndarray
    f: np.ndarray


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """J in [0, 1] of two masks, bool [H, W]: intersection over union, 1 if both are empty."""
    union = int((mask | truth).sum())
    return int((mask & truth).sum()) / union if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """F in [0, 1] of two masks, bool [H, W]; 1 if neither has an outline, 0 if only one has."""
    radius = math.ceil(TOLERANCE * math.hypot(*mask.shape))
    ours, theirs = outline(mask), outline(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = _share_near(ours, theirs, radius)
    recall = _share_near(theirs, ours, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels, bool [H, W], whose east, south or south-east neighbour differs from them.

    The last row looks east only, the last column south only, and the last pixel is never part of it.
    """
    edge = np.zeros_like(mask, bool)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def _share_near(points: np.ndarray, others: np.ndarray, radius: int) -> float:
    """Share of the pixels of ``points``, bool [H, W], that have one of ``others`` within ``radius``."""
    height, width = points.shape
    y, x = np.nonzero(points)
    # Per row of the disk a run of pixels, whose members are counted as a difference of sums along the row.
    sums = np.zeros((height + 2 * radius, width + 1), np.int32)
    np.cumsum(others, axis=1, out=sums[radius : radius + height, 1:])
    steps = np.arange(-radius, radius + 1)
    reach = np.array([math.isqrt(radius**2 - step**2) for step in steps.tolist()])
    rows = y[:, None] + steps + radius  # [points, 2 * radius + 1]
    left = np.maximum(x[:, None] - reach, 0)
    right = np.minimum(x[:, None] + reach + 1, width)
    return float((sums[rows, right] > sums[rows, left]).any(1).mean())


def score_sequence(masks: Iterable[np.ndarray], truths: Iterable[np.ndarray], objects: int) -> SequenceScores:
    """J and F of every object in every frame; masks hold one object number per pixel, uint8 [H, W].

    Objects are 1 to ``objects``; void, 255 in the truth, is background. Raises ValueError if a mask has
    another size than its truth or a higher number than ``objects``.
    """
    j: list[list[float]] = []
    f: list[list[float]] = []
    for i, (mask, truth) in enumerate(zip(masks, truths, strict=True)):
        if mask.shape != truth.shape:
            raise ValueError(f"frame {i}: expected a mask of {truth.shape} pixels, got {mask.shape}")
        if int(mask.max()) > objects:
            raise ValueError(f"frame {i}: expected object numbers up to {objects}, got {int(mask.max())}")
        pairs = [(mask == number, truth == number) for number in range(1, objects + 1)]
        j.append([region_similarity(*pair) for pair in pairs])
        f.append([boundary_accuracy(*pair) for pair in pairs])
    shape = (len(j), objects)
    return SequenceScores(100 * np.reshape(j, shape).T, 100 * np.reshape(f, shape).T)
