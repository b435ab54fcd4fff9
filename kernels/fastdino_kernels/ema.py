"""Multi-tensor updates outside the fused optimizer: the teacher's EMA and the per-tensor clipping."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import reference
from .backend import resolve
from .native import DTYPES, call, int64, pointers, sizes


def is_plain(x: Tensor | None, like: Tensor, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> bool:
    """True if the kernels may walk ``x`` beside ``like`` in storage order (or there is no ``x``)."""
    if x is None:
        return True
    dense = x.is_contiguous() if like.is_contiguous() else x.stride() == like.stride() and _is_dense(x)
    return x.device.type == "cpu" and x.dtype in dtypes and x.layout == torch.strided and dense


def _is_dense(x: Tensor) -> bool:
    return torch.ops.aten.is_non_overlapping_and_dense(x)


def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """``teacher <- momentum * teacher + (1 - momentum) * student`` for lists of tensors, in place.

    Teachers are fp32 (other dtypes take the eager path), students fp32, bf16 or fp16; no autograd.
    """
    if len(teacher) != len(student):
        raise ValueError(f"student: expected {len(teacher)} tensors, as many as teacher, got {len(student)}")
    momentum = float(momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if t.shape != s.shape or t.device != s.device:
            raise ValueError(
                f"student[{i}]: expected {list(t.shape)} on {t.device}, got {list(s.shape)} on {s.device}"
            )
    slow = [(t, s) for t, s in zip(teacher, student, strict=True) if not _is_fast(t, s)]
    fast = [(t, s) for t, s in zip(teacher, student, strict=True) if _is_fast(t, s)]
    reference.ema_update_([t for t, _ in slow], [s for _, s in slow], momentum)
    if fast:
        targets, sources = [t for t, _ in fast], [s for _, s in fast]
        dtypes = (ctypes.c_int * len(fast))(*(DTYPES[s.dtype] for s in sources))
        call(
            "fdk_ema",
            *int64(len(fast)),
            pointers(targets),
            pointers(sources),
            dtypes,
            sizes(targets),
            ctypes.c_double(momentum),
        )


def _is_fast(teacher: Tensor, student: Tensor) -> bool:
    return is_plain(teacher, teacher) and is_plain(student, teacher, DTYPES) and resolve(teacher) == "cpu"


def grad_norms(grads: Sequence[Tensor | None], grad_scale: float = 1.0) -> Tensor:
    """Euclidean norm of each gradient divided by ``grad_scale``: fp32 [n], summed in double, 0 for None.

    A norm is NaN or infinite exactly if an element of its gradient is (or if it exceeds fp32). It does not
    depend on the number of threads.
    """
    present = [g for g in grads if g is not None]
    if not present or not all(is_plain(g, g) for g in present) or resolve(*present) != "cpu":
        return reference.grad_norms(grads, grad_scale)
    squares = (ctypes.c_double * len(present))()
    call("fdk_sums_of_squares", *int64(len(present)), pointers(present), sizes(present), squares)
    norms = iter([math.sqrt(square) / grad_scale for square in squares])
    return torch.tensor([0.0 if g is None else next(norms) for g in grads], dtype=torch.float32)


@torch.no_grad()
def clip_grad_per_tensor_(params: Iterable[Tensor], max_norm: float, *, grad_scale: float = 1.0) -> Tensor:
    """Divide each gradient by ``grad_scale``, then scale it by ``min(1, max_norm / (norm + 1e-6))``.

    Returns the norms before clipping, fp32 [n], 0 for a parameter without gradient; ``max_norm`` 0 clips
    nothing.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm: expected a number >= 0, got {max_norm}")
    grads = [p.grad for p in params]
    norms = grad_norms(grads, grad_scale)
    for grad, norm in zip(grads, norms.tolist(), strict=True):
        factor = reference.clip_coefficient(norm, max_norm) / grad_scale
        if grad is not None and factor != 1:
            grad.mul_(factor)
    return norms
