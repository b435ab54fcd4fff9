"""Triton form of weight normalisation by rows: each direction reads and writes every array once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import operator
from .launch import Launch, needs_int64, on_device_of

MAX_COLUMNS = 8192  # a row is held in the registers of one program
TILE, WARPS = 4096, 4  # elements per program: 32 per thread


@triton.jit
def _tile(K, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INT64: tl.constexpr):
    """Rows [ROWS], offsets [ROWS, COLUMNS] and their masks."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    row_mask = rows < K
    if COLUMNS == D:
        mask = row_mask[:, None]
    else:
        mask = row_mask[:, None] & (columns < D)[None, :]
    if INT64:
        rows = rows.to(tl.int64)
    return rows, rows[:, None] * D + columns[None, :], row_mask, mask


@triton.jit(do_not_specialize=["K"])
def _forward_kernel(
    v_ptr,  # [K, D]
    g_ptr,  # [K, 1]
    out_ptr,  # [K, D]
    K,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INT64: tl.constexpr,
):
    rows, offsets, row_mask, mask = _tile(K, D, ROWS, COLUMNS, INT64)
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    scale = g / tl.sqrt(tl.sum(v * v, 1))
    tl.store(out_ptr + offsets, (v * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["K"])
def _backward_kernel(
    dw_ptr,  # [K, D]
    v_ptr,  # [K, D]
    g_ptr,  # [K, 1]
    dv_ptr,  # [K, D]
    dg_ptr,  # [K, 1], unused where not NEEDS_G
    K,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEEDS_G: tl.constexpr,
    INT64: tl.constexpr,
):
    rows, offsets, row_mask, mask = _tile(K, D, ROWS, COLUMNS, INT64)
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dw = tl.load(dw_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    squares, along = tl.sum(v * v, 1), tl.sum(v * dw, 1)
    norm = tl.sqrt(squares)
    dv = (g / norm)[:, None] * (dw - (along / squares)[:, None] * v)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    if NEEDS_G:
        tl.store(dg_ptr + rows, (along / norm).to(dg_ptr.dtype.element_ty), mask=row_mask)


def _grid(k: int, d: int) -> tuple[int, dict[str, int]]:
    columns = triton.next_power_of_2(d)
    rows = max(1, TILE // columns)
    return triton.cdiv(k, rows), {"D": d, "ROWS": rows, "COLUMNS": columns}


@operator("fastdino::normalize_weight_triton_fwd", device="default")
def _forward(weight_v: Tensor, weight_g: Tensor, dtype: torch.dtype) -> Tensor:
    """-> g v / |v|, [K, D] of ``dtype``."""
    weight_v, weight_g = weight_v.contiguous(), weight_g.contiguous()
    out = torch.empty_like(weight_v, dtype=dtype)
    programs, sizes = _grid(*weight_v.shape)
    with on_device_of(weight_v):
        _forward_kernel[(programs,)](
            weight_v, weight_g, out, len(weight_v), **sizes, INT64=needs_int64(out), num_warps=WARPS
        )
    return out


@torch.library.register_fake(_forward)
def _(weight_v: Tensor, weight_g: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight_v, dtype=dtype, memory_format=torch.contiguous_format)


@operator("fastdino::normalize_weight_triton_bwd", device="default")
def _backward(grad: Tensor, weight_v: Tensor, weight_g: Tensor, needs_g: bool) -> tuple[Tensor, Tensor]:
    """-> dv [K, D], and dg [K, 1], or [0] where not needed."""
    grad, weight_v, weight_g = grad.contiguous(), weight_v.contiguous(), weight_g.contiguous()
    dv = torch.empty_like(weight_v)
    dg = torch.empty_like(weight_g) if needs_g else weight_g.new_empty(0)
    programs, sizes = _grid(*weight_v.shape)
    with on_device_of(weight_v):
        _backward_kernel[(programs,)](
            grad, weight_v, weight_g, dv, dg, len(weight_v),
            **sizes, NEEDS_G=needs_g, INT64=needs_int64(dv), num_warps=WARPS,
        )  # fmt: skip
    return dv, dg


@torch.library.register_fake(_backward)
def _(grad: Tensor, weight_v: Tensor, weight_g: Tensor, needs_g: bool) -> tuple[Tensor, Tensor]:
    dv = torch.empty_like(weight_v, memory_format=torch.contiguous_format)
    return dv, torch.empty_like(
        weight_g, memory_format=torch.contiguous_format
    ) if needs_g else weight_g.new_empty(0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _autograd(ctx, grad):
    needs_v, needs_g = ctx.needs_input_grad[:2]
    dv, dg = _backward(grad, *ctx.saved_tensors, needs_g)
    return dv if needs_v else None, dg if needs_g else None, None


torch.library.register_autograd(_forward, _autograd, setup_context=_setup_context)


def normalize_weight(weight_v: Tensor, weight_g: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, D] of ``dtype``, of checked arguments with D <= MAX_COLUMNS."""
    return _forward(weight_v, weight_g, dtype)


def launches() -> list[Launch]:
    """65536 prototypes of width 256, fp32 parameters, weights in the GEMM's dtype."""
    k, d = 65536, 256
    programs, sizes = _grid(k, d)
    found = []
    for name, size in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        capabilities = (80, 90) if name == "bf16" else (70, 80, 90)
        inputs = {"v_ptr": "*fp32", "g_ptr": "*fp32", "K": "i32"}
        found += [
            Launch(
                f"normalize_weight_{name}", _forward_kernel, {**inputs, "out_ptr": f"*{name}"},
                {**sizes, "INT64": False}, WARPS, 3,
                "K=65536 D=256", programs, k * d * (4 + size), 0, capabilities,
            ),
            Launch(
                f"normalize_weight_gradient_{name}", _backward_kernel,
                {**inputs, "dw_ptr": f"*{name}", "dv_ptr": "*fp32", "dg_ptr": "*fp32"},
                {**sizes, "NEEDS_G": False, "INT64": False}, WARPS, 3,
                "K=65536 D=256", programs, k * d * (8 + size), 0, capabilities,
            ),
        ]  # fmt: skip
    return found
