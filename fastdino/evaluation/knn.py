"""Weighted k-nearest-neighbour classification of frozen features (DINO paper, section 4.2 and appendix F.1).

Every training feature is a neighbour candidate. For a test feature ``x`` and its ``k`` nearest neighbours by
cosine, class ``c`` receives the votes ``sum over neighbours i of class c of exp(cos(x, x_i) / T)``; the class
with most votes wins. Nothing is trained, so the result depends on the features alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.data.manifest import Manifest
from fastdino.evaluation.features import Progress, extract_features

_SIMILARITIES = 1 << 26  # per block: 0.25 GiB of cosines, whatever the sizes


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor | np.ndarray,
    test_features: Tensor,
    test_labels: Tensor | np.ndarray,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str | None = None,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in percent for each number of neighbours: ``{k: (top1, top5)}``.

    Features: float [N, D] and [M, D], normalised here; labels: int [N] and [M], any values. A ``k`` beyond
    the bank uses all of it. Top-5 counts a class only if a neighbour voted for it. Equal cosines go to the
    lower bank index, equal votes to the lower label, so the result is a function of the features. Works block
    by block on ``device``, by default that of the features; needs about 0.5 GiB beside the features.
    """
    bank_labels, labels = torch.as_tensor(train_labels).long(), torch.as_tensor(test_labels).long()
    _validate(train_features, bank_labels, test_features, labels, ks, temperature)
    device = torch.device(device) if device is not None else train_features.device
    classes, bank_classes = torch.unique(bank_labels.to(device), return_inverse=True)  # [C], [N]
    bank = nn.functional.normalize(train_features.to(device).float(), dim=1)
    largest = min(max(ks), len(bank))
    rows = min(len(labels), 1024, _SIMILARITIES)
    hits = {k: [0, 0] for k in ks}

    for start in range(0, len(labels), rows):
        queries = nn.functional.normalize(test_features[start : start + rows].to(device).float(), dim=1)
        truth = labels[start : start + rows].to(device)
        cosines, index = _nearest(queries, bank, largest)  # [r, largest], descending
        voted = bank_classes[index]
        # relative to the best neighbour: the same winner, and no overflow at small temperatures
        weights = ((cosines - cosines[:, :1]).double() / temperature).exp()
        for k in ks:
            votes = weights.new_zeros(len(queries), len(classes))
            votes.scatter_add_(1, voted[:, :k], weights[:, :k])
            best, order = votes.sort(dim=1, descending=True, stable=True)
            correct = (classes[order[:, :5]] == truth[:, None]) & (best[:, :5] > 0)
            hits[k][0] += int(correct[:, 0].sum())
            hits[k][1] += int(correct.any(1).sum())
    return {k: (100.0 * top1 / len(labels), 100.0 * top5 / len(labels)) for k, (top1, top5) in hits.items()}


def _nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest cosines per query and their bank indices, [r, k] each; ties by ascending index."""
    columns = max(k, _SIMILARITIES // len(queries))
    best = queries.new_empty(len(queries), 0)
    best_index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), columns):
        cosines, index = _largest(queries @ bank[start : start + columns].T, k)
        best, best_index = torch.cat([best, cosines], 1), torch.cat([best_index, index + start], 1)
        best_index, order = best_index.sort(dim=1)
        best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
        best, best_index = best[:, :k], best_index.gather(1, order)[:, :k]
    return best, best_index


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row and their columns, in any order; among equal values the lower columns."""
    if values.shape[1] <= k:
        return values, torch.arange(values.shape[1], device=values.device).expand_as(values)
    top, index = values.topk(k + 1, dim=1)
    # topk takes any of the values that equal the k-th; where one is left over, a stable sort decides instead
    tied = torch.nonzero(top[:, k - 1] == top[:, k])[:, 0]
    if len(tied):
        index[tied, :k] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return top[:, :k], index[:, :k]


def evaluate_knn(
    backbone: nn.Module,
    train: Manifest,
    test: Manifest,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    image_size: int = 224,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    num_threads: int = 0,
    progress: Progress | None = None,
) -> dict[int, tuple[float, float]]:
    """k-NN accuracy of a backbone on two labelled sets of images; arguments and result as above."""
    bank_labels, labels = matching_labels(train, test)
    features = [
        extract_features(
            backbone,
            manifest.paths,
            image_size=image_size,
            device=device,
            batch_size=batch_size,
            num_threads=num_threads,
            progress=progress,
        )
        for manifest in (train, test)
    ]
    return knn_classify(features[0], bank_labels, features[1], labels, ks, temperature, device)


def matching_labels(train: Manifest, test: Manifest) -> tuple[Tensor, Tensor]:
    """Labels of both sets, int64 [N] and [M], in the numbering of ``train``: classes match by folder name.

    Raises ValueError if a set has no labels or ``test`` has images of a class that ``train`` lacks.
    """
    for manifest in (train, test):
        if manifest.labels is None:
            raise ValueError(f"k-NN needs labels, one folder per class, but {manifest.root} has none")
    assert train.labels is not None and test.labels is not None
    number = {name: i for i, name in enumerate(train.class_names)}
    used = {test.class_names[i] for i in np.unique(test.labels)}
    known = {train.class_names[i] for i in np.unique(train.labels)}
    if used - known:
        missing = ", ".join(repr(name) for name in sorted(used - known)[:5])
        raise ValueError(
            f"{len(used - known)} classes of {test.root} have no image in {train.root}: {missing}"
        )
    renumber = np.array([number.get(name, -1) for name in test.class_names])
    return torch.from_numpy(train.labels), torch.from_numpy(renumber[test.labels])


def _validate(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperature: float,
) -> None:
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or not len(labels):
            raise ValueError(
                f"{name}_features, {name}_labels: expected [N, D] and [N] with N > 0, "
                f"got {list(features.shape)} and {list(labels.shape)}"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}_features: expected finite values, got NaN or infinity")
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"test_features: expected {train.shape[1]} columns as train_features, got {test.shape[1]}"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected numbers of neighbours of at least 1, got {list(ks)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
