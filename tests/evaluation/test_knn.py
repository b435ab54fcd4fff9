"""k-NN against a brute-force oracle in numpy, at the sizes where the official script breaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.data.manifest import build_manifest
from fastdino.evaluation import knn
from fastdino.evaluation.knn import evaluate_knn, knn_classify, matching_labels


def oracle(bank, bank_labels, queries, labels, k, temperature):
    """One query at a time, one vote at a time, in float64."""
    bank = bank.astype(np.float64) / np.linalg.norm(bank.astype(np.float64), axis=1, keepdims=True)
    queries = queries.astype(np.float64) / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    top1 = top5 = 0
    for query, label in zip(queries, labels, strict=True):
        cosines = bank @ query
        nearest = sorted(range(len(bank)), key=lambda i: (-cosines[i], i))[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            votes[bank_labels[i]] = votes.get(bank_labels[i], 0.0) + np.exp(cosines[i] / temperature)
        ranking = sorted(votes, key=lambda c: (-votes[c], c))
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
    return 100 * top1 / len(labels), 100 * top5 / len(labels)


def clusters(rng, n, classes, dim, spread=1.2):
    centers = np.random.default_rng(7).normal(size=(classes, dim))
    labels = rng.integers(0, classes, n)
    return (centers[labels] + spread * rng.normal(size=(n, dim))).astype(np.float32), labels


@pytest.mark.parametrize("classes, n_test", [(2, 1), (3, 7), (10, 99), (40, 130)])
@pytest.mark.parametrize("temperature", [0.07, 0.002, 5.0])
def test_equals_brute_force(classes, n_test, temperature):
    rng = np.random.default_rng(classes)
    bank, bank_labels = clusters(rng, 300, classes, 16)
    queries, labels = clusters(rng, n_test, classes, 16)
    ks = (1, 5, 20, 200, 1000)  # the last is larger than the bank
    tensors = [torch.from_numpy(x) for x in (bank, bank_labels, queries, labels)]
    result = knn_classify(*tensors, ks, temperature)
    assert list(result) == list(ks)
    for k in ks:
        assert result[k] == pytest.approx(oracle(bank, bank_labels, queries, labels, k, temperature)), k


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    data = [torch.from_numpy(x) for x in (*clusters(rng, 501, 8, 12), *clusters(rng, 203, 8, 12))]
    whole = knn_classify(*data, (3, 50))
    for size in (1, 64, 50_000):  # from one query and 50 bank images at a time on
        monkeypatch.setattr(knn, "_SIMILARITIES", size)
        assert knn_classify(*data, (3, 50)) == whole
    assert 0 < whole[3][0] < 100


def test_labels_may_be_any_integers():
    rng = np.random.default_rng(1)
    bank, bank_labels, queries, labels = (
        torch.from_numpy(x) for x in (*clusters(rng, 80, 4, 8), *clusters(rng, 30, 4, 8))
    )
    names = torch.tensor([-5, 12, 1000, 10**9])
    assert knn_classify(bank, names[bank_labels], queries, names[labels], (7,)) == knn_classify(
        bank, bank_labels, queries, labels, (7,)
    )


def test_equal_cosines_go_to_the_lower_index():
    bank = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    query = torch.tensor([[1.0, 0.0]])
    cosines, index = knn._nearest(query, torch.nn.functional.normalize(bank), 3)
    assert index.tolist() == [[1, 2, 3]]
    assert cosines.tolist() == [[1.0, 1.0, 1.0]]
    labels = torch.tensor([0, 2, 1, 1])
    assert knn_classify(bank, labels, query, torch.tensor([2]), (1,))[1][0] == 100.0
    # two neighbours, one vote each for classes 2 and 1: the lower label wins
    assert knn_classify(bank, labels, query, torch.tensor([1]), (2,))[2][0] == 100.0


def test_many_equal_cosines_across_blocks(monkeypatch):
    rng = np.random.default_rng(3)
    bank = torch.nn.functional.one_hot(torch.from_numpy(rng.integers(0, 4, 200)), 4).float()
    monkeypatch.setattr(knn, "_SIMILARITIES", 4 * 33)
    cosines, index = knn._nearest(torch.eye(4), bank, 7)
    assert bool((cosines == 1).all())
    assert index.tolist() == [torch.nonzero(bank[:, i])[:7, 0].tolist() for i in range(4)]


def test_negative_cosines_are_ordered_and_returned():
    bank = torch.nn.functional.normalize(torch.tensor([[-1.0, 0.1], [-1.0, 1.0], [-1.0, 3.0]]))
    cosines, index = knn._nearest(torch.tensor([[1.0, 0.0]]), bank, 3)
    assert index.tolist() == [[2, 1, 0]]
    assert torch.equal(cosines[0], bank[[2, 1, 0], 0])


def test_top5_counts_only_voted_classes():
    bank = torch.eye(6)
    labels = torch.arange(6)
    assert knn_classify(bank, labels, bank[:1], torch.tensor([3]), (1,))[1] == (0.0, 0.0)
    assert knn_classify(bank, labels, bank[:1], torch.tensor([4]), (5,))[5] == (0.0, 100.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ks": ()}, "ks"),
        ({"ks": (0,)}, "ks"),
        ({"temperature": 0.0}, "temperature"),
        ({"test_features": torch.ones(4, 3)}, "columns"),
        ({"test_labels": torch.ones(3)}, "test_labels"),
        ({"train_features": torch.full((4, 2), float("nan"))}, "train_features.*NaN"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    right = {
        "train_features": torch.ones(4, 2),
        "train_labels": torch.zeros(4),
        "ks": (1,),
        "temperature": 0.1,
    }
    right |= {"test_features": torch.ones(4, 2), "test_labels": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        knn_classify(**(right | change))


def make_folder(root, classes, per_class):
    for color, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixel = np.zeros(3, np.uint8)
            pixel[color % 3] = 200 + i
            Image.fromarray(np.broadcast_to(pixel, (12, 20, 3)).copy()).save(root / name / f"{i}.png")
    return root


class MeanColor(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_evaluate_on_folders_matches_classes_by_name(tmp_path):
    train = build_manifest(make_folder(tmp_path / "train", ["a", "red", "z"], 4))
    test = build_manifest(make_folder(tmp_path / "val", ["a", "red"], 2))
    assert matching_labels(train, test)[1].tolist() == [0, 0, 1, 1]
    assert evaluate_knn(MeanColor(), train, test, ks=(3,), image_size=8, batch_size=3) == {3: (100.0, 100.0)}
    with pytest.raises(ValueError, match="'z'"):
        matching_labels(test, train)
