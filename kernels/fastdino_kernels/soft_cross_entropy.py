"""Cross-entropy with given target distributions, one loss per row.

With ``x = logits / s``, ``m = max x``, ``y = x - m``, ``l = log sum_k exp(y_k)`` and ``n = sum_k target_k``:

    loss  = -sum_k target_k log softmax(x)_k = n l - sum_k target_k y_k
    dx_k  = n softmax(x)_k - target_k,      d logits = dx / s

This is for code that hands over the teacher's probabilities; where its logits are known,
:func:`fastdino_kernels.dino_loss` never writes them. The loss is linear in the target: add up the targets of
a row first and call once. Forward and backward each read logits and target once; between them only ``m``,
``l`` and ``n`` of every row are kept, and nothing of size [rows, K] but the gradient is allocated.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import reference
from .backend import resolve
from .dino_loss import KERNEL_DTYPES, temperature
from .native import call, empty, int64, on_huge_pages, pointer
from .operators import operator, register_gradient
from .validate import check_no_grad, check_temperature, check_tensor


@operator("fastdino::soft_cross_entropy_fwd")
def _forward(logits: Tensor, target: Tensor, temp: Tensor) -> tuple[Tensor, Tensor]:
    """-> loss [R], statistics m and n / sum exp(y) [2, R]."""
    rows = len(logits)
    loss, stats = empty(rows), empty(2, rows)
    arguments = _problem(logits, target, temp)
    call("fdk_soft_cross_entropy", pointer(logits), pointer(target), *arguments, *map(pointer, (loss, stats)))
    return loss, stats


@torch.library.register_fake(_forward)
def _(logits: Tensor, target: Tensor, temp: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(2, rows, dtype=torch.float32)


@operator("fastdino::soft_cross_entropy_bwd")
def _backward(grad: Tensor, logits: Tensor, target: Tensor, temp: Tensor, stats: Tensor) -> Tensor:
    """-> gradient of the logits, [R, K] in their dtype; ``grad`` [R] fp32."""
    out = on_huge_pages(torch.empty_like(logits))
    tensors = map(pointer, (logits, target, stats, grad))
    call("fdk_soft_cross_entropy_gradient", *tensors, *_problem(logits, target, temp), pointer(out))
    return out


@torch.library.register_fake(_backward)
def _(grad: Tensor, logits: Tensor, target: Tensor, temp: Tensor, stats: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _problem(logits: Tensor, target: Tensor, temp: Tensor) -> tuple[object, ...]:
    assert logits.dtype in KERNEL_DTYPES and target.dtype == torch.float32
    assert logits.is_contiguous() and target.is_contiguous()
    bf16 = logits.dtype == torch.bfloat16
    return (*int64(*logits.shape), ctypes.c_int(bf16), ctypes.c_double(temp.item()))


register_gradient(_forward, _backward, leaves=1, kept=1, passed=0)


def soft_cross_entropy(logits: Tensor, target: Tensor, *, temp: float | Tensor) -> Tensor:
    """``-sum_k target_k log softmax(logits / temp)_k`` of every row.

    Args:
        logits: [R, K]; fp32, bf16, fp16 or float64; differentiable.
        target: [R, K], any floating dtype; rows need not add up to 1; must not require grad.
        temp: number > 0, or 0-dim tensor.

    Returns:
        [R] fp32 (float64 for float64 logits). A target of exactly 0 meets any logit, -inf included, at no
        cost.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_tensor("logits", logits, ("R", "K"))
    check_tensor("target", target, tuple(logits.shape), like=logits)
    check_no_grad("target", target)
    check_temperature("temp", temp)
    kind = resolve(logits, target)
    if kind == "reference" or logits.shape[1] == 0:
        return reference.soft_cross_entropy(logits, target, temp=temp)
    if kind == "triton":
        from .gpu import soft_cross_entropy as gpu

        return gpu.soft_cross_entropy(logits, target, temp)
    dtype = logits.dtype if logits.dtype in KERNEL_DTYPES else torch.float32
    return _forward(logits.to(dtype).contiguous(), target.float().contiguous(), temperature(temp))[0]
