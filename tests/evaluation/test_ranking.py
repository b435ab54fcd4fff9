"""Average precision and precision at k on rankings worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdino.evaluation import ranking
from fastdino.evaluation.ranking import average_precision, positions_without_junk, precision_at, rank, score


def test_average_precision_by_hand():
    assert average_precision(np.array([0, 2]), 2) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)  # 0.7917
    assert average_precision(np.array([0, 1, 2]), 3) == 1.0
    assert average_precision(np.array([3]), 1) == pytest.approx((0 / 3 + 1 / 4) / 2)
    # found one of two: the other adds nothing
    assert average_precision(np.array([0]), 2) == 0.5
    assert average_precision(np.array([], int), 2) == 0.0


def test_junk_counts_as_if_it_were_not_there():
    order = np.array([7, 4, 0, 9, 5, 1])
    positions = positions_without_junk(order, np.array([4, 5]), np.array([7, 9, 1]))
    assert positions.tolist() == [0, 2]  # 4 0 5 remain
    assert positions_without_junk(order, np.array([4, 5]), np.array([], int)).tolist() == [1, 4]
    # as revisitop counts an image that is both
    assert positions_without_junk(order, np.array([7, 4]), np.array([7])).tolist() == [0, 0]
    scores = score(order[None], [np.array([4, 5])], [np.array([7, 9, 1])], ks=(1, 2, 10))
    assert scores.mean_ap == pytest.approx(79.1667, abs=1e-3)
    # ten are more than needed: the last positive is third
    assert scores.mean_precision == pytest.approx({1: 100.0, 2: 50.0, 10: 200 / 3})


def test_precision_at_k_ends_at_the_last_positive():
    positions = np.array([1, 4])  # second and fifth
    assert [precision_at(positions, k) for k in (1, 2, 4, 5, 10)] == [0, 1 / 2, 1 / 4, 2 / 5, 2 / 5]
    assert precision_at(np.array([], int), 5) == 0.0


def brute_force(order, positives, junk, k):
    """Trapezoids under the precision-recall curve of the ranking without junk, item by item."""
    clean = [i for i in order if i not in junk]
    area = found = 0
    ranks = [r for r, i in enumerate(clean) if i in positives]
    for r, i in enumerate(clean):
        if i in positives:
            before = 1.0 if r == 0 else found / r
            found += 1
            area += (before + found / (r + 1)) / 2 / len(positives)
    depth = min(ranks[-1] + 1, k)
    return area, sum(i in positives for i in clean[:depth]) / depth


def test_equals_brute_force_and_skips_queries_without_positives():
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(50) for _ in range(20)])
    positives, junk = [], []
    for i in range(20):
        chosen = rng.permutation(50)
        count = 0 if i % 5 == 0 else int(rng.integers(1, 9))
        positives.append(chosen[:count])
        junk.append(chosen[count : count + int(rng.integers(0, 20))])
    scores = score(orders, positives, junk, ks=(1, 5, 10))
    used = [i for i in range(20) if i % 5]
    for k in (1, 5, 10):
        expected = [brute_force(orders[i].tolist(), set(positives[i]), set(junk[i]), k) for i in used]
        assert scores.mean_precision[k] == pytest.approx(100 * np.mean([p for _, p in expected]))
        assert scores.mean_ap == pytest.approx(100 * np.mean([ap for ap, _ in expected]))
    assert [i for i, ap in enumerate(scores.per_query) if ap is not None] == used
    with pytest.raises(ValueError, match="none of 2 queries"):
        score(orders[:2], [np.array([], int)] * 2)
    with pytest.raises(ValueError, match="20, 19 and 20"):
        score(orders, positives[1:], junk)


def test_a_ranking_that_is_cut_off_misses_positives():
    assert score(np.array([[3, 8]]), [np.array([3, 5])], ks=()).per_query == [50.0]


def test_rank_by_cosine_ties_to_the_lower_index(monkeypatch):
    database = torch.tensor([[0.0, 2.0], [5.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    queries = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    expected = [[1, 2, 4, 0, 3], [0, 4, 1, 2, 3]]
    assert rank(queries, database).tolist() == expected
    assert rank(queries, database, keep=2).tolist() == [row[:2] for row in expected]
    monkeypatch.setattr(ranking, "_COSINES", 1)  # one query at a time
    assert rank(queries, database).tolist() == expected
    with pytest.raises(ValueError, match=r"\[2, 2\] and \[5, 1\]"):
        rank(queries, database[:, :1])
