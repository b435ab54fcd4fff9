"""Losses from their formulas, a pair of views at a time, and a small configuration of every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import Config, validate, with_flags
from fastdino.data.loader import Crops
from tests.engine.test_step import N_LOCAL, B, batches, tiny_config

SMALL = {"hidden_mlp": 24, "feat_dim": 16, "predictor_hidden_dim": 20}
SIBLINGS: dict[str, dict[str, Any]] = {
    "byol": {"method": "byol", **SMALL},
    "mocov2": {"method": "mocov2", "queue_length": 32, **SMALL},
    "swav": {"method": "swav", "nmb_prototypes": 20, **SMALL},
    "swav-queue": {
        "method": "swav",
        "nmb_prototypes": 20,
        "queue_length": 2 * B,
        "epoch_queue_starts": 0,
        **SMALL,
    },
}
SWITCHES: dict[str, dict[str, Any]] = {
    "softmax_batch": {"teacher_op": "softmax_batch"},
    "sinkhorn": {"teacher_op": "sinkhorn"},
    "one-hot": {"teacher_temp": 0.0, "warmup_teacher_temp_epochs": 0},
    "mse": {"loss": "mse"},
    "infonce": {"loss": "infonce", "queue_length": 32},
    "predictor": {"predictor": "on", "predictor_hidden_dim": 20},
    "copy": {"teacher": "copy"},
    "prev_iter": {"teacher": "prev_iter"},
    "prev_epoch": {"teacher": "prev_epoch"},
    "copy-sinkhorn": {"teacher": "copy", "teacher_op": "sinkhorn"},
    "esvit": {"method": "esvit"},
}


def configured(**flags: Any) -> Config:
    config = with_flags(tiny_config(), {"device": "cpu", "precision": "fp32"} | flags)
    validate(config, 1)
    return config


def crops(seed: int = 0) -> Crops:
    return next(batches(seed))


def views(batch: Crops) -> list[Tensor]:
    local = [] if batch.local is None else batch.local.chunk(N_LOCAL)
    return [*batch.global_.chunk(2), *local]


def mean_over_pairs(term: Callable[[int, int], Tensor], n_views: int) -> Tensor:
    """Of target view g in {0, 1} and view v != g."""
    pairs = [(g, v) for g in range(2) for v in range(n_views) if g != v]
    return torch.stack([term(g, v) for g, v in pairs]).mean()


def cross_entropy(targets: Sequence[Tensor], logits: Sequence[Tensor], temp: float) -> Tensor:
    return mean_over_pairs(
        lambda g, v: -(targets[g] * F.log_softmax(logits[v] / temp, -1)).sum(-1).mean(), len(logits)
    )


def sinkhorn(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """Equal sums for all prototypes, then rows that are distributions, over and over."""
    q = torch.exp((logits.double() - logits.max()) / temp)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q.float()


def perturb(module: nn.Module, seed: int = 7) -> None:
    """Move all parameters, so that nothing is equal by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [module.get_parameter(n) for n in names], allow_unused=True)
    return {n: torch.zeros(()) if g is None else g for n, g in zip(names, found, strict=True)}


def assert_same_loss(module: nn.Module, ours: Tensor, expected: Tensor) -> None:
    """Values and gradients with respect to the parameters of ``module``."""
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)
    a, b = gradients(module, ours), gradients(module, expected)
    scale = max(float(g.abs().max()) for g in b.values())
    assert scale > 1e-4
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5 * scale, msg=name)
