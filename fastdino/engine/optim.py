"""The update: unscale, per-tensor clip, optimizer step and teacher EMA behind one call, and its state by
parameter name.

AdamW, LARS and LAMB are fused with clipping and EMA; SGD is torch's, followed by the multi-tensor EMA. A step
whose gradients are not finite changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from fastdino_kernels import LAMB, LARS, AdamWEMA, clip_grad_per_tensor_, ema_update_
from torch import Tensor, nn

from fastdino.config import OptimConfig
from fastdino.engine.schedules import Hyper


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two groups: decayed tensors, then biases and 1-D tensors without decay (official
    ``get_params_groups``).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


class Update(NamedTuple):
    """What an update did: ``skipped`` when a gradient was not finite, ``grad_norms`` [tensors] before
    clipping, 0 without a gradient.
    """

    skipped: bool
    grad_norms: Tensor


class Updater:
    """Optimizer of the student and EMA of the teacher."""

    def __init__(self, student: nn.Module, teacher: nn.Module, config: OptimConfig):
        self.names = {p: name for name, p in student.named_parameters()}
        self.clip = config.clip_grad
        teacher_of = dict(teacher.named_parameters())
        groups = parameter_groups(student)
        trained = [p for g in groups for p in g["params"]]
        frozen = [p for p in self.names if not p.requires_grad]
        self.pairs = [(p, teacher_of[self.names[p]]) for p in trained + frozen]  # (student, teacher)
        fused: dict[str, Any] = dict(
            lr=0.0,
            teacher_params=[teacher_of[self.names[p]] for p in trained],
            extra_ema=[(p, teacher_of[self.names[p]]) for p in frozen],
        )
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            self.optimizer = AdamWEMA(groups, max_grad_norm=config.clip_grad, **fused)
        elif config.optimizer == "lars":
            self.optimizer = LARS(groups, max_grad_norm=config.clip_grad, **fused)
        elif config.optimizer == "lamb":
            self.optimizer = LAMB(groups, max_tensor_norm=config.clip_grad, **fused)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def step(self, hyper: Hyper, *, grad_scale: float = 1.0, skip: bool = False) -> Update:
        """Apply the gradients (divided by ``grad_scale``) and move the teacher; with ``skip`` or a non-finite
        gradient, nothing.
        """
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = hyper.lr
            group["weight_decay"] = hyper.weight_decay if index == 0 else 0.0
        if isinstance(self.optimizer, (AdamWEMA, LARS, LAMB)):
            result = self.optimizer.step(momentum=hyper.momentum, grad_scale=grad_scale, skip=skip)
            return Update(skip or bool(result.found_inf), result.grad_norms)
        parameters = self.parameters()
        norms = clip_grad_per_tensor_(parameters, self.clip, grad_scale=grad_scale)
        if skip or not bool(torch.isfinite(norms).all()):
            return Update(True, norms)
        self.optimizer.step()
        ema_update_([t for _, t in self.pairs], [s.detach() for s, _ in self.pairs], hyper.momentum)
        return Update(False, norms)

    def state(self) -> dict[str, Tensor]:
        """Optimizer state as flat names: ``exp_avg.<parameter>``, ``exp_avg_sq.<parameter>``,
        ``step.<parameter>``, ...
        """
        return {
            f"{key}.{self.names[parameter]}": value  # type: ignore[index]
            for parameter, entry in self.optimizer.state.items()
            for key, value in entry.items()
            if isinstance(value, Tensor)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state`; a parameter without entries starts afresh (a last layer that was frozen
        so far).

        Raises KeyError for entries of unknown parameters and ValueError for a shape that does not fit.
        """
        by_name = {self.names[p]: p for p in self.parameters()}
        entries: dict[Tensor, dict[str, Tensor]] = {}
        for flat, value in state.items():
            key, _, name = flat.partition(".")
            if name not in by_name:
                raise KeyError(f"optimizer state {flat}: the model has no trained parameter {name}")
            parameter = by_name[name]
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state {flat}: expected shape {tuple(parameter.shape)}, "
                    f"got {tuple(value.shape)}"
                )
            entries.setdefault(parameter, {})[key] = value.to(parameter.device, copy=True)
        self.optimizer.state.clear()
        self.optimizer.state.update(entries)
