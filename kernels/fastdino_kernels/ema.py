"""Multi-tensor updates outside the fused optimizers: the teacher's EMA and the per-tensor clipping."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import reference
from .backend import resolve
from .native import DTYPES, call, int64, pointers, sizes, tensor, zeros
from .validate import check_number

T = TypeVar("T")


def is_plain(x: Tensor | None, like: Tensor, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> bool:
    """True if the kernels may walk ``x`` beside ``like`` in storage order (or there is no ``x``)."""
    if x is None:
        return True
    if x.dtype not in dtypes or x.layout is not torch.strided or x.get_device() != like.get_device():
        return False
    kind = type(x)  # the address of a wrapper such as DTensor is not that of its data
    if kind is not torch.nn.Parameter and kind is not Tensor and hasattr(kind, "__tensor_flatten__"):
        return False
    return x.is_contiguous() if like.is_contiguous() else x.stride() == like.stride() and _is_dense(x)


def _is_dense(x: Tensor) -> bool:
    return torch.ops.aten.is_non_overlapping_and_dense(x)


def merged(flags: Sequence[bool], yes: Sequence[T], no: Sequence[T]) -> list[T]:
    """The next of ``yes`` for each True, the next of ``no`` for each False."""
    sources: dict[bool, Iterator[T]] = {True: iter(yes), False: iter(no)}
    return [next(sources[flag]) for flag in flags]


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """``teacher <- momentum * teacher + (1 - momentum) * student`` for lists of tensors, in place.

    One launch, or one parallel loop on the CPU, for all fp32 teachers with students in fp32, bf16 or fp16
    that are dense and laid out alike; other pairs take the eager path. No autograd. ``momentum`` in [0, 1]
    may be a 0-dim tensor: on the teachers' GPU it is read there, and a CUDA graph sees its value at each
    replay. A momentum of 1 changes no byte.

    Raises: ValueError naming the argument for lists, shapes or devices that do not match."""
    if len(teacher) != len(student):
        raise ValueError(f"student: expected {len(teacher)} tensors, as many as teacher, got {len(student)}")
    check_number("momentum", momentum, 0, 1)
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if not (isinstance(t, Tensor) and isinstance(s, Tensor)):
            got = f"{type(t).__name__} and {type(s).__name__}"
            raise TypeError(f"teacher[{i}], student[{i}]: expected tensors, got {got}")
        if t.shape != s.shape or t.device != s.device:
            raise ValueError(
                f"student[{i}]: expected {list(t.shape)} on {t.device}, got {list(s.shape)} on {s.device}"
            )
    first = next((t for t in teacher if t.dtype == torch.float32), None)
    kind = "reference" if first is None else resolve(first)
    if isinstance(momentum, Tensor) and first is not None:
        if kind == "cpu" or momentum.device != first.device:
            momentum = float(momentum)
    pairs = list(zip(teacher, student, strict=True))
    fast = [
        kind != "reference" and t.device == first.device and is_plain(t, t) and is_plain(s, t, DTYPES)  # type: ignore[union-attr]
        for t, s in pairs
    ]
    slow = [pair for pair, f in zip(pairs, fast, strict=True) if not f]
    reference.ema_update_([t for t, _ in slow], [s for _, s in slow], momentum)
    targets = [t for t, f in zip(teacher, fast, strict=True) if f]
    sources = [s for s, f in zip(student, fast, strict=True) if f]
    if not targets:
        return
    if kind == "triton":
        from .gpu import ema as gpu

        gpu.ema_update_(targets, sources, momentum)
    else:
        dtypes = (ctypes.c_int * len(sources))(*(DTYPES[s.dtype] for s in sources))
        arrays = (pointers(targets), pointers(sources), dtypes, sizes(targets))
        call("fdk_ema", *int64(len(targets)), *arrays, ctypes.c_double(float(momentum)))
    torch.autograd.graph.increment_version(targets)


def host_norms(grads: Sequence[Tensor | None]) -> list[float]:
    """Euclidean norm of each gradient; 0 for None. On a GPU this waits for the gradients."""
    return [math.sqrt(square) for square in host_square_sums(grads)]


def host_square_sums(grads: Sequence[Tensor | None]) -> list[float]:
    """Sum of the squares of each gradient, in double; 0 for None. It is finite exactly if all elements are,
    and does not depend on the number of threads. On a GPU this waits for the gradients."""
    plain = [g for g in grads if g is not None and is_plain(g, g)]
    if not plain or plain[0].device.type != "cpu" or resolve(plain[0]) != "cpu":
        plain = []
    squares = (ctypes.c_double * len(plain))()
    if plain:
        call("fdk_sums_of_squares", *int64(len(plain)), pointers(plain), sizes(plain), squares)
    of = {id(g): square for g, square in zip(plain, squares, strict=True)}
    return [
        0.0 if g is None else of[id(g)] if id(g) in of else reference.square_sum(g, g.device).item()
        for g in grads
    ]


@torch.no_grad()
def clip_grad_per_tensor_(
    params: Iterable[Tensor], max_norm: float, *, grad_scale: float | Tensor = 1.0
) -> Tensor:
    """Divide each gradient by ``grad_scale``, then scale it by ``min(1, max_norm / (norm + 1e-6))``.

    Returns the norms in between, fp32 [n], 0 for a parameter without gradient; ``max_norm`` 0 clips nothing.
    On a GPU the host waits for nothing, and ``grad_scale`` may be a 0-dim tensor there.

    Raises: ValueError naming the argument."""
    check_number("max_norm", max_norm)
    check_number("grad_scale", grad_scale, positive=True)
    grads = [p.grad for p in params]
    return _norms(grads, grad_scale, max_norm)


@torch.no_grad()
def grad_norms(grads: Sequence[Tensor | None], grad_scale: float | Tensor = 1.0) -> Tensor:
    """Euclidean norm of each gradient divided by ``grad_scale``: fp32 [n], summed in double, 0 for None.

    A norm is NaN or infinite exactly if an element of its gradient is (or if it exceeds fp32)."""
    return _norms(grads, grad_scale, None)


@torch.no_grad()
def grad_square_sums(grads: Sequence[Tensor | None]) -> Tensor:
    """Sum of the squares of each gradient, in double: fp64 [n] beside the gradients, 0 for None.

    Of a model in shards these sums add up over the processes: with their total ``s``, ``s.sqrt() /
    grad_scale`` are the ``norms`` for the ``step`` of :class:`~fastdino_kernels.AdamWEMA`. A sum is NaN or
    infinite exactly if an element of its gradient is. On a GPU the host waits for nothing.

    Raises: ValueError for gradients on several devices."""
    present, kind = _present(grads)
    if not present:
        return zeros(len(grads), dtype=torch.float64)
    device = present[0].device
    if kind != "triton" and device.type == "cpu":
        return tensor(host_square_sums(grads), dtype=torch.float64)
    fast = [kind == "triton" and g is not None and is_plain(g, g, DTYPES) for g in grads]
    quick = [g for f, g in zip(fast, grads, strict=True) if f and g is not None]
    others = [reference.square_sum(g, device) for f, g in zip(fast, grads, strict=True) if not f]
    if not quick:
        return torch.stack(others)
    from .gpu import ema as gpu

    sums = gpu.grad_square_sums(quick)
    return torch.stack(merged(fast, sums.unbind(), others)) if others else sums


def _present(grads: Sequence[Tensor | None]) -> tuple[list[Tensor], str]:
    """The gradients that there are, and the backend for them."""
    present = [g for g in grads if g is not None]
    if len({g.get_device() for g in present}) > 1:
        raise ValueError("grads: expected all on one device, got several")
    first = next((g for g in present if g.dtype in DTYPES), present[0] if present else None)
    return present, "reference" if first is None else resolve(first)


def _norms(grads: Sequence[Tensor | None], grad_scale: float | Tensor, max_norm: float | None) -> Tensor:
    """Norms of unscaled gradients; with ``max_norm`` the gradients are unscaled and clipped."""
    present, kind = _present(grads)
    if not present:
        return zeros(len(grads))
    device = present[0].device
    if kind != "triton" and device.type == "cpu":
        scale = float(grad_scale)
        norms = [norm / scale for norm in host_norms(grads)]
        if max_norm is not None:
            for grad, norm in zip(grads, norms, strict=True):
                factor = reference.clip_coefficient(norm, max_norm) / scale
                if grad is not None and factor != 1:
                    grad.mul_(factor)
        return tensor(norms)
    fast = [kind == "triton" and g is not None and is_plain(g, g, DTYPES) for g in grads]
    quick = [g for f, g in zip(fast, grads, strict=True) if f and g is not None]
    slow = [g for f, g in zip(fast, grads, strict=True) if not f]
    others = [reference.norm(g, device) / grad_scale for g in slow]
    if max_norm is not None:
        for grad, other in zip(slow, others, strict=True):
            if grad is not None:
                grad.mul_(reference.clip_coefficient(other, max_norm) / grad_scale)
    if not quick:
        return torch.stack(others).float()
    from .gpu import ema as gpu

    result = gpu.grad_norms(quick, grad_scale, max_norm)
    if max_norm is not None:
        torch.autograd.graph.increment_version(quick)
    return torch.stack(merged(fast, result.unbind(), [x.float() for x in others])) if others else result
