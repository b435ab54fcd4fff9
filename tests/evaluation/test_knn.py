"""k-NN against a brute-force oracle in numpy, at the sizes where the official script breaks."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from fastdino_kernels import backend, csrc
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from fastdino.data.manifest import build_manifest
from fastdino.engine import parallel
from fastdino.evaluation import knn
from fastdino.evaluation.feature_file import load_mapped
from fastdino.evaluation.knn import evaluate_knn, knn_classify, matching_labels
from runs import free_port, spawn


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


@pytest.fixture(params=["cpu", "reference"])
def side(request):
    if request.param == "cpu" and csrc.library() is None:
        pytest.skip("the C++ kernels are not built (make build)")
    with backend(request.param):
        yield request.param


@pytest.mark.parametrize("classes, n_test", [(2, 1), (3, 7), (10, 99), (40, 130)])
@pytest.mark.parametrize("temperature", [0.07, 0.002, 5.0])
def test_equals_brute_force(side, classes, n_test, temperature):
    rng = np.random.default_rng(classes)
    bank, bank_labels = clusters(rng, 300, classes, 16)
    queries, labels = clusters(rng, n_test, classes, 16)
    ks = (1, 5, 20, 200, 1000)  # the last is larger than the bank
    tensors = [torch.from_numpy(x) for x in (bank, bank_labels, queries, labels)]
    result = knn_classify(*tensors, ks, temperature)
    assert list(result) == list(ks)
    for k in ks:
        assert result[k] == pytest.approx(oracle(bank, bank_labels, queries, labels, k, temperature)), k


def test_blocks_do_not_change_the_result(side, monkeypatch):
    rng = np.random.default_rng(0)
    data = [torch.from_numpy(x) for x in (*clusters(rng, 501, 8, 12), *clusters(rng, 203, 8, 12))]
    whole = knn_classify(*data, (3, 50))
    for block in ((1, 50), (64, 33), (203, 501)):
        monkeypatch.setattr(knn, "_BLOCKS", {"cpu": block})
        monkeypatch.setattr(knn, "_VOTERS", block[0])
        assert knn_classify(*data, (3, 50)) == whole
    assert 0 < whole[3][0] < 100


@pytest.mark.parametrize("k", [1, 20, 150])
def test_equals_scikit_learn(side, k):
    rng = np.random.default_rng(k)
    bank, bank_labels = clusters(rng, 600, 12, 24)
    queries, labels = clusters(rng, 90, 12, 24)
    rival = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank, bank_labels)
    expected = 100 * float((rival.predict(queries) == labels).mean())
    top5 = np.argsort(-rival.predict_proba(queries), axis=1)[:, :5]
    data = [torch.from_numpy(x) for x in (bank, bank_labels, queries, labels)]
    found = knn_classify(*data, (k,))[k]
    assert found[0] == pytest.approx(expected) and 0 < expected < 100
    if k > 1:  # of one neighbour there is one class, not five
        assert found[1] == pytest.approx(100 * float((top5 == labels[:, None]).any(1).mean()))


def test_several_numbers_of_neighbours_in_any_order_and_twice(side):
    rng = np.random.default_rng(2)
    data = [torch.from_numpy(x) for x in (*clusters(rng, 100, 8, 12), *clusters(rng, 40, 8, 12))]
    found = knn_classify(*data, (300, 5, 40, 5, 100))
    assert list(found) == [300, 5, 40, 100] and found[300] == found[100]
    for k in (5, 40, 100):
        assert found[k] == knn_classify(*data, (k,))[k]


def test_the_bank_may_be_mapped_from_a_file(tmp_path):
    rng = np.random.default_rng(4)
    bank, bank_labels, *rest = (
        torch.from_numpy(x) for x in (*clusters(rng, 200, 5, 12), *clusters(rng, 30, 5, 12))
    )
    torch.save(bank, tmp_path / "bank.pth")
    mapped = load_mapped(tmp_path / "bank.pth")
    assert knn_classify(mapped, bank_labels, *rest, (7,)) == knn_classify(bank, bank_labels, *rest, (7,))


def part_of_the_bank(rank, size, port, data, ends, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    world = parallel.start("cpu")
    bank, bank_labels, queries, labels = data
    own = slice(ends[rank], ends[rank + 1])
    found = knn_classify(bank[own], bank_labels[own], queries, labels, (1, 9, 30, 500), world=world)
    torch.save(found, folder / f"{rank}.pt")
    parallel.stop()


def test_bank_in_parts(tmp_path):
    """Two processes, of which one has fewer images and classes than there are neighbours; ties between
    them go to the first."""
    rng = np.random.default_rng(6)
    bank, bank_labels, queries, labels = (
        torch.from_numpy(x) for x in (*clusters(rng, 240, 6, 12), *clusters(rng, 70, 6, 12))
    )
    bank[220:] = bank[:20]
    data = (bank, bank_labels * 10 - 20, queries, labels * 10 - 20)
    arguments = (2, free_port(), data, (0, 220, 240), tmp_path)
    spawn(part_of_the_bank, arguments, 2)
    expected = knn_classify(*data, (1, 9, 30, 500))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == expected
    assert 0 < expected[1][0] < 100


def test_labels_may_be_any_integers():
    rng = np.random.default_rng(1)
    bank, bank_labels, queries, labels = (
        torch.from_numpy(x) for x in (*clusters(rng, 80, 4, 8), *clusters(rng, 30, 4, 8))
    )
    names = torch.tensor([-5, 12, 1000, 10**9])
    assert knn_classify(bank, names[bank_labels], queries, names[labels], (7,)) == knn_classify(
        bank, bank_labels, queries, labels, (7,)
    )


def nearest(queries, bank, k):
    return knn._nearest(queries, bank, k, torch.device("cpu")).best()


def test_equal_cosines_go_to_the_lower_index(side):
    bank = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    query = torch.tensor([[1.0, 0.0]])
    cosines, index = nearest(query, bank, 3)
    assert index.tolist() == [[1, 2, 3]]
    assert cosines.tolist() == [[1.0, 1.0, 1.0]]
    labels = torch.tensor([0, 2, 1, 1])
    assert knn_classify(bank, labels, query, torch.tensor([2]), (1,))[1][0] == 100.0
    # two neighbours, one vote each for classes 2 and 1: the lower label wins
    assert knn_classify(bank, labels, query, torch.tensor([1]), (2,))[2][0] == 100.0


def test_many_equal_cosines_across_blocks(side, monkeypatch):
    rng = np.random.default_rng(3)
    bank = torch.nn.functional.one_hot(torch.from_numpy(rng.integers(0, 4, 200)), 4).float()
    monkeypatch.setattr(knn, "_BLOCKS", {"cpu": (3, 33)})
    cosines, index = nearest(torch.eye(4), bank, 7)
    assert bool((cosines == 1).all())
    assert index.tolist() == [torch.nonzero(bank[:, i])[:7, 0].tolist() for i in range(4)]


def test_negative_cosines_are_ordered_and_returned(side):
    bank = torch.nn.functional.normalize(torch.tensor([[-1.0, 0.1], [-1.0, 1.0], [-1.0, 3.0]]))
    cosines, index = nearest(torch.tensor([[1.0, 0.0]]), bank, 3)
    assert index.tolist() == [[2, 1, 0]]
    assert torch.allclose(cosines[0], bank[[2, 1, 0], 0])


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
        ({"test_features": torch.full((4, 2), float("inf"))}, "test_features.*infinity"),
        ({"train_features": torch.ones(0, 2), "train_labels": torch.ones(0)}, "train_features"),
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
