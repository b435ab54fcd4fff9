"""The update: unscale, per-tensor clip, optimizer step and teacher EMA behind one call, and its state by
parameter name.

All optimizers are fused with clipping, EMA and the 16-bit copies of the weights. A step whose gradients are
not finite changes nothing, which is decided where the gradients are. Of a model that is sharded over
processes, each process updates its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fastdino_kernels import LAMB, LARS, AdamWEMA, grad_square_sums
from torch import Tensor, nn

from fastdino.config import OptimConfig
from fastdino.engine import rows
from fastdino.engine.checkpoint import Piece


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


class Updater:
    """Optimizer of the student and EMA of the teacher, if there is one; it follows the student's parameters
    of the same names.

    ``copies`` are 16-bit copies of parameters of either, which every update renews. With ``lagging`` the
    teacher becomes the student as it was before the step, whatever the momentum.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        config: OptimConfig,
        *,
        copies: Mapping[nn.Parameter, Tensor] | None = None,
        lagging: bool = False,
    ):
        self.student, self.teacher, self.lagging = student, teacher, lagging
        self.copies = dict(copies or {})
        teacher_of = {} if teacher is None else dict(teacher.named_parameters())
        self.names = {p: name for name, p in student.named_parameters()}
        groups = parameter_groups(student)
        self.parameters: list[nn.Parameter] = [p for g in groups for p in g["params"]]
        last = ("head.last_layer.", "head_dense.last_layer.")
        self.last_layer = [p for p in self.parameters if self.names[p].startswith(last)]
        frozen = {p for p in self.names if not p.requires_grad}
        self.shards = rows.shard_group(student)  # processes that hold the rows of one copy of the model
        self.sharded = self.shards is not None
        # What the optimizer knows: the parameters, or this process's rows of them.
        self.rows: dict[nn.Parameter, Tensor] = {p: rows.local(p) for p in self.names}
        for group in groups:
            group["params"] = [self.rows[p] for p in group["params"]]
        teachers = [teacher_of.get(self.names[p]) for p in self.parameters]
        pairs = [(p, teacher_of[name]) for p, name in self.names.items() if name in teacher_of]
        self.pairs = [(self.rows[p], rows.local(t), self.copies.get(t)) for p, t in pairs]
        fused: dict[str, Any] = dict(
            lr=0.0,
            teacher_params=[None if t is None else rows.local(t) for t in teachers],
            extra_ema=[(self.rows[p], rows.local(t)) for p, t in pairs if p in frozen],
            low_precision_params=[self.copies.get(p) for p in self.parameters],
            low_precision_teacher=[None if t is None else self.copies.get(t) for t in teachers],
        )
        self.grad_norm: Tensor  # [] fp32 of the last step's whole gradient, before clipping
        self.optimizer: AdamWEMA | LARS | LAMB
        if config.optimizer == "adamw":
            self.optimizer = AdamWEMA(groups, max_grad_norm=config.clip_grad, **fused)
        elif config.optimizer == "lars":
            self.optimizer = LARS(groups, max_grad_norm=config.clip_grad, **fused)
        elif config.optimizer == "lamb":
            self.optimizer = LAMB(groups, max_tensor_norm=config.clip_grad, **fused)
        else:
            self.optimizer = LARS(groups, eta=None, max_grad_norm=config.clip_grad, **fused)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = self.rows[parameter].grad = None

    def set_sync(self, last: bool) -> None:
        """Whether the coming backward pass is the last one before the update (a sharded model reduces its
        gradients in it).
        """
        if self.sharded:
            from fastdino.engine import sharding

            sharding.set_sync(self.student, last)

    def moments(self) -> list[Tensor]:
        """The optimizer's running means."""
        states = self.optimizer.state.values()
        return [x for state in states for x in state.values() if isinstance(x, Tensor) and x.ndim]

    def step(self, scalars: Any, *, grad_scale: float | Tensor = 1.0, skip: bool | Tensor = False) -> Tensor:
        """Apply the gradients, divided by ``grad_scale``, and move the teacher; with ``skip`` or a gradient
        that is not finite, nothing. ``scalars`` has lr, weight_decay and momentum, numbers or 0-dim tensors.

        Returns [] bool on the device: a gradient was not finite.
        """
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = scalars.lr
            group["weight_decay"] = scalars.weight_decay if index == 0 else 0.0
        if self.lagging:
            return self._lagging_step(grad_scale, skip)
        if not self.sharded:
            result = self.optimizer.step(momentum=scalars.momentum, grad_scale=grad_scale, skip=skip)
            self.grad_norm = torch.linalg.vector_norm(result.grad_norms)
            return result.found_inf
        from fastdino.engine import sharding

        assert self.teacher is not None
        sharding.reshard(self.teacher)
        grads = [None if p.grad is None else rows.local(p.grad) for p in self.parameters]
        for parameter, grad in zip(self.parameters, grads, strict=True):
            self.rows[parameter].grad = grad
        squares = rows.sum_over(self.shards, grad_square_sums(grads))
        result = self.optimizer.step(
            momentum=scalars.momentum, grad_scale=grad_scale, skip=skip, norms=squares.sqrt() / grad_scale
        )
        self.grad_norm = torch.linalg.vector_norm(result.grad_norms)
        return result.found_inf

    @torch.no_grad()
    def _lagging_step(self, grad_scale: float | Tensor, skip: bool | Tensor) -> Tensor:
        before = [student.clone() for student, _, _ in self.pairs]
        result = self.optimizer.step(momentum=1.0, grad_scale=grad_scale, skip=skip)
        self.grad_norm = torch.linalg.vector_norm(result.grad_norms)
        found_inf = result.found_inf
        skipped = found_inf | skip
        for old, (_, teacher, copy) in zip(before, self.pairs, strict=True):
            teacher.copy_(torch.where(skipped, teacher, old))
            if copy is not None:
                copy.copy_(teacher)
        return found_inf

    def refresh_copies(self) -> None:
        """Renew the 16-bit copies after the weights were set by something else than :meth:`step`."""
        with torch.no_grad():
            for parameter, copy in self.copies.items():
                copy.copy_(parameter)

    def state(self) -> dict[str, Tensor | Piece]:
        """Optimizer state as flat names: ``exp_avg.<parameter>``, ``exp_avg_sq.<parameter>``,
        ``step.<parameter>``, ...
        """
        return {
            f"{key}.{self.names[parameter]}": rows.piece(value, parameter) if value.ndim else value
            for parameter in self.parameters
            for key, value in self.optimizer.state.get(self.rows[parameter], {}).items()
            if isinstance(value, Tensor)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take whole tensors under the names of :meth:`state`; a parameter without entries, or with those of
        another optimizer, starts afresh (as a last layer that was frozen so far), and what is not trained
        needs none.

        Raises KeyError for entries of unknown parameters and ValueError for a shape that does not fit.
        """
        by_name = {self.names[p]: p for p in self.parameters}
        entries: dict[Tensor, dict[str, Tensor]] = {}
        for flat, value in state.items():
            key, _, name = flat.partition(".")
            if name not in by_name and name in self.names.values():
                continue
            if name not in by_name:
                raise KeyError(f"optimizer state {flat}: the model has no trained parameter {name}")
            parameter = by_name[name]
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state {flat}: expected shape {tuple(parameter.shape)}, "
                    f"got {tuple(value.shape)}"
                )
            part = rows.rows_like(value, parameter) if value.ndim else value
            entry = part.to(self.rows[parameter].device, copy=True)
            entries.setdefault(self.rows[parameter], {})[key] = entry
        own = {"step"} if self.optimizer._counts else set()
        own |= set(self.optimizer._moments)
        self.optimizer.state.clear()
        self.optimizer.state.update({p: entry for p, entry in entries.items() if entry.keys() == own})
