"""Weighted votes of nearest neighbours, and where the true class stands among them.

    votes_c(k) = sum of w_i over the first k neighbours i of class c
    rank(k) = number of classes c with votes_c > votes_t, or votes_c = votes_t and c < t;  t is the true class

so top-1 is rank 0 and top-5 is rank below 5, for all k in one pass and without a table [rows, classes].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import resolve
from .native import call, empty, int64, pointer, tensor


def class_votes(classes: Tensor, weights: Tensor, truth: Tensor, *, ks: Sequence[int], number: int) -> Tensor:
    """Ranks of the true classes, int64 [rows, len(ks)]; -1 where no vote is above zero.

    `classes`: int64 [rows, k] of the neighbours, best first, each in 0 ... `number` - 1. `weights`: float64
    [rows, k], not negative. `truth`: int64 [rows], below `number`; negative for a class without neighbours.
    `ks`: ascending numbers of neighbours, 1 ... k. Classes are checked on the CPU only.

    Raises TypeError or ValueError naming the argument.
    """
    for name, x in (("classes", classes), ("weights", weights), ("truth", truth)):
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.device != classes.device:
            raise TypeError(f"{name}: expected a dense tensor, all on one device, got {type(x).__name__}")
    if classes.dtype != torch.int64 or truth.dtype != torch.int64 or weights.dtype != torch.float64:
        raise TypeError(
            "classes, weights, truth: expected int64, float64 and int64, got "
            f"{classes.dtype}, {weights.dtype} and {truth.dtype}"
        )
    if classes.ndim != 2 or weights.shape != classes.shape or truth.shape != classes.shape[:1]:
        raise ValueError(
            "classes, weights, truth: expected [rows, k], [rows, k] and [rows], got "
            f"{list(classes.shape)}, {list(weights.shape)} and {list(truth.shape)}"
        )
    if list(ks) != sorted(ks) or not all(1 <= k <= classes.shape[1] for k in ks):
        raise ValueError(f"ks: expected ascending numbers of 1 to {classes.shape[1]}, got {list(ks)}")
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"number: expected a whole number, at least 1, got {number!r}")
    if classes.device.type == "cpu" and classes.numel():
        low, high = (int(x) for x in classes.aminmax())
        if low < 0 or max(high, int(truth.max())) >= number:
            raise ValueError(
                f"classes, truth: expected numbers of 0 to {number - 1} (negative ones for truth alone), got "
                f"{low} to {high} and up to {int(truth.max())}"
            )
    if resolve(classes) != "cpu":
        return _reference(classes, weights, truth, ks, number)
    ranks = empty(len(classes), len(ks), dtype=torch.int64)
    classes, weights, truth = classes.contiguous(), weights.contiguous(), truth.contiguous()
    steps = tensor(list(ks), dtype=torch.int64)
    call(
        "fdk_class_votes",
        *int64(*classes.shape),
        *(pointer(x) for x in (classes, weights, truth)),
        *int64(number),
        pointer(steps),
        *int64(len(ks)),
        pointer(ranks),
    )
    return ranks


def _reference(classes: Tensor, weights: Tensor, truth: Tensor, ks: Sequence[int], number: int) -> Tensor:
    rows, done, ranks = len(classes), 0, []
    votes = weights.new_zeros(rows, number)
    order = torch.arange(number, device=classes.device)
    for k in ks:
        votes.scatter_add_(1, classes[:, done:k], weights[:, done:k])
        done = k
        own = votes.gather(1, truth.clamp(min=0)[:, None])  # [rows, 1]
        before = (votes > own) | ((votes == own) & (order < truth[:, None]))
        ranks.append(torch.where((truth >= 0) & (own[:, 0] > 0), before.sum(1), -1))
    return torch.stack(ranks, dim=1) if ranks else truth.new_empty(rows, 0)
