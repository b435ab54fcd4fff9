"""What the fused optimizers share: pairing with a teacher, choice of the backend, refusal of bad gradients.

An update rule comes in three forms. ``cpu`` and ``triton`` take all plain tensors at once (fp32, dense, on
the backend's device); ``eager`` takes any tensor by itself. On a GPU nothing is read back: whether a step is
skipped, and how far a gradient is clipped, stays on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import reference
from .backend import resolve
from .ema import ema_update_, host_norms, is_plain, merged
from .native import tensor, zeros
from .validate import check_number

_COPY_DTYPES = {"cpu": (torch.bfloat16,), "triton": (torch.bfloat16, torch.float16), "reference": ()}
T = TypeVar("T")


class StepResult(NamedTuple):
    """What a step found; ``grad_norms`` has one entry per parameter in the order of the groups."""

    found_inf: Tensor  # [] bool beside the parameters: a gradient was NaN or infinite, nothing was changed
    grad_norms: Tensor  # [n_params] fp32: unscaled, before clipping; 0 without a gradient


class Common(NamedTuple):
    """Numbers of one step that all tensors share."""

    momentum: float | Tensor  # of the teacher
    grad_scale: float | Tensor
    skip: bool | Tensor
    norms: Tensor | None = None  # fp64, one per row: unscaled, measured by the caller


class Row(NamedTuple):
    """A parameter and what belongs to it. Without a gradient only teacher and copies follow it."""

    param: Tensor
    grad: Tensor | None
    state: tuple[Tensor, ...]  # moments, laid out as the parameter
    step: Tensor | None  # 0-dim fp32
    teacher: Tensor | None
    copy: Tensor | None  # 16 bits
    teacher_copy: Tensor | None
    group: Any  # hyper-parameters; the rows of a group share one object


class Rule:
    """One update rule; ``max_norm`` is the largest norm of each tensor's gradient, 0 for no clipping.

    With ``common.norms`` no gradient is measured: these decide about clipping and about refusal."""

    max_norm: float = 0.0

    def factors(self, norms: Tensor) -> Tensor:
        """Clipping of gradients whose norms are ``norms``, fp64 [n]."""
        return reference.clip_coefficient(norms, self.max_norm)

    def measure(self, rows: Sequence[Row]) -> list[float]:
        """Norms of the gradients of plain rows on the CPU, not unscaled."""
        return host_norms([row.grad for row in rows])

    def cpu(self, rows: Sequence[Row], factors: Sequence[float], common: Common) -> None:
        """Update plain rows with gradients, which are multiplied with ``factors``, teachers and copies."""
        raise NotImplementedError

    def triton(self, rows: Sequence[Row], common: Common, others: Tensor) -> tuple[Tensor, Tensor]:
        """Update plain rows; ``others`` fp64 [m]: unscaled norms of further gradients.

        Returns the unscaled norms, fp32 [n], and two flags, bool [2]: some gradient in ``rows`` was not
        finite; nothing was changed."""
        raise NotImplementedError

    def eager(self, row: Row, factor: float | Tensor, frozen: Tensor | None) -> None:
        """Update one row, unless ``frozen``, but not its teacher."""
        raise NotImplementedError


def backend_of(params: Sequence[Tensor]) -> tuple[str, bool]:
    """The backend, and whether the host may look at the gradients before it goes on."""
    kind = resolve(next((p for p in params if p.dtype == torch.float32), params[0]))
    return kind, kind != "triton" and params[0].device.type == "cpu"


@torch.no_grad()
def update(rule: Rule, rows: Sequence[Row], common: Common) -> StepResult:
    """One step of ``rule``: nothing changes if a gradient is not finite, or with ``common.skip``."""
    if not rows:
        return StepResult(zeros((), dtype=torch.bool), zeros(0))
    if len({row.param.get_device() for row in rows}) > 1:
        raise ValueError("params: expected all on one device, got several")
    kind, on_host = backend_of([row.param for row in rows])
    rows, late = _without_odd_copies(rows, kind)
    fast = [kind != "reference" and _is_fast(row) for row in rows]
    if on_host:
        result, skipped = _on_host(rule, rows, fast, common)
        if skipped:
            return result
        frozen, momentum = None, common.momentum
        fast = [f and row.grad is not None for f, row in zip(fast, rows, strict=True)]
    else:
        result, frozen = _on_device(rule, rows, fast, common)
        momentum = torch.where(frozen, 1.0, common.momentum) if late or not all(fast) else 1.0
    behind = _where(fast, rows, False)
    pairs = [(row.teacher, row.param) for row in behind if row.teacher is not None]
    ema_update_([t for t, _ in pairs], [p for _, p in pairs], momentum)
    for copy, x in late + [pair for row in behind for pair in _copies(row)]:
        copy.copy_(x if frozen is None else torch.where(frozen, copy, x.to(copy.dtype)))
    written = [x for row in rows for x in (row.teacher, row.teacher_copy, *_with_gradient(row))]
    torch.autograd.graph.increment_version([x for x in written if x is not None])
    return result


def _on_host(
    rule: Rule, rows: Sequence[Row], fast: Sequence[bool], common: Common
) -> tuple[StepResult, bool]:
    """All rows but the teachers of those that are not fast; whether the step was skipped."""
    scale = float(common.grad_scale)
    kinds = [None if row.grad is None else f for f, row in zip(fast, rows, strict=True)]
    quick, slow = _where(kinds, rows, True), _where(kinds, rows, False)
    if common.norms is None:
        of: dict[bool | None, Iterator[float]]
        of = {
            True: iter(rule.measure(quick)),
            False: iter(host_norms([row.grad for row in slow])),
            None: repeat(0.0),
        }
        norms = tensor([next(of[kind]) / scale for kind in kinds], dtype=torch.float64)
    else:
        norms = common.norms
    found = not norms.isfinite().all()
    result = StepResult(tensor(found, dtype=torch.bool), norms.float())
    if found or common.skip:
        return result, True
    factors = (rule.factors(norms) / scale).tolist()
    if quick:
        rule.cpu(quick, _where(kinds, factors, True), Common(float(common.momentum), scale, False))
    for row, factor in zip(slow, _where(kinds, factors, False), strict=True):
        rule.eager(row, factor, None)
    return result, False


def _on_device(
    rule: Rule, rows: Sequence[Row], fast: Sequence[bool], common: Common
) -> tuple[StepResult, Tensor]:
    """As :func:`_on_host`, with every decision a tensor on the device."""
    device, scale = rows[0].param.device, common.grad_scale
    quick, slow = _where(fast, rows, True), _where(fast, rows, False)
    if not slow:
        norms, flags = rule.triton(quick, common, torch.zeros(0, dtype=torch.float64, device=device))
        return StepResult(flags[0], norms), flags[1]
    if common.norms is None:
        others = torch.stack([reference.norm(row.grad, device) for row in slow]) / scale  # [m] fp64
    else:
        given = common.norms.unbind()
        others = torch.stack(_where(fast, given, False))
        common = common._replace(norms=torch.stack(_where(fast, given, True)) if quick else None)
    found = ~torch.isfinite(others).all()
    frozen = found | (common.skip != 0)
    norms = others.new_zeros(0, dtype=torch.float32)
    if quick:
        norms, flags = rule.triton(quick, common._replace(skip=frozen), others)
        found, frozen = found | flags[0], flags[1]
    every = torch.cat([norms.double(), others])
    factors = rule.factors(every) / scale
    for row, factor in zip(slow, factors[len(quick) :], strict=True):
        if row.grad is not None:
            rule.eager(row, factor, frozen)
    values = every.float().unbind()
    ordered = merged(fast, values[: len(quick)], values[len(quick) :])
    return StepResult(found, torch.stack(ordered)), frozen


def _is_fast(row: Row) -> bool:
    p = row.param
    for x in (p, row.grad, *row.state, row.teacher):
        if not is_plain(x, p):
            return False
    return True


def _with_gradient(row: Row) -> tuple[Tensor | None, ...]:
    """What a step writes only where there is a gradient; without one a copy already is what it should be."""
    return () if row.grad is None else (row.param, row.copy, row.step, *row.state)


def _copies(row: Row) -> list[tuple[Tensor, Tensor]]:
    """(copy, original) for those there are."""
    pairs = ((row.copy, row.param), (row.teacher_copy, row.teacher))
    return [(copy, x) for copy, x in pairs if copy is not None and x is not None]


def _without_odd_copies(rows: Sequence[Row], kind: str) -> tuple[Sequence[Row], list[tuple[Tensor, Tensor]]]:
    """The kernels write copies of one type; pairs (copy, original) of other types or layouts come back."""
    having = (row for row in rows if row.copy is not None or row.teacher_copy is not None)
    copies = [pair for row in having for pair in _copies(row)]
    dtypes = {copy.dtype for copy, _ in copies}
    taken = [dtype for dtype in _COPY_DTYPES[kind] if dtype in dtypes][:1]
    odd = [(copy, x) for copy, x in copies if not is_plain(copy, x, taken)]
    if odd:
        unwanted = {id(copy) for copy, _ in odd}
        rows = [
            row._replace(
                copy=None if id(row.copy) in unwanted else row.copy,
                teacher_copy=None if id(row.teacher_copy) in unwanted else row.teacher_copy,
            )
            for row in rows
        ]
    return rows, odd


def _where(flags: Sequence[bool | None], values: Sequence[T], wanted: bool) -> list[T]:
    return [value for flag, value in zip(flags, values, strict=True) if flag == wanted]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers whose step also clips, refuses bad gradients and moves a teacher.

    Args:
        params: student parameters or groups; the numbers of a group, which may be 0-dim tensors on the
            parameters' device where noted, are read anew at each step.
        teacher_params: one teacher tensor (or None) per parameter, in the order of the groups.
        extra_ema: (student, teacher) pairs that follow the EMA only, such as parameters outside the groups.
        low_precision_params, low_precision_teacher: one bf16 or fp16 tensor (or None) per parameter, which
            each step that is not skipped sets to the rounded parameter or teacher.
    """

    _moments: tuple[str, ...] = ()
    _counts = True  # has a number of steps in its state
    _rule: Rule

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        teacher_params: Sequence[Tensor | None] | None,
        extra_ema: Sequence[tuple[Tensor, Tensor]],
        low_precision_params: Sequence[Tensor | None] | None,
        low_precision_teacher: Sequence[Tensor | None] | None,
    ) -> None:
        super().__init__(params, defaults)
        self._params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self._teachers = self._one_each("teacher_params", teacher_params)
        self._copies = self._one_each("low_precision_params", low_precision_params)
        self._teacher_copies = self._one_each("low_precision_teacher", low_precision_teacher)
        self._extra_ema = list(extra_ema)
        for i, (p, t) in enumerate(zip(self._params, self._teachers, strict=True)):
            _check_teacher(f"teacher_params[{i}]", p, t)
        for i, (p, t) in enumerate(self._extra_ema):
            _check_teacher(f"extra_ema[{i}]", p, t)
        for i, (p, c) in enumerate(zip(self._params, self._copies, strict=True)):
            check_copy(f"low_precision_params[{i}]", p, c)
        for i, (t, c) in enumerate(zip(self._teachers, self._teacher_copies, strict=True)):
            check_copy(f"low_precision_teacher[{i}]", t, c)
        with torch.no_grad():
            for row in self._rows({}):
                for copy, x in _copies(row):
                    copy.copy_(x)

    def __getstate__(self) -> dict[str, Any]:
        """Copies, by deepcopy or pickle, keep teachers and 16-bit copies as well."""
        ours = ("_params", "_teachers", "_copies", "_teacher_copies", "_extra_ema", "_rule")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}}

    def _one_each(self, name: str, tensors: Sequence[Tensor | None] | None) -> list[Tensor | None]:
        if tensors is None:
            return [None] * len(self._params)
        if len(tensors) != len(self._params):
            raise ValueError(f"{name}: expected {len(self._params)} entries, got {len(tensors)}")
        return list(tensors)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_teachers"):
            raise ValueError("add_param_group: groups are fixed once their teachers are matched")
        # torch's decorator keeps torch.compile out of this method by importing all of it, which takes longer
        # than the rest of the start; nobody compiles this.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an optimizer of this class over the same groups."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        *,
        momentum: float | Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
        skip: bool | Tensor = False,
        norms: Tensor | None = None,
    ) -> StepResult:
        """One update from the ``.grad`` of the parameters; on a GPU the host waits for nothing.

        Args (0-dim tensors on the parameters' device are read there, in a CUDA graph at each replay):
            momentum: of the teachers, in [0, 1]; needed if there are any.
            grad_scale: gradients are divided by it (loss scale times accumulated micro-batches).
            skip: measure the norms, change nothing.
            norms: fp32 or fp64 [n_params] beside the parameters, in the order of the groups: norms of the
                gradients divided by ``grad_scale``, over all shards of a model of which this process holds
                one. Nothing is measured then; these clip, and a NaN or infinity among them refuses the step.

        Raises: ValueError naming the argument, also for ``norms`` if the update scales layers by norms that
            a shard does not know (:class:`~fastdino_kernels.LAMB`, :class:`~fastdino_kernels.LARS`).
        """
        if momentum is None:
            if self._extra_ema or any(t is not None for t in self._teachers):
                raise ValueError("momentum: expected a number in [0, 1] for the teachers, got None")
            momentum = 1.0
        check_number("momentum", momentum, 0, 1)
        check_number("grad_scale", grad_scale, positive=True)
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        rows = self._rows(fresh)
        result = update(self._rule, rows, Common(momentum, grad_scale, skip, self._checked(norms)))
        # On a GPU a first step that is skipped leaves a state of zeros, which means the same as none.
        if fresh and not (backend_of(self._params)[1] and (skip or result.found_inf)):
            self.state.update(fresh)
        return StepResult(result.found_inf, result.grad_norms[: len(self._params)])

    @property
    def _scales_layers(self) -> bool:
        """Whether an update depends on norms of whole tensors besides those of the gradients."""
        return False

    def _checked(self, norms: Tensor | None) -> Tensor | None:
        """Norms of all rows, fp64."""
        if norms is None:
            return None
        if self._scales_layers:
            raise ValueError(
                f"norms: expected None, as {type(self).__name__} also needs the norms of the parameters over "
                "all shards, got a tensor"
            )
        device = self._params[0].device
        if norms.shape != (len(self._params),) or norms.device != device:
            raise ValueError(
                f"norms: expected shape [{len(self._params)}] on {device}, "
                f"got {list(norms.shape)} on {norms.device}"
            )
        return torch.cat([norms.double(), norms.new_zeros(len(self._extra_ema), dtype=torch.float64)])

    def _rows(self, fresh: dict[Tensor, dict[str, Tensor]]) -> list[Row]:
        """One row per parameter, then the extra pairs; states to be made go to ``fresh``."""
        of = ((hyper, p) for g in self.param_groups for hyper in [self._hyper(g)] for p in g["params"])
        rows = []
        others = zip(self._teachers, self._copies, self._teacher_copies, strict=True)
        for (hyper, p), (teacher, copy, teacher_copy) in zip(of, others, strict=True):
            state: dict[str, Tensor] = {}
            if p.grad is not None:
                state = self.state.get(p) or fresh.setdefault(p, self._new_state(p))
                if self._counts:  # torch.optim.AdamW keeps it on the CPU
                    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
            moments = tuple(state[name] for name in self._moments if state)
            rows.append(Row(p, p.grad, moments, state.get("step"), teacher, copy, teacher_copy, hyper))
        return rows + [Row(p, None, (), None, t, None, None, rows[0].group) for p, t in self._extra_ema]

    def _hyper(self, group: dict[str, Any]) -> Any:
        """The numbers of a group, as the rule reads them."""
        raise NotImplementedError

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)} if self._counts else {}
        zeros = {n: torch.zeros_like(p, memory_format=torch.preserve_format) for n in self._moments}
        return {**state, **zeros}


def check_copy(name: str, original: Tensor | None, copy: Tensor | None) -> None:
    """A copy in 16 bits of a tensor that exists, of its shape and on its device."""
    if copy is None:
        return
    if copy.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: expected a tensor of bfloat16 or float16, got {copy.dtype}")
    if original is None:
        raise ValueError(f"{name}: expected None, as there is nothing to copy, got a tensor")
    _check_like(name, original, copy)


def _check_teacher(name: str, param: Tensor, teacher: Tensor | None) -> None:
    if teacher is None:
        return
    _check_like(name, param, teacher)
    if teacher.requires_grad:
        raise ValueError(f"{name}: the teacher must not require grad")


def _check_like(name: str, x: Tensor, other: Tensor) -> None:
    if other.shape != x.shape or other.device != x.device:
        expected, got = (f"shape {list(y.shape)} on {y.device}" for y in (x, other))
        raise ValueError(f"{name}: expected {expected}, got {got}")
