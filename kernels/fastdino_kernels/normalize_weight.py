"""Weight normalisation by rows (Salimans & Kingma 2016) with its gradient, each in one pass over memory.

    w_k = g_k u_k,  u_k = v_k / |v_k|;   dv_k = g_k / |v_k| (dw_k - u_k (u_k . dw_k)),  dg_k = u_k . dw_k

With K = 65536 and D = 256 this layer is larger than a ViT-S; eager autograd takes about ten passes over its
67 MB.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import reference
from .backend import resolve
from .native import DTYPES, call, int64, on_huge_pages, pointer
from .operators import operator
from .validate import check_tensor


@operator("fastdino::normalize_weight_fwd")
def _forward(weight_v: Tensor, weight_g: Tensor, dtype: torch.dtype) -> Tensor:
    out = on_huge_pages(torch.empty_like(weight_v, dtype=dtype))
    arrays = map(pointer, (weight_v, weight_g, out))
    call("fdk_normalize_weight", *arrays, *int64(*weight_v.shape), ctypes.c_int(DTYPES[dtype]))
    return out


@torch.library.register_fake(_forward)
def _(weight_v: Tensor, weight_g: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight_v, dtype=dtype, memory_format=torch.contiguous_format)


@operator("fastdino::normalize_weight_bwd")
def _backward(grad: Tensor, weight_v: Tensor, weight_g: Tensor) -> tuple[Tensor, Tensor]:
    dv, dg = on_huge_pages(torch.empty_like(weight_v)), torch.empty_like(weight_g)
    arrays = map(pointer, (grad, weight_v, weight_g, dv, dg))
    call("fdk_normalize_weight_gradient", *arrays, *int64(*weight_v.shape), ctypes.c_int(DTYPES[grad.dtype]))
    return dv, dg


@torch.library.register_fake(_backward)
def _(grad: Tensor, weight_v: Tensor, weight_g: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight_v), torch.empty_like(weight_g)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2])


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    dv, dg = _backward(grad.contiguous(), *ctx.saved_tensors)
    needs_v, needs_g = ctx.needs_input_grad[:2]
    return dv if needs_v else None, dg if needs_g else None, None


torch.library.register_autograd(_forward, _autograd, setup_context=_setup_context)


def _output_dtype(weight_v: Tensor) -> torch.dtype:
    device = weight_v.device.type
    if weight_v.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return weight_v.dtype
    dtype = torch.get_autocast_dtype(device)
    return weight_v.dtype if device == "cpu" and dtype != torch.bfloat16 else dtype


def normalize_weight(weight_v: Tensor, weight_g: Tensor) -> Tensor:
    """Weight normalisation by rows: ``g_k v_k / |v_k|``.

    Args: weight_v [K, D] and weight_g [K, 1], both differentiable.

    Returns: [K, D] in the dtype of ``weight_v``; of fp32 weights under autocast (on the CPU to bf16 only), in
        autocast's dtype, to which the GEMM it feeds would round anyway: halves the traffic to it and back.
        On a GPU rows need a length of 1e-15 at least, whose square fp32 can hold.

    Raises: TypeError, ValueError naming the argument.
    """
    check_tensor("weight_v", weight_v, ("K", "D"))
    check_tensor("weight_g", weight_g, (weight_v.shape[0], 1), like=weight_v)
    dtype = _output_dtype(weight_v)
    chosen = resolve(weight_v, weight_g)
    if chosen == "triton":
        from .gpu.normalize_weight import MAX_COLUMNS
        from .gpu.normalize_weight import normalize_weight as on_gpu

        if weight_v.shape[1] <= MAX_COLUMNS:
            return on_gpu(weight_v, weight_g, dtype)
        chosen = "reference"
    if chosen == "reference" or weight_v.dtype != torch.float32 or weight_g.dtype != torch.float32:
        return reference.normalize_weight(weight_v, weight_g).to(dtype)
    return _forward(weight_v.contiguous(), weight_g.contiguous(), dtype)
