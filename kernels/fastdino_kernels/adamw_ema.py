"""AdamW with per-tensor clipping and the teacher's EMA in one pass over the parameters.

For every tensor, with ``g`` its gradient divided by ``grad_scale``, ``c = min(1, max_grad_norm / (|g| +
1e-6))`` and ``n`` its number of steps:

    m <- b1 m + (1 - b1) c g,   v <- b2 v + (1 - b2) (c g)^2
    p <- (1 - lr wd) p - lr / (1 - b1^n) m / (sqrt(v / (1 - b2^n)) + eps)
    t <- mu t + (1 - mu) p

One pass measures the norms and looks for NaN and infinity; only if all gradients are finite does a second one
write. It reads p, g, m, v, t and writes p, m, v, t: 36 bytes per fp32 parameter, where the separate steps
move about 80. 16-bit copies of p or t add 2 bytes each.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .native import call, int64, pointers, sizes
from .optimizer import Common, FusedOptimizer, Row, Rule, StepResult, check_copy, update
from .validate import check_number

# What torch.optim.AdamW keeps in its groups besides, so that it takes our state_dict.
_TORCH_ADAMW_FLAGS = dict(
    amsgrad=False,
    maximize=False,
    foreach=None,
    capturable=False,
    differentiable=False,
    fused=None,
    decoupled_weight_decay=True,
)


class AdamWGroup(NamedTuple):
    """Hyper-parameters of some tensors; lr and weight_decay may be 0-dim tensors beside the parameters."""

    lr: float | Tensor
    weight_decay: float | Tensor = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class AdamWScalars(NamedTuple):
    """Numbers of one step; those but the clipping may be 0-dim tensors beside the parameters.

    On a GPU such tensors are read there, in a CUDA graph at each replay."""

    groups: Sequence[AdamWGroup]  # one per tensor; tensors of one group share the object
    momentum: float | Tensor = 1.0  # of the teacher, in [0, 1]
    grad_scale: float | Tensor = 1.0  # gradients are divided by it
    max_grad_norm: float = 0.0  # of each tensor, 0: no clipping
    skip: bool | Tensor = False  # measure the norms, change nothing


class _AdamW(Rule):
    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def cpu(self, rows: Sequence[Row], factors: Sequence[float], common: Common) -> None:
        scalars: list[float] = []  # eight per tensor, as fdk_adamw_ema reads them
        for row, factor in zip(rows, factors, strict=True):
            assert row.step is not None
            row.step.add_(1)
            beta1, beta2 = row.group.betas
            lr, step = float(row.group.lr), int(row.step)
            decay, step_size = 1 - lr * float(row.group.weight_decay), lr / (1 - beta1**step)
            scalars += [factor, decay, step_size, 1 / math.sqrt(1 - beta2**step)]
            scalars += [1 - beta1, beta2, 1 - beta2, row.group.eps]
        columns = zip(
            *((r.param, r.grad, *r.state, r.teacher, r.copy, r.teacher_copy) for r in rows), strict=True
        )
        call(
            "fdk_adamw_ema",
            *int64(len(rows)),
            *map(pointers, columns),
            sizes([row.param for row in rows]),
            (ctypes.c_float * len(scalars))(*scalars),
            ctypes.c_double(float(common.momentum)),
        )

    def triton(self, rows: Sequence[Row], common: Common, others: Tensor) -> tuple[Tensor, Tensor]:
        from .gpu import adamw_ema

        return adamw_ema.adamw_ema(rows, common, self.max_norm)

    def eager(self, row: Row, factor: float | Tensor, frozen: Tensor | None) -> None:
        assert row.grad is not None and row.step is not None
        m, v = row.state
        reference.adamw_(
            row.param,
            row.grad,
            m,
            v,
            row.step,
            **row.group._asdict(),
            grad_factor=factor,
            frozen=frozen,
        )


def adamw_ema_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    teacher: Sequence[Tensor | None],
    scalars: AdamWScalars,
    *,
    low_precision: tuple[Sequence[Tensor | None] | None, Sequence[Tensor | None] | None] = (None, None),
) -> StepResult:
    """The formulas above for lists of tensors, in place; :class:`AdamWEMA` keeps the lists for you.

    Args:
        params: fp32 (other dtypes take the eager path), any shapes, all on one device.
        grads: of their shapes, or None: then the parameter, its moments and its count stay, and only the
            teacher and the copies follow.
        exp_avgs, exp_avg_sqs, steps: moments, and 0-dim fp32 counts of the steps so far beside the
            parameters; None is fine where there is no gradient.
        teacher: of their shapes, or None.
        scalars: numbers of the step.
        low_precision: bf16 or fp16 tensors that receive the new parameters, and those for the teachers.

    Nothing changes, not even ``steps``, if a gradient holds NaN or infinity, or with ``scalars.skip``. On a
    GPU all of this is decided there: the host waits for nothing.

    Raises: TypeError, ValueError naming the argument.
    """
    n = len(params)
    copies = [c if c is not None else [None] * n for c in low_precision]
    lists = dict(
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        steps=steps,
        teacher=teacher,
        groups=scalars.groups,
    )
    for name, values in (*lists.items(), *(("low_precision", c) for c in copies)):
        if len(values) != n:
            raise ValueError(f"{name}: expected {n} entries, as many as params, got {len(values)}")
    check_number("momentum", scalars.momentum, 0, 1)
    check_number("grad_scale", scalars.grad_scale, positive=True)
    check_number("max_grad_norm", scalars.max_grad_norm)
    rows = []
    for i, (p, g, m, v, step, t, group, c, tc) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, teacher, scalars.groups, *copies, strict=True)
    ):
        for name, x in (("grads", g), ("exp_avgs", m), ("exp_avg_sqs", v), ("teacher", t)):
            if x is not None and (x.shape != p.shape or x.device != p.device):
                raise ValueError(
                    f"{name}[{i}]: expected {list(p.shape)} on {p.device}, got {list(x.shape)} on {x.device}"
                )
        if g is not None and (m is None or v is None or step is None):
            raise ValueError(f"steps[{i}]: expected moments and a count for a parameter with a gradient")
        if step is not None and (step.dim() or step.dtype != torch.float32 or step.device != p.device):
            raise ValueError(f"steps[{i}]: expected a 0-dim float32 tensor on {p.device}, got {step.dtype}")
        check_copy(f"low_precision[0][{i}]", p, c)
        check_copy(f"low_precision[1][{i}]", t, tc)
        moments = () if g is None or m is None or v is None else (m, v)
        rows.append(Row(p, g, moments, step, t, c, tc, group))
    return update(
        _AdamW(scalars.max_grad_norm), rows, Common(scalars.momentum, scalars.grad_scale, scalars.skip)
    )


class AdamWEMA(FusedOptimizer):
    """``torch.optim.AdamW``, the official per-tensor clipping and the teacher's EMA, fused.

    Args:
        params: student parameters or groups; a group's ``lr`` and ``weight_decay`` are read anew at each
            step and may be 0-dim tensors beside the parameters.
        teacher_params: one teacher tensor (or None) per student parameter, in the order of the groups.
        max_grad_norm: largest norm of each tensor's gradient; 0 switches clipping off.
        extra_ema: (student, teacher) pairs that follow the EMA only, such as parameters outside the groups.
        low_precision_params, low_precision_teacher: one bf16 or fp16 tensor (or None) per parameter: copies
            of the parameters and of the teachers that every step renews.

    A parameter without a gradient keeps its value, moments and step count, as in ``torch.optim.AdamW``; its
    teacher still follows the EMA. ``state_dict`` loads from and into ``torch.optim.AdamW``; on a GPU the step
    counts lie there.
    """

    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        teacher_params: Sequence[Tensor | None] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        max_grad_norm: float = 0.0,
        extra_ema: Sequence[tuple[Tensor, Tensor]] = (),
        low_precision_params: Sequence[Tensor | None] | None = None,
        low_precision_teacher: Sequence[Tensor | None] | None = None,
    ) -> None:
        numbers = dict(lr=lr, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        for name, value in numbers.items():
            check_number(name, value)
        check_betas(betas)
        self._rule = _AdamW(max_grad_norm)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **_TORCH_ADAMW_FLAGS)
        super().__init__(
            params, defaults, teacher_params, extra_ema, low_precision_params, low_precision_teacher
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an :class:`AdamWEMA` or a ``torch.optim.AdamW`` over the same groups."""
        for i, group in enumerate(state_dict["param_groups"]):
            for flag in ("amsgrad", "maximize"):
                if group.get(flag):
                    raise ValueError(f"state_dict: group {i} has {flag}=True, unknown to AdamWEMA")
        super().load_state_dict(state_dict)

    def _hyper(self, group: dict[str, Any]) -> AdamWGroup:
        return AdamWGroup(group["lr"], group["weight_decay"], group["betas"], group["eps"])


def check_betas(betas: tuple[float, float]) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
