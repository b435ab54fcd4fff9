"""J and F of DAVIS on masks small enough to count pixels, and against a pixel-by-pixel oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdino.evaluation import segmentation_metrics
from fastdino.evaluation.segmentation_metrics import (
    boundary_accuracy,
    outline,
    region_similarity,
    score_sequence,
)


def box(shape, top, left, bottom, right):
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_region_similarity():
    a, b = box((4, 6), 0, 0, 2, 4), box((4, 6), 0, 2, 2, 6)
    assert region_similarity(a, b) == pytest.approx(4 / 12)
    assert region_similarity(a, a) == 1.0
    empty = np.zeros_like(a)
    assert region_similarity(a, empty) == 0.0 and region_similarity(empty, empty) == 1.0


def test_outline_looks_east_south_and_south_east():
    mask = box((4, 5), 1, 1, 3, 3)
    assert outline(mask).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    # the last row looks east only, the last column south only
    corner = box((3, 3), 1, 1, 3, 3)
    assert outline(corner).astype(int).tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert not outline(np.ones((3, 3), bool)).any()


def test_f_of_equal_and_empty_masks():
    a, empty = box((40, 40), 5, 5, 20, 20), np.zeros((40, 40), bool)
    assert boundary_accuracy(a, a) == 1.0
    assert boundary_accuracy(empty, empty) == 1.0
    assert boundary_accuracy(a, empty) == boundary_accuracy(empty, a) == 0.0
    # a full picture has no outline either
    assert boundary_accuracy(~empty, empty) == 1.0


def test_f_of_shifted_bars_by_hand():
    # 100 x 75 pixels have a diagonal of 125, so outlines may be 1 pixel apart
    bars = [box((100, 75), 0, 20 + shift, 100, 40 + shift) for shift in range(3)]
    assert outline(bars[0]).sum() == 200  # columns 19 and 39
    assert boundary_accuracy(bars[1], bars[0]) == 1.0
    assert boundary_accuracy(bars[2], bars[0]) == 0.0
    # one side moved by two: half of each outline is near the other
    assert boundary_accuracy(box((100, 75), 0, 20, 100, 42), bars[0]) == pytest.approx(0.5)
    # a second bar: all of the truth is found, half of what was claimed is right
    both = bars[0] | box((100, 75), 0, 50, 100, 70)
    assert boundary_accuracy(both, bars[0]) == pytest.approx(2 * 0.5 * 1 / 1.5)


def oracle(mask, truth):
    """Distances between all pairs of outline pixels."""
    radius = math.ceil(0.008 * math.hypot(*mask.shape))
    a, b = (np.argwhere(outline(m)) for m in (mask, truth))
    near = ((a[:, None] - b[None]) ** 2).sum(-1) <= radius**2
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("shape", [(120, 200), (201, 33), (9, 400)])
def test_f_equals_all_pairs_of_distances(shape):
    rng = np.random.default_rng(0)
    values = []
    for _ in range(10):
        noise = rng.normal(size=shape).cumsum(0).cumsum(1)
        shifted = np.roll(noise, rng.integers(0, 6, 2), (0, 1))
        mask, truth = noise > np.median(noise), shifted > np.quantile(shifted, 0.6)
        values.append(boundary_accuracy(mask, truth))
        assert values[-1] == pytest.approx(oracle(mask, truth))
    assert min(values) < 0.95


def test_outline_at_the_tolerance_of_480p():
    # 480 x 854: ceil(0.008 * 979.7) = 8
    bars = [box((480, 854), 0, 100 + shift, 480, 300 + shift) for shift in (0, 8, 9)]
    assert boundary_accuracy(bars[1], bars[0]) == 1.0
    assert boundary_accuracy(bars[2], bars[0]) == 0.0


def test_sequences():
    truth = np.zeros((2, 30, 30), np.uint8)
    truth[:, 2:10, 2:10], truth[:, 15:25, 15:25] = 1, 2
    truth[1, 0, 29] = 255  # void is background
    mask = truth.copy()
    mask[1, 0, 29] = 0
    mask[1][mask[1] == 2] = 0  # lost in the second frame
    scores = score_sequence(mask, np.where(truth == 255, 0, truth), 2)
    assert scores.j.tolist() == scores.f.tolist() == [[100, 100], [100, 0]]
    # object 3 never shows up, neither in the truth nor in the masks
    assert score_sequence(mask, truth, 3).j[2].tolist() == [100, 100]
    with pytest.raises(ValueError, match="frame 0: expected object numbers up to 1, got 2"):
        score_sequence(mask, truth, 1)
    with pytest.raises(ValueError, match="frame 0.*30.*29"):
        score_sequence(mask[:, :29], truth, 2)
    assert segmentation_metrics.TOLERANCE == 0.008
