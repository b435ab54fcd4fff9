"""Sinkhorn-Knopp targets (SwAV, DINOv2) from logits that are only read.

``Q = exp(logits / u)``; each of ``n_iters`` iterations divides every prototype by its sum over the samples,
then every sample by its sum. Written as ``Q_rk = exp(x_rk - c_k - d_r)``, ``x = logits / u``:

    c_k <- log sum_r exp(x_rk - d_r),    d_r <- log sum_k exp(x_rk - c_k),    starting from d = 0

``d`` follows from ``c``, so the K numbers ``c`` are the whole state: the matrix is never rewritten, and the
result is ``softmax_k(x - c)``: the targets of DINO's centering with the center ``u c``
(:func:`sinkhorn_center`). Factors such as SwAV's 1/K and 1/R cancel.

Over several processes only the K sums behind ``c`` are added up in each iteration; samples stay where they
are. The CPU kernels (csrc/sinkhorn.cpp) read the logits n_iters + 1 times, the Triton kernels 2 n_iters + 1
times.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .backend import resolve
from .dino_loss import KERNEL_DTYPES, temperature
from .native import call, empty, int64, on_huge_pages, pointer
from .operators import operator
from .validate import FLOATS, check_temperature, check_tensor

if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup | Literal["local"] | None


class Form(NamedTuple):
    """The three passes over logits [R, K]; ``c`` is [K], double in the kernels; -inf: no sample admits k."""

    columns: Callable[[Tensor, Tensor], Tensor]  # logits, temp -> the first c
    step: Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, temp, c -> the next c
    targets: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]  # logits, temp, c, dtype -> [R, K]


@operator("fastdino::sinkhorn_columns")
def _columns(logits: Tensor, temp: Tensor) -> Tensor:
    out = empty(logits.shape[1], dtype=torch.float64)
    call("fdk_sinkhorn_columns", pointer(logits), *_problem(logits, temp), pointer(out))
    return out


@operator("fastdino::sinkhorn_step")
def _step(logits: Tensor, temp: Tensor, c: Tensor) -> Tensor:
    out = torch.empty_like(c)
    call("fdk_sinkhorn_step", pointer(logits), pointer(c), *_problem(logits, temp), pointer(out))
    return out


@operator("fastdino::sinkhorn_targets")
def _targets(logits: Tensor, temp: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    bf16 = dtype == torch.bfloat16
    out = on_huge_pages(empty(logits.shape, dtype=torch.bfloat16 if bf16 else torch.float32))
    arguments = (*map(pointer, (logits, c)), *_problem(logits, temp), pointer(out), ctypes.c_int(bf16))
    call("fdk_sinkhorn_targets", *arguments)
    return out.to(dtype)


def fake_columns(logits: Tensor, temp: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[1], dtype=torch.float64)


def fake_step(logits: Tensor, temp: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(c)


def fake_targets(logits: Tensor, temp: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(logits, dtype=dtype)


torch.library.register_fake(_columns, fake_columns)
torch.library.register_fake(_step, fake_step)
torch.library.register_fake(_targets, fake_targets)


def _problem(logits: Tensor, temp: Tensor) -> tuple[object, ...]:
    assert logits.dtype in KERNEL_DTYPES and logits.is_contiguous()
    bf16 = logits.dtype == torch.bfloat16
    return (*int64(*logits.shape), ctypes.c_int(bf16), ctypes.c_double(temp.item()))


def _reference_targets(logits: Tensor, temp: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    return reference.sinkhorn_targets(logits, temp, c).to(dtype)


CPU = Form(_columns, _step, _targets)
REFERENCE = Form(reference.sinkhorn_columns, reference.sinkhorn_columns, _reference_targets)


def _nothing(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.new_full((logits.shape[1],), -torch.inf, dtype=torch.float64)


def _no_targets(logits: Tensor, temp: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(logits, dtype=dtype)


# A process without samples of its own takes part in the sums of the others.
NO_SAMPLES = Form(_nothing, _nothing, _no_targets)


def prepare(logits: Tensor, temp: float | Tensor) -> tuple[Form, Tensor, Tensor]:
    """The form that answers, with logits and temperature as it takes them."""
    logits = logits.detach()
    kind = resolve(logits)
    if len(logits) == 0 and kind != "reference":
        return NO_SAMPLES, logits, torch.as_tensor(temp, dtype=torch.float32, device=logits.device)
    if kind == "triton":
        from .gpu import launch, sinkhorn

        return sinkhorn.TRITON, logits.contiguous(), launch.scalar(temp, logits)
    if kind == "reference":
        return REFERENCE, logits, temperature(temp)
    dtype = logits.dtype if logits.dtype in KERNEL_DTYPES else torch.float32
    return CPU, logits.to(dtype).contiguous(), temperature(temp)


def _iterate(form: Form, logits: Tensor, temp: Tensor, n_iters: int, group: Group) -> Tensor:
    """c [K] after ``n_iters`` iterations over the samples of the group."""
    together = _process_group(group)
    c = _over_processes(form.columns(logits, temp), None, together)
    for _ in range(n_iters - 1):
        c = _over_processes(form.step(logits, temp, c), c, together)
    return c


def _process_group(group: Group) -> dist.ProcessGroup | None:
    """The processes to add up over; None: this one alone."""
    if group == "local" or not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.group.WORLD if group is None else group


def _over_processes(local: Tensor, before: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """``log sum exp`` of [K] over the processes, relative to the largest, or to c before this step.

    That one suffices: a step multiplies a prototype's sum by 1 / (R K) at least and by R at most.
    """
    if group is None:
        return local
    if before is None:
        before = local.clone()
        dist.all_reduce(before, dist.ReduceOp.MAX, group=group)
    before = before.masked_fill(before == -torch.inf, 0)
    total = (local - before).exp()
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return before + total.log()


def _check(logits: Tensor, temp: float | Tensor, n_iters: int, group: Group) -> None:
    check_tensor("logits", logits, ("R", "K"))
    check_temperature("temp", temp, targets=True)
    if not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(f"n_iters: expected a whole number, at least 1, got {n_iters!r}")
    if isinstance(group, str) and group != "local":
        raise ValueError(f"group: expected a process group, None or 'local', got {group!r}")
    together = _process_group(group)  # of several processes, some may have no sample
    if logits.shape[1] == 0 or len(logits) == 0 and (together is None or together.size() == 1):
        raise ValueError(f"logits: expected at least one sample and one prototype, got {list(logits.shape)}")


def sinkhorn_knopp(
    logits: Tensor,
    *,
    temp: float | Tensor,
    n_iters: int = 3,
    group: Group = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Targets by Sinkhorn-Knopp (Caron et al. 2020, section 3.1; DINOv2): balanced over the prototypes.

    Args:
        logits: [R, K], samples by prototypes; fp32, bf16, fp16 or float64; no gradient flows into them. Pass
            the samples of one view (SwAV) or of all views (DINOv2) at a time.
        temp: number > 0, or 0-dim tensor.
        n_iters: iterations; each ends with the samples' normalisation.
        group: processes whose samples are balanced together, each with R of its own; None is all processes
            where torch.distributed is initialised (SwAV, DINOv2), ``"local"`` is this process alone. Every
            process of the group must call, also one whose R is 0.
        dtype: of the result; None is fp32, or float64 for float64 logits.

    Returns:
        [R, K], each row sums to 1. A prototype whose logits are -inf for every sample gets 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check(logits, temp, n_iters, group)
    if dtype is None:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
    form, logits, temp = prepare(logits, temp)
    return form.targets(logits, temp, _iterate(form, logits, temp, n_iters, group), dtype)


def sinkhorn_center(logits: Tensor, *, temp: float | Tensor, n_iters: int = 3, group: Group = None) -> Tensor:
    """The center [K] with which centering gives the targets of :func:`sinkhorn_knopp`, without storing them.

    ``softmax((logits - center) / temp)`` are the targets, so :func:`fastdino_kernels.dino_loss` with this
    center and ``teacher_temp=temp`` is the loss with Sinkhorn-Knopp targets over all its teacher rows.

    Arguments and errors as there; returns fp32, or float64 for float64 logits.
    """
    _check(logits, temp, n_iters, group)
    form, logits, temp = prepare(logits, temp)
    c = _iterate(form, logits, temp, n_iters, group)
    center = temp.to(c.dtype) * c.masked_fill(c == -torch.inf, 0)
    return center if logits.dtype == torch.float64 else center.float()


def softmax_over_batch(
    logits: Tensor, *, temp: float | Tensor, group: Group = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Softmax over the samples for each prototype, then each sample divided by its sum.

    The ``softmax (batch)`` teacher operation of the ablations (Caron et al. 2021, table 15), which is
    :func:`sinkhorn_knopp` with one iteration; arguments, result and errors as there.
    """
    return sinkhorn_knopp(logits, temp=temp, n_iters=1, group=group, dtype=dtype)
