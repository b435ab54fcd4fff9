"""LARS (You, Gitman & Ginsburg 2017) with the conventions of the official DINO code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose update of each matrix is scaled by ``eta |p| / |g + wd p|``.

    Parameters with one dimension (biases, norms) are neither decayed nor scaled. A norm of 0 means a scale of
    1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("momentum", momentum), ("eta", eta)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update from the ``.grad`` of the parameters; those without a gradient are left alone."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    scale = group["eta"] * p.norm() / update.norm()
                    update = update * torch.where((scale > 0) & torch.isfinite(scale), scale, 1.0)
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])
