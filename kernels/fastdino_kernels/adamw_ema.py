"""AdamW with per-tensor clipping and the teacher's EMA in one pass over the parameters.

For every tensor, with ``g`` its gradient divided by ``grad_scale``, ``c = min(1, max_grad_norm / (|g| +
1e-6))`` and ``n`` its number of steps:

    m <- b1 m + (1 - b1) c g,   v <- b2 v + (1 - b2) (c g)^2
    p <- (1 - lr wd) p - lr / (1 - b1^n) m / (sqrt(v / (1 - b2^n)) + eps)
    t <- mu t + (1 - mu) p

One pass measures the norms and looks for NaN and infinity; only if all gradients are finite does a second one
write. It
reads p, g, m, v, t and writes p, m, v, t: 36 bytes per fp32 parameter, where the separate steps move about
80.
"""

from __future__ import annotations

import ctypes
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import resolve
from .ema import ema_update_, grad_norms, is_plain
from .native import call, int64, pointers, sizes


class StepResult(NamedTuple):
    """What a step found; ``grad_norms`` has one entry per parameter in the order of the groups."""

    found_inf: bool  # some gradient was NaN or infinite: nothing was changed
    grad_norms: Tensor  # [n_params] fp32: unscaled, before clipping; 0 without a gradient


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


class AdamWEMA(torch.optim.Optimizer):
    """``torch.optim.AdamW``, the official per-tensor clipping and the teacher's EMA, fused.

    Args:
        params: student parameters or groups; a group's ``lr`` and ``weight_decay`` are read anew at each
            step.
        teacher_params: one teacher tensor (or None) per student parameter, in the order of the groups.
        max_grad_norm: largest norm of each tensor's gradient; 0 switches clipping off.
        extra_ema: (student, teacher) pairs that follow the EMA only, such as parameters outside the groups.

    A parameter without a gradient keeps its value, moments and step count, as in ``torch.optim.AdamW``; its
    teacher still follows the EMA. ``state_dict`` loads from and into ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        teacher_params: Sequence[Tensor | None] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        extra_ema: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        numbers = dict(lr=lr, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        for name, value in numbers.items():
            if not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **_TORCH_ADAMW_FLAGS)
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self._params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        if teacher_params is None:
            teacher_params = [None] * len(self._params)
        if len(teacher_params) != len(self._params):
            raise ValueError(
                f"teacher_params: expected {len(self._params)} entries, got {len(teacher_params)}"
            )
        self._teachers = list(teacher_params)
        self._extra_ema = list(extra_ema)
        for i, (p, t) in enumerate(zip(self._params, self._teachers, strict=True)):
            _check_teacher(f"teacher_params[{i}]", p, t)
        for i, (p, t) in enumerate(self._extra_ema):
            _check_teacher(f"extra_ema[{i}]", p, t)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_teachers"):
            raise ValueError("add_param_group: groups are fixed once their teachers are matched")
        # torch's decorator keeps torch.compile out of this method by importing all of it, which takes longer
        # than the rest of the start; nobody compiles this.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an :class:`AdamWEMA` or a ``torch.optim.AdamW`` over the same groups."""
        for i, group in enumerate(state_dict["param_groups"]):
            for flag in ("amsgrad", "maximize"):
                if group.get(flag):
                    raise ValueError(f"state_dict: group {i} has {flag}=True, unknown to AdamWEMA")
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, *, momentum: float, grad_scale: float = 1.0, skip: bool = False) -> StepResult:  # type: ignore[override]
        """One update from the ``.grad`` of the parameters.

        Args:
            momentum: of the teacher, in [0, 1].
            grad_scale: gradients are divided by it (loss scale times accumulated micro-batches).
            skip: measure the norms, change nothing.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")
        if not grad_scale > 0:
            raise ValueError(f"grad_scale: expected a number > 0, got {grad_scale}")
        norms = grad_norms([p.grad for p in self._params], grad_scale)
        found_inf = not bool(torch.isfinite(norms).all())
        if not (skip or found_inf):
            self._update(norms.tolist(), momentum, grad_scale)
        return StepResult(found_inf, norms)

    def _update(self, norms: list[float], momentum: float, grad_scale: float) -> None:
        fused: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]] = []  # p, g, m, v, t
        scalars: list[float] = []  # eight per tensor, as fdk_adamw_ema reads them
        followers = [(t, p) for p, t in self._extra_ema]
        for (group, p), teacher, norm in zip(self._grouped(), self._teachers, norms, strict=True):
            if p.grad is not None:
                state = self._state_of(p)
                state["step"] += 1
                factor = reference.clip_coefficient(norm, self.max_grad_norm) / grad_scale
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                if all(is_plain(x, p) for x in (*tensors, teacher)) and resolve(p) == "cpu":
                    fused.append((*tensors, teacher))
                    scalars += _scalars(group, int(state["step"]), factor)
                    continue
                reference.adamw_(
                    *tensors,
                    step=int(state["step"]),
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    grad_factor=factor,
                )
            if teacher is not None:
                followers.append((teacher, p))
        if fused:
            columns = [[row[i] for row in fused] for i in range(5)]
            call(
                "fdk_adamw_ema",
                *int64(len(fused)),
                *map(pointers, columns),
                sizes([row[0] for row in fused]),
                (ctypes.c_float * len(scalars))(*scalars),
                ctypes.c_double(momentum),
            )
        ema_update_([t for t, _ in followers], [p for _, p in followers], momentum)

    def _grouped(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        return ((group, p) for group in self.param_groups for p in group["params"])

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _scalars(group: dict[str, Any], step: int, grad_factor: float) -> list[float]:
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    decay, step_size = 1 - lr * group["weight_decay"], lr / (1 - beta1**step)
    inv_sqrt_correction2 = 1 / math.sqrt(1 - beta2**step)
    return [grad_factor, decay, step_size, inv_sqrt_correction2, 1 - beta1, beta2, 1 - beta2, group["eps"]]


def _check_teacher(name: str, param: Tensor, teacher: Tensor | None) -> None:
    if teacher is None:
        return
    if teacher.shape != param.shape or teacher.device != param.device:
        expected, got = (f"shape {list(x.shape)} on {x.device}" for x in (param, teacher))
        raise ValueError(f"{name}: expected {expected}, got {got}")
    if teacher.requires_grad:
        raise ValueError(f"{name}: the teacher must not require grad")
