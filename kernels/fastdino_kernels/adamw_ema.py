"""AdamW with per-tensor clipping and the teacher's EMA in one pass over the parameters.

For every tensor, with ``g`` its gradient divided by ``grad_scale`` and ``c = min(1, max_grad_norm / (|g| + 1e-6))``:

    p <- p (1 - lr wd) - lr / (1 - b1^n) m' / (sqrt(v' / (1 - b2^n)) + eps),  m' = b1 m + (1 - b1) c g,  v' = b2 v + (1 - b2) (c g)^2
    t <- mu t + (1 - mu) p

One pass measures the norms and looks for NaN and infinity; only if all gradients are finite does a second one write. The
update reads p, g, m, v, t and writes p, m, v, t: 36 bytes per fp32 parameter, where the separate steps move about 80.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import resolve


class StepResult(NamedTuple):
    """What a step found; ``grad_norms`` has one entry per parameter in the order of the groups."""

    found_inf: bool  # some gradient was NaN or infinite: nothing was changed
    grad_norms: Tensor  # [n_params] fp32: unscaled, before clipping; 0 without a gradient


class AdamWEMA(torch.optim.Optimizer):
    """``torch.optim.AdamW`` + the official per-tensor clipping + ``teacher <- momentum * teacher + (1 - momentum) * student``.

    Args:
        params: student parameters or parameter groups; ``lr`` and ``weight_decay`` of a group are read anew at each step.
        teacher_params: one teacher tensor (or None) per student parameter, in the order of the groups; None: no teacher.
        max_grad_norm: largest norm of each tensor's gradient; 0 switches clipping off.
        extra_ema: (student, teacher) pairs that follow the EMA only, such as frozen parameters outside the groups.

    A parameter without a gradient keeps its value, moments and step count, as in ``torch.optim.AdamW``; its teacher still
    follows the EMA. ``state_dict`` loads from and into ``torch.optim.AdamW``.
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
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("max_grad_norm", max_grad_norm)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        # The last entries are those torch.optim.AdamW keeps in its groups, so that it takes this state_dict.
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            amsgrad=False, maximize=False, foreach=None, capturable=False, differentiable=False, fused=None,
            decoupled_weight_decay=True,
        )  # fmt: skip
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self._params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        if teacher_params is None:
            teacher_params = [None] * len(self._params)
        if len(teacher_params) != len(self._params):
            raise ValueError(f"teacher_params: expected {len(self._params)} entries, got {len(teacher_params)}")
        self._teachers = list(teacher_params)
        self._extra_ema = list(extra_ema)
        for i, (p, t) in enumerate([*zip(self._params, self._teachers, strict=True), *self._extra_ema]):
            if t is not None and (t.shape != p.shape or t.device != p.device):
                raise ValueError(
                    f"teacher_params[{i}]: expected shape {list(p.shape)} on {p.device}, got {list(t.shape)} on {t.device}"
                )
            if t is not None and t.requires_grad:
                raise ValueError(f"teacher_params[{i}]: the teacher must not require grad")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_teachers"):
            raise ValueError("add_param_group: groups are fixed at construction, where their teachers are matched")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an :class:`AdamWEMA` or a ``torch.optim.AdamW`` over the same groups."""
        for i, group in enumerate(state_dict["param_groups"]):
            for flag in ("amsgrad", "maximize"):
                if group.get(flag):
                    raise ValueError(f"state_dict: group {i} has {flag}=True, which AdamWEMA does not implement")
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
        grads = [p.grad for p in self._params]
        norms = reference.grad_norms(grads, grad_scale)
        found_inf = not bool(torch.isfinite(norms).all())
        if not (skip or found_inf):
            self._update_reference(norms.tolist(), momentum, grad_scale)
        return StepResult(found_inf, norms)

    def _update_reference(self, norms: list[float], momentum: float, grad_scale: float) -> None:
        i = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self._state_of(p)
                    state["step"] += 1
                    reference.adamw_(
                        p, p.grad, state["exp_avg"], state["exp_avg_sq"], step=int(state["step"]), lr=group["lr"],
                        betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                        grad_factor=reference.clip_coefficient(norms[i], self.max_grad_norm) / grad_scale,
                    )  # fmt: skip
                i += 1
        pairs = [(t, p) for p, t in zip(self._params, self._teachers, strict=True) if t is not None]
        pairs += [(t, p) for p, t in self._extra_ema]
        reference.ema_update_([t for t, _ in pairs], [p for _, p in pairs], momentum)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state
