"""LARS (You, Gitman & Ginsburg 2017) with the conventions of the official DINO code.

For every tensor, with ``c`` and ``g`` as in :mod:`~fastdino_kernels.adamw_ema`:

    u = c g + wd p,   r = eta |p| / |u|  (1 where that is 0 or not finite);   for one dimension u = c g, r = 1
    b <- momentum b + r u,   p <- p - lr b,   t <- mu t + (1 - mu) p

Without eta, ``u = c g + wd p`` and ``r = 1`` for all tensors: SGD with momentum, as ``torch.optim.SGD``.

``|u|^2 = c^2 g.g + 2 c wd g.p + wd^2 p.p``: one pass finds the three sums, in double, and NaN and infinity;
the other writes. Together 28 bytes per fp32 parameter, 36 with a teacher; 24 and 32 without eta.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import reference
from .native import call, int64, pointers, sizes
from .optimizer import Common, FusedOptimizer, Row, Rule
from .validate import check_number


class LARSGroup(NamedTuple):
    """Hyper-parameters of some tensors; lr and weight_decay may be 0-dim tensors beside the parameters."""

    lr: float | Tensor
    weight_decay: float | Tensor
    momentum: float
    eta: float | None  # None: no layer-wise scaling


class _LARS(Rule):
    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self._sums: list[float] = []  # g.g, g.p, p.p of each row that was measured

    def measure(self, rows: Sequence[Row]) -> list[float]:
        if not scales_layers(row.group for row in rows):
            return super().measure(rows)
        sums = (ctypes.c_double * (3 * len(rows)))()
        if rows:
            arrays = (pointers([row.param for row in rows]), pointers([row.grad for row in rows]))
            call("fdk_lars_sums", *int64(len(rows)), *arrays, sizes([row.param for row in rows]), sums)
        self._sums = list(sums)
        return [math.sqrt(square) for square in self._sums[::3]]

    def cpu(self, rows: Sequence[Row], factors: Sequence[float], common: Common) -> None:
        scalars: list[float] = []  # four per tensor, as fdk_lars reads them
        for i, (row, c) in enumerate(zip(rows, factors, strict=True)):
            decay, ratio = float(row.group.weight_decay), 1.0
            if row.group.eta is not None and row.param.ndim == 1:
                decay = 0.0
            elif row.group.eta is not None:
                gg, gp, pp = self._sums[3 * i : 3 * i + 3]
                square = c * c * gg + 2 * c * decay * gp + decay * decay * pp
                scale = row.group.eta * math.sqrt(pp / square) if square > 0 else math.inf
                ratio = scale if 0 < scale < math.inf else 1.0
            scalars += [ratio * c, ratio * decay, row.group.momentum, float(row.group.lr)]
        columns = zip(
            *((r.param, r.grad, *r.state, r.teacher, r.copy, r.teacher_copy) for r in rows), strict=True
        )
        call(
            "fdk_lars",
            *int64(len(rows)),
            *map(pointers, columns),
            sizes([row.param for row in rows]),
            (ctypes.c_float * len(scalars))(*scalars),
            ctypes.c_double(float(common.momentum)),
        )

    def triton(self, rows: Sequence[Row], common: Common, others: Tensor) -> tuple[Tensor, Tensor]:
        from .gpu import lars

        return lars.lars(rows, common, self.max_norm)

    def eager(self, row: Row, factor: float | Tensor, frozen: Tensor | None) -> None:
        assert row.grad is not None
        reference.lars_(
            row.param, row.grad, *row.state, **row.group._asdict(), grad_factor=factor, frozen=frozen
        )


def scales_layers(groups: Iterable[LARSGroup]) -> bool:
    """Whether some tensor's update depends on norms besides that of its gradient."""
    return any(group.eta is not None for group in groups)


class LARS(FusedOptimizer):
    """SGD with momentum whose update of each matrix is scaled by ``eta |p| / |g + wd p|``.

    Parameters with one dimension (biases, norms) are neither decayed nor scaled. A norm of 0 means a scale of
    1. One without a gradient is left alone, except that its teacher follows it.

    With ``eta=None`` nothing is scaled and all parameters of a group are decayed alike: this is
    ``torch.optim.SGD`` with momentum, fused.

    Args:
        params: student parameters or groups; a group's ``lr`` and ``weight_decay`` are read anew at each
            step and may be 0-dim tensors beside the parameters.
        momentum: of the gradients; that of the teacher is an argument of :meth:`step`.
        eta: the trust coefficient, or None.
        max_grad_norm: largest norm of each tensor's gradient; 0 switches clipping off.
        teacher_params, extra_ema, low_precision_params, low_precision_teacher: as in
            :class:`~fastdino_kernels.AdamWEMA`.
    """

    _moments = ("momentum_buffer",)
    _counts = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.0,
        weight_decay: float | Tensor = 0.0,
        *,
        momentum: float = 0.9,
        eta: float | None = 0.001,
        max_grad_norm: float = 0.0,
        teacher_params: Sequence[Tensor | None] | None = None,
        extra_ema: Sequence[tuple[Tensor, Tensor]] = (),
        low_precision_params: Sequence[Tensor | None] | None = None,
        low_precision_teacher: Sequence[Tensor | None] | None = None,
    ) -> None:
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta)
        for name, value in (*defaults.items(), ("max_grad_norm", max_grad_norm)):
            if value is not None:
                check_number(name, value)
        self._rule = _LARS(max_grad_norm)
        super().__init__(
            params, defaults, teacher_params, extra_ema, low_precision_params, low_precision_teacher
        )

    @property
    def _scales_layers(self) -> bool:
        return scales_layers(map(self._hyper, self.param_groups))

    def _hyper(self, group: dict[str, Any]) -> LARSGroup:
        return LARSGroup(group["lr"], group["weight_decay"], group["momentum"], group["eta"])
