"""Logistic regression on frozen features, the low-shot protocol (DINO paper, appendix A).

The features are divided by their norm and nothing is augmented. The classifier W [C, D], without intercept,
minimises

    f(W) = 1/n sum_i CE(W x_i, y_i) + l/2 |W|^2        l = 0.1 / n

in float64. f is l-strongly convex, so f(W) - min f <= |grad f(W)|^2 / (2 l): that bound, and not the size of
a step, ends the minimisation, and it is reported. The paper solved the same problem with another solver
(to a relative duality gap of 1e-3, at most 100 epochs); L-BFGS goes to the optimum, which does not depend on
the solver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.evaluation.training import hits

_LOGITS = 1 << 25  # per block: 0.25 GiB, whatever the sizes


@dataclass
class Fit:
    """A minimiser of f."""

    weight: Tensor  # [C, D] float64 on the CPU
    objective: float
    gap: float
    """Bound on the distance of ``objective`` from the minimum."""
    iterations: int


def logistic_regression(
    features: Tensor,
    labels: Tensor,
    *,
    num_labels: int | None = None,
    decay: float | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 2000,
    device: torch.device | str | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Fit:
    """Minimise f for features [n, D], which are normalised here, and labels int [n] in 0 .. C - 1.

    ``decay`` is l (default: 0.1 / n). Ends when f is certainly within ``tolerance`` of its minimum, when
    float64 allows no more, or after ``max_iterations``: ``gap`` of the result tells. Works on ``device``, by
    default that of the features; ``progress(iterations, gap)`` is called after each iteration.
    """
    from scipy.optimize import minimize

    n, classes = len(features), num_labels or int(labels.max()) + 1
    if features.ndim != 2 or labels.shape != (n,) or n == 0:
        raise ValueError(
            f"features, labels: expected [n, D] and [n], got {list(features.shape)} and {list(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"labels: expected 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    decay = 0.1 / n if decay is None else decay
    if not decay > 0:
        raise ValueError(f"decay: expected a positive number, got {decay}")
    device = features.device if device is None else torch.device(device)
    rows = nn.functional.normalize(features.to(device, torch.float64), dim=1)  # [n, D]
    truth = labels.to(device).long()
    seen = {"gap": float("inf"), "iterations": 0}

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight = torch.from_numpy(flat).to(device).view(classes, -1)
        value, grad = _value_and_gradient(weight, rows, truth, decay)
        seen["gap"] = float(grad.square().sum()) / (2 * decay)
        return float(value), grad.cpu().numpy().ravel()

    def after_iteration(intermediate_result: object) -> None:  # scipy finds it by the argument's name
        # The gradient was last computed where the line search ended.
        seen["iterations"] += 1
        if progress is not None:
            progress(int(seen["iterations"]), seen["gap"])
        if seen["gap"] <= tolerance:
            raise StopIteration

    found = minimize(
        objective,
        np.zeros(classes * rows.shape[1]),
        jac=True,
        method="L-BFGS-B",
        callback=after_iteration,
        options={
            "maxiter": max_iterations,
            "maxfun": 4 * max_iterations,
            "maxcor": 20,
            "ftol": 0.0,
            "gtol": 0.0,
        },
    )
    value, _ = objective(found.x)  # of the returned point, whatever the solver looked at last
    return Fit(torch.from_numpy(found.x).view(classes, -1), value, seen["gap"], int(seen["iterations"]))


def _value_and_gradient(weight: Tensor, rows: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """f and its gradient [C, D] at ``weight``, over blocks of rows [n, D]."""
    size = max(1, _LOGITS // len(weight))
    value, grad = weight.new_zeros(()), torch.zeros_like(weight)
    for x, y in zip(rows.split(size), labels.split(size), strict=True):
        log_p = (x @ weight.T).log_softmax(dim=1)  # [b, C]
        value -= log_p.gather(1, y[:, None]).sum()
        error = log_p.exp_()
        error.scatter_add_(1, y[:, None], torch.full_like(error[:, :1], -1.0))
        grad.addmm_(error.T, x)
    return value / len(rows) + decay / 2 * weight.square().sum(), grad / len(rows) + decay * weight


def accuracy(fit: Fit, features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in percent on features [m, D], normalised here, and labels [m]."""
    total = torch.zeros(2, dtype=torch.int64)
    for x, y in zip(features.split(4096), labels.split(4096), strict=True):
        total += hits(nn.functional.normalize(x.double(), dim=1) @ fit.weight.T, y)
    top1, top5 = (100.0 * total / len(labels)).tolist()
    return top1, top5
