"""Weighted k-nearest-neighbour classification of frozen features (DINO paper, section 4.2 and appendix F.1).

Every training feature is a neighbour candidate. For a test feature ``x`` and its ``k`` nearest neighbours by
cosine, class ``c`` receives the votes ``sum over neighbours i of class c of exp(cos(x, x_i) / T)``; the class
with most votes wins. Nothing is trained, so the result depends on the features alone.

The bank is read once, for all queries and all ``k``: a block of it is multiplied with some queries at a time,
and what comes out goes through `fastdino_kernels.top_k` while it is still in the cache. So the bank may be
mapped from a file, or shared out among processes. Memory beside the features, for N bank and M test features
of D numbers, k neighbours at most, r x c the largest block (512 x 4096 on a CPU, 1024 x 65536 on a GPU):
4 M D + (16 k + 264) M + 4 r c + 8 c D bytes, plus labels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fastdino_kernels.class_votes import class_votes
from fastdino_kernels.top_k import RunningTopK
from torch import Tensor, nn

from fastdino.data.manifest import Manifest
from fastdino.engine.parallel import World
from fastdino.evaluation.features import Progress, extract_features, share

_BLOCKS = {"cpu": (512, 4096), "cuda": (1024, 1 << 16)}
"""Queries and bank features whose cosines are computed at a time."""
_VOTERS = 1024  # queries whose votes are counted at a time


@torch.no_grad()
def knn_classify(
    train_features: Tensor,
    train_labels: Tensor | np.ndarray,
    test_features: Tensor,
    test_labels: Tensor | np.ndarray,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str | None = None,
    *,
    world: World | None = None,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in percent for each number of neighbours: ``{k: (top1, top5)}``.

    Features: float [N, D] and [M, D], normalised here; labels: int [N] and [M], any values. A ``k`` beyond
    the bank uses all of it. Top-5 counts a class only if a neighbour voted for it. Equal cosines go to the
    lower bank index, equal votes to the lower label, so the result is a function of the features. Works block
    by block on ``device``, by default that of the features.

    Each process of a ``world`` passes its own part of the bank, which may be empty, and all the same test
    features; parts count in order of rank, and the result, the same everywhere, is that of the whole bank.

    Raises ValueError naming the argument.
    """
    alone = world is None or world.size == 1
    bank_labels, labels = (torch.as_tensor(x).long().cpu() for x in (train_labels, test_labels))
    _validate(train_features, bank_labels, test_features, labels, ks, temperature, alone)
    device = torch.device(device) if device is not None else train_features.device
    parts = [bank_labels] if alone else _everyones(bank_labels)
    sizes, kinds = [len(part) for part in parts], torch.cat(parts).unique()
    if not sum(sizes):
        raise ValueError("train_features: expected at least one feature in one of the processes")
    classes, truth = (_number(x, kinds).to(device) for x in (bank_labels, labels))
    largest = min(max(ks), sum(sizes))
    steps = sorted({min(k, largest) for k in ks})

    with _exact_products():
        nearest = _nearest(test_features, train_features, largest, device)
    hits = torch.zeros(len(steps), 2, dtype=torch.int64, device=device)
    for start in range(0, len(labels), _VOTERS):
        stop = min(start + _VOTERS, len(labels))
        if nearest is None:
            cosines, voted = torch.empty(stop - start, 0, device=device), truth.new_empty(stop - start, 0)
        else:
            cosines, index = nearest.best(start, stop)  # [r, k], descending
            voted = classes[index]
        if not alone:
            cosines, voted = _best_of_all(cosines, voted, sizes, largest)
        # relative to the best neighbour: the same winner, and no overflow at small temperatures
        weights = ((cosines - cosines[:, :1]).double() / temperature).exp()
        ranks = class_votes(voted, weights, truth[start:stop], ks=steps, number=len(kinds))
        hits[:, 0] += (ranks == 0).sum(0)
        hits[:, 1] += ((ranks >= 0) & (ranks < 5)).sum(0)
    percent = (100.0 * hits.double() / len(labels)).tolist()
    found = {step: (top1, top5) for step, (top1, top5) in zip(steps, percent, strict=True)}
    return {k: found[min(k, largest)] for k in ks}


def _nearest(queries: Tensor, bank: Tensor, k: int, device: torch.device) -> RunningTopK | None:
    """The ``k`` largest cosines of each query with the bank; None of an empty bank."""
    if not len(bank):
        return None
    rows, columns = _BLOCKS["cuda" if device.type == "cuda" else "cpu"]
    rows, columns = min(rows, len(queries)), min(columns, len(bank))
    unit = torch.empty(len(queries), queries.shape[1], device=device)  # whole: all blocks of the bank meet it
    for row in range(0, len(queries), rows):
        unit[row : row + rows] = _unit(queries[row : row + rows], "test", device)
    products = torch.empty(rows * columns, device=device)
    nearest = RunningTopK(len(queries), k, device)
    for column in range(0, len(bank), columns):
        block = _unit(bank[column : column + columns], "train", device)  # [c, D]
        for row in range(0, len(unit), rows):
            some = unit[row : row + rows]
            cosines = products[: len(some) * len(block)].view(len(some), len(block))
            torch.mm(some, block.T, out=cosines)
            nearest.add(cosines, column, row)
    return nearest


@contextmanager
def _exact_products() -> Iterator[None]:
    """fp32 products in fp32, whatever a training run chose for its own."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _unit(features: Tensor, name: str, device: torch.device) -> Tensor:
    """fp32 rows of length 1 on ``device``."""
    features = features.to(device).float()
    lengths = features.norm(dim=1, keepdim=True)
    # few numbers tell that all is well; the rest is looked at only when they do not
    if not torch.isfinite(lengths).all() and not torch.isfinite(features).all():
        raise ValueError(f"{name}_features: expected finite values, got NaN or infinity")
    return features / lengths.clamp(min=1e-12)


def _best_of_all(cosines: Tensor, classes: Tensor, sizes: list[int], largest: int) -> tuple[Tensor, Tensor]:
    """The nearest neighbours among those that the processes found in their parts of the bank, [r, k] of
    both; equal cosines go to the lower rank. Their numbers of neighbours are known from ``sizes``.
    """
    widths = [min(largest, size) for size in sizes]
    both = cosines.new_full((len(cosines), max(widths), 2), -2.0, dtype=torch.float64)
    both[:, : cosines.shape[1], 0], both[:, : cosines.shape[1], 1] = cosines.double(), classes.double()
    parts = [torch.empty_like(both) for _ in sizes]
    dist.all_gather(parts, both)
    every = torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
    best, order = every[..., 0].sort(dim=1, descending=True, stable=True)
    order = order[:, :largest]
    return best[:, :largest].float(), every[..., 1].gather(1, order).long()


def _everyones(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _number(labels: Tensor, kinds: Tensor) -> Tensor:
    """Index of each label in the ascending ``kinds``, -1 where it is none of them."""
    index = torch.searchsorted(kinds, labels).clamp(max=len(kinds) - 1)
    return torch.where(kinds[index] == labels, index, -1)


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
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    world: World | None = None,
) -> dict[int, tuple[float, float]]:
    """k-NN accuracy of a backbone on two labelled sets of images; arguments and result as above.

    The processes of a ``world`` share the work, and each keeps only its part of the bank.
    """
    bank_labels, labels = matching_labels(train, test)
    extract = functools.partial(
        extract_features,
        backbone,
        image_size=image_size,
        device=device,
        batch_size=batch_size,
        num_threads=num_threads,
        dtype=dtype,
        progress=progress,
    )
    queries = extract(test.paths, world=world)
    own = share(len(train), batch_size, world)
    mine = [train.paths[i] for i in range(own.start, own.stop)]
    bank = extract(mine) if mine else queries[:0]
    return knn_classify(bank, bank_labels[own], queries, labels, ks, temperature, device, world=world)


def matching_labels(train: Manifest, test: Manifest) -> tuple[Tensor, Tensor]:
    """Labels of both sets, int64 [N] and [M], in the numbering of ``train``: classes match by folder name.

    Raises ValueError if a set has no labels or ``test`` has images of a class that ``train`` lacks.
    """
    for manifest in (train, test):
        if manifest.labels is None:
            raise ValueError(f"labels are needed, one folder per class, but {manifest.root} has none")
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
    whole: bool,
) -> None:
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        few = not len(labels) and (whole or name == "test")
        if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or few:
            raise ValueError(
                f"{name}_features, {name}_labels: expected [N, D] and [N] with N > 0, "
                f"got {list(features.shape)} and {list(labels.shape)}"
            )
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"test_features: expected {train.shape[1]} columns as train_features, got {test.shape[1]}"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected numbers of neighbours of at least 1, got {list(ks)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
