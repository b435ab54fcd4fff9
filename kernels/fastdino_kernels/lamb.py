"""LAMB (You et al. 2020, algorithm 2): AdamW whose step on each tensor is as long as the tensor allows.

For every tensor, with ``g`` its gradient divided by ``grad_scale`` and ``n`` its number of steps:

    m <- b1 m + (1 - b1) c g,   v <- b2 v + (1 - b2) (c g)^2
    u = m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + wd p
    p <- p - lr r u,  r = |p| / |u|  (1 where either is 0);   t <- mu t + (1 - mu) p

``c`` clips: first each tensor's gradient to ``max_tensor_norm``, then all together to ``max_grad_norm``.
Three passes: gradient norms, moments with the norms of p and u, and the update, which computes u again rather
than storing it: 44 bytes per fp32 parameter, 52 with a teacher.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .adamw_ema import check_betas
from .native import call, int64, pointers, sizes
from .optimizer import Common, FusedOptimizer, Row, Rule
from .validate import check_number


class LAMBGroup(NamedTuple):
    """Hyper-parameters of some tensors; lr and weight_decay may be 0-dim tensors beside the parameters."""

    lr: float | Tensor
    weight_decay: float | Tensor
    betas: tuple[float, float]
    eps: float


class _LAMB(Rule):
    def __init__(self, max_tensor_norm: float, max_grad_norm: float, exclude_1d: bool) -> None:
        self.max_norm, self.max_grad_norm, self.exclude_1d = max_tensor_norm, max_grad_norm, exclude_1d

    def adapts(self, row: Row) -> bool:
        return row.param.ndim > 1 or not self.exclude_1d

    def factors(self, norms: Tensor) -> Tensor:
        factors = super().factors(norms)
        if self.max_grad_norm > 0:
            total = torch.linalg.vector_norm(factors * norms)
            factors = factors * torch.clamp(self.max_grad_norm / total, max=1.0)
        return factors

    def cpu(self, rows: Sequence[Row], factors: Sequence[float], common: Common) -> None:
        values: list[list[float]] = []  # nine per tensor, as fdk_lamb reads them
        for row, factor in zip(rows, factors, strict=True):
            assert row.step is not None
            row.step.add_(1)
            (beta1, beta2), step = row.group.betas, int(row.step)
            corrections = [1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)]
            decay, lr = float(row.group.weight_decay), float(row.group.lr)
            values.append([factor, 1 - beta1, beta2, 1 - beta2, *corrections, row.group.eps, decay, lr])
        columns = [
            [getattr(r, name) for r in rows] for name in ("param", "grad", "teacher", "copy", "teacher_copy")
        ]
        params, grads, *followers = map(pointers, columns)
        moments = [pointers([row.state[i] for row in rows]) for i in (0, 1)]
        n, lengths, sums = int64(len(rows)), sizes(columns[0]), (ctypes.c_double * (2 * len(rows)))()
        call("fdk_lamb_moments", *n, params, grads, *moments, lengths, _floats(values), sums)
        for i, row in enumerate(rows):
            pp, uu = sums[2 * i], sums[2 * i + 1]
            values[i][-1] *= math.sqrt(pp / uu) if self.adapts(row) and pp > 0 and uu > 0 else 1.0
        momentum = ctypes.c_double(float(common.momentum))
        call("fdk_lamb", *n, params, *moments, *followers, lengths, _floats(values), momentum)

    def triton(self, rows: Sequence[Row], common: Common, others: Tensor) -> tuple[Tensor, Tensor]:
        from .gpu import lamb

        adapted = [self.adapts(row) for row in rows]
        return lamb.lamb(
            rows, common, adapted, self.max_norm, self.max_grad_norm, super().factors(others) * others
        )

    def eager(self, row: Row, factor: float | Tensor, frozen: Tensor | None) -> None:
        assert row.grad is not None and row.step is not None
        m, v = row.state
        reference.lamb_(
            row.param,
            row.grad,
            m,
            v,
            row.step,
            **row.group._asdict(),
            adapt=self.adapts(row),
            grad_factor=factor,
            frozen=frozen,
        )


class LAMB(FusedOptimizer):
    """Layer-wise adaptive AdamW for large batches.

    Args:
        params: student parameters or groups; a group's ``lr`` and ``weight_decay`` are read anew at each
            step and may be 0-dim tensors beside the parameters.
        max_grad_norm: largest norm of all gradients together, as apex's FusedLAMB clips them; 0: no clipping.
        max_tensor_norm: largest norm of each tensor's gradient, applied before; 0: no clipping.
        exclude_1d: tensors of at most one dimension (biases, norms) take the plain AdamW step, ``r = 1``.
        teacher_params, extra_ema, low_precision_params, low_precision_teacher: as in
            :class:`~fastdino_kernels.AdamWEMA`.
    """

    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        teacher_params: Sequence[Tensor | None] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float | Tensor = 0.01,
        max_grad_norm: float = 0.0,
        max_tensor_norm: float = 0.0,
        exclude_1d: bool = True,
        extra_ema: Sequence[tuple[Tensor, Tensor]] = (),
        low_precision_params: Sequence[Tensor | None] | None = None,
        low_precision_teacher: Sequence[Tensor | None] | None = None,
    ) -> None:
        numbers = dict(
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            max_tensor_norm=max_tensor_norm,
        )
        for name, value in numbers.items():
            check_number(name, value)
        check_betas(betas)
        self._rule = _LAMB(max_tensor_norm, max_grad_norm, exclude_1d)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(
            params, defaults, teacher_params, extra_ema, low_precision_params, low_precision_teacher
        )

    @property
    def _scales_layers(self) -> bool:
        return True

    def _hyper(self, group: dict[str, Any]) -> LAMBGroup:
        return LAMBGroup(group["lr"], group["weight_decay"], group["betas"], group["eps"])


def _floats(rows: Sequence[Sequence[float]]) -> ctypes.Array[ctypes.c_float]:
    values = [value for row in rows for value in row]
    return (ctypes.c_float * len(values))(*values)
