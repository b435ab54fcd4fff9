"""The running top k against a stable sort of the whole matrix, bit for bit; votes against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastdino_kernels import backend
from fastdino_kernels.class_votes import class_votes
from fastdino_kernels.top_k import RunningTopK


@pytest.fixture(params=["cpu", "reference"])
def side(request, library):
    with backend(request.param):
        yield request.param


def sorted_whole(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, columns = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], columns[:, :k]


def running(scores: torch.Tensor, k: int, columns: int, rows: int) -> RunningTopK:
    state = RunningTopK(len(scores), k)
    for start in range(0, scores.shape[1], columns):
        for row in range(0, len(scores), rows):
            state.add(scores[row : row + rows, start : start + columns], start, row)
    return state


def numbers(kind: str, rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(rows + columns)
    x = torch.randn(rows, columns)
    if kind == "few values":  # ties everywhere, of both signs, and both zeros
        return torch.randint(-3, 4, (rows, columns)) * torch.where(x > 0, 0.25, -0.25)
    if kind == "ascending":
        return x.sort(dim=1).values
    if kind == "descending":
        return x.sort(dim=1, descending=True).values
    return x * 10.0 ** torch.randint(-38, 38, (rows, columns)).clamp(-37, 37)


@pytest.mark.parametrize("kind", ["random", "few values", "ascending", "descending"])
@pytest.mark.parametrize(
    "rows, columns, k, block", [(1, 1, 1, 1), (3, 700, 1, 64), (5, 333, 20, 50), (2, 60, 60, 16)]
)
def test_equals_a_stable_sort(side, kind, rows, columns, k, block):
    scores = numbers(kind, rows, columns)
    values, index = running(scores, k, block, 2).best()
    expected, expected_index = sorted_whole(scores, k)
    assert torch.equal(values, expected) and torch.equal(index, expected_index)


@pytest.mark.parametrize("block", [31, 32, 33, 1000])
def test_many_neighbours_and_parts(side, block):
    scores = numbers("few values", 7, 900)
    state = running(scores, 200, block, 7)
    expected, expected_index = sorted_whole(scores, 200)
    for start, stop in ((0, 3), (3, 7), (6, 7)):
        values, index = state.best(start, stop)
        assert torch.equal(values, expected[start:stop]) and torch.equal(index, expected_index[start:stop])


def test_more_neighbours_than_columns_and_more_columns_later(side):
    scores = numbers("random", 4, 90)
    state = RunningTopK(4, 50)
    state.add(scores[:, :30], 0)
    assert torch.equal(state.best()[1], sorted_whole(scores[:, :30], 50)[1])
    state.add(scores[:, 30:], 30)
    assert torch.equal(state.best()[1], sorted_whole(scores, 50)[1])


def test_blocks_may_be_parts_of_a_larger_matrix(side):
    whole = numbers("random", 6, 300)
    state = RunningTopK(3, 5)
    state.add(whole[1:4, 100:200], 1000)
    assert torch.equal(state.best()[1], sorted_whole(whole[1:4, 100:200], 5)[1] + 1000)


def test_threads_do_not_change_the_result(library, threads):
    scores = numbers("random", 33, 2000)
    found = []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(running(scores, 40, 512, 16).best())
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_wrong_arguments(side):
    with pytest.raises(ValueError, match="rows, k"):
        RunningTopK(2, 0)
    state = RunningTopK(2, 3)
    with pytest.raises(ValueError, match="no numbers"):
        state.best()
    for scores, column, row, name in (
        (torch.zeros(2, 4).double(), 0, 0, "scores"),
        (torch.zeros(4, 2).T, 0, 0, "scores"),
        (torch.zeros(2, 4), 0, 1, "row"),
        (torch.zeros(2, 4), 2**32 - 2, 0, "column"),
    ):
        with pytest.raises(ValueError, match=name):
            state.add(scores, column, row)


# --------------------------------------------------------------------------------------------------- votes


def loop(classes, weights, truth, ks):
    ranks = []
    for c, w, t in zip(classes.tolist(), weights.tolist(), truth.tolist(), strict=True):
        row = []
        for k in ks:
            votes: dict[int, float] = {}
            for name, weight in zip(c[:k], w[:k], strict=True):
                votes[name] = votes.get(name, 0.0) + weight
            order = sorted((name for name in votes), key=lambda name: (-votes[name], name))
            row.append(order.index(t) if votes.get(t, 0.0) > 0 else -1)
        ranks.append(row)
    return ranks


@pytest.mark.parametrize("number", [1, 4, 50])
def test_votes_equal_a_loop(side, number):
    rng = np.random.default_rng(number)
    classes = torch.from_numpy(rng.integers(0, number, (40, 30)))
    # quarters: sums are exact and often equal; some weights are zero
    weights = torch.from_numpy(-np.sort(-rng.integers(0, 4, (40, 30)) / 4.0, axis=1))
    truth = torch.from_numpy(rng.integers(-1, number, 40))
    ks = (1, 5, 5, 30)
    found = class_votes(classes, weights, truth, ks=ks, number=number)
    assert found.tolist() == loop(classes, weights, truth, ks)
    assert number == 1 or 0 < int((found == 1).sum())


def test_votes_name_wrong_arguments(side):
    classes, weights, truth = torch.zeros(2, 3).long(), torch.ones(2, 3).double(), torch.zeros(2).long()
    with pytest.raises(TypeError, match="float64"):
        class_votes(classes, weights.float(), truth, ks=[1], number=1)
    with pytest.raises(ValueError, match="expected"):
        class_votes(classes, weights, truth[:1], ks=[1], number=1)
    for ks in ([0], [4], [2, 1]):
        with pytest.raises(ValueError, match="ks"):
            class_votes(classes, weights, truth, ks=ks, number=1)
