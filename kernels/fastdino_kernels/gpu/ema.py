"""The teacher's EMA, gradient norms and per-tensor clipping in Triton.

The EMA is one launch: 12 bytes per fp32 parameter, 10 with a 16-bit student. Norms are two: sums of squares
by chunks (4 bytes per fp32 element), then one program per tensor that adds them up, both in a fixed order.
Clipping adds a pass over the gradients that need it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native import DTYPES
from . import multi_tensor
from .launch import Launch, on_device_of
from .multi_tensor import (
    BLOCK,
    CHUNK,
    WARPS,
    Layout,
    address,
    chunk_of,
    clip,
    load_block,
    pointer,
    store_half,
    total_of,
    whole_blocks,
)


@triton.jit
def _ema_block(t_at, s_at, code, keep, rest, valid, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    t_ptr = pointer(t_at, tl.float32, ALIGNED) + tl.arange(0, BLOCK)
    t = tl.load(t_ptr, mask=valid, other=0.0)
    tl.store(t_ptr, keep * t + rest * load_block(s_at, code, valid, BLOCK, ALIGNED), mask=valid)


@triton.jit(do_not_specialize=["keep", "rest", "n", "n_chunks"])
def _ema_kernel(
    layout,  # int64: see multi_tensor.Layout
    table,  # int64 [3, n]: type of the student, teacher, student
    momentum,  # fp32 scalar, with ON_DEVICE
    keep,
    rest,
    n,
    n_chunks,
    ON_DEVICE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, count = chunk_of(layout, tl.program_id(0), n, n_chunks, CHUNK)
    if ON_DEVICE:
        keep = tl.load(momentum).to(tl.float32)
        rest = 1.0 - keep
    code = tl.load(table + tensor)
    size = tl.where(code == 0, 4, 2)
    t = tl.load(table + n + tensor) + start * 4
    s = tl.load(table + 2 * n + tensor) + start * size
    count = tl.where(rest == 0.0, 0, count)  # a momentum of 1 changes no byte
    whole = whole_blocks(t | s, count, BLOCK)
    every = tl.full([BLOCK], 1, tl.int1)
    for i in range(0, whole, BLOCK):
        _ema_block(t + i * 4, s + i * size, code, keep, rest, every, BLOCK, True)
    for i in range(whole, count, BLOCK):
        valid = tl.arange(0, BLOCK) < count - i
        _ema_block(t + i * 4, s + i * size, code, keep, rest, valid, BLOCK, False)


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _squares_kernel(
    layout,
    codes,  # int64 [n]: types of the gradients
    grads,  # int64 [n]: addresses, 0 for none
    partial,  # fp64 [n_chunks]
    found,  # fp64 scalar: 1 as soon as some element is NaN or infinite
    n,
    n_chunks,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    tensor, start, count = chunk_of(layout, i, n, n_chunks, CHUNK)
    code = tl.load(codes + tensor)
    size = tl.where(code == 0, 4, 2)
    base = tl.load(grads + tensor)
    count = tl.where(base == 0, 0, count)
    g = base + start * size
    whole = whole_blocks(g, count, BLOCK)
    every = tl.full([BLOCK], 1, tl.int1)
    # Squares of fp32 numbers neither overflow nor vanish in fp64: the sum is finite if the elements are.
    squares = tl.zeros([BLOCK], tl.float64)
    for k in range(0, whole, BLOCK):
        x = load_block(g + k * size, code, every, BLOCK, True).to(tl.float64)
        squares += x * x
    for k in range(whole, count, BLOCK):
        valid = tl.arange(0, BLOCK) < count - k
        x = load_block(g + k * size, code, valid, BLOCK, False).to(tl.float64)
        squares += x * x
    total = tl.sum(squares)
    tl.store(partial + i, total)
    tl.store(found, 1.0, mask=(total < float("inf")) == 0)  # every writer writes the same


@triton.jit(do_not_specialize=["n"])
def _norms_kernel(
    layout,
    numbers,  # fp64: found, grad_scale, max_norm
    partial,
    norms,  # fp32 [n]
    factors,  # fp32 [n]: what the gradients are to be multiplied with
    n,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0)
    scale = tl.load(numbers + 1)
    norm = tl.sqrt(total_of(layout, partial, tensor, n, BLOCK)) / scale
    tl.store(norms + tensor, norm.to(tl.float32))
    tl.store(factors + tensor, (clip(norm, tl.load(numbers + 2)) / scale).to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def _totals_kernel(layout, partial, totals, n, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    tl.store(totals + tensor, total_of(layout, partial, tensor, n, BLOCK))


@triton.jit
def _scale_block(at, code, factor, valid, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    x = load_block(at, code, valid, BLOCK, ALIGNED) * factor
    tl.store(pointer(at, tl.float32, ALIGNED) + tl.arange(0, BLOCK), x, mask=valid & (code == 0))
    store_half(at, x, code, valid & (code != 0), BLOCK, ALIGNED)


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _scale_kernel(layout, codes, grads, factors, n, n_chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    tensor, start, count = chunk_of(layout, tl.program_id(0), n, n_chunks, CHUNK)
    code = tl.load(codes + tensor)
    size = tl.where(code == 0, 4, 2)
    g = tl.load(grads + tensor) + start * size
    factor = tl.load(factors + tensor)
    count = tl.where(factor == 1.0, 0, count)
    whole = whole_blocks(g, count, BLOCK)
    every = tl.full([BLOCK], 1, tl.int1)
    for i in range(0, whole, BLOCK):
        _scale_block(g + i * size, code, factor, every, BLOCK, True)
    for i in range(whole, count, BLOCK):
        _scale_block(g + i * size, code, factor, tl.arange(0, BLOCK) < count - i, BLOCK, False)


def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """For plain tensors: fp32 teachers, students of the types in ``DTYPES``."""
    device = teacher[0].device
    layout = multi_tensor.layout([t.numel() for t in teacher], device)
    columns = [[DTYPES[s.dtype] for s in student], list(map(address, teacher)), list(map(address, student))]
    table = multi_tensor.constants(columns, device)
    on_device = isinstance(momentum, Tensor)
    keep = 0.0 if on_device else float(momentum)
    if layout.n_chunks:
        with on_device_of(table):
            _ema_kernel[(layout.n_chunks,)](
                layout.table, table, momentum if on_device else table, keep, 1.0 - keep,
                layout.n, layout.n_chunks, on_device, CHUNK, BLOCK, num_warps=WARPS,
            )  # fmt: skip


def sums_of_squares(layout: Layout, codes: Tensor, grads: Tensor, found: Tensor) -> Tensor:
    """Partial sums fp64 [n_chunks]; ``found`` becomes 1 if some element is not finite."""
    partial = torch.empty(layout.n_chunks, dtype=torch.float64, device=codes.device)
    if layout.n_chunks:
        _squares_kernel[(layout.n_chunks,)](
            layout.table, codes, grads, partial, found, layout.n, layout.n_chunks,
            CHUNK, BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return partial


def grad_square_sums(grads: Sequence[Tensor]) -> Tensor:
    """Sums of squares fp64 [n] of plain gradients."""
    device = grads[0].device
    layout = multi_tensor.layout([g.numel() for g in grads], device)
    codes = multi_tensor.constants([[DTYPES[g.dtype] for g in grads]], device)
    addresses, found = multi_tensor.per_step(list(map(address, grads)), [0.0], device)
    totals = torch.empty(layout.n, dtype=torch.float64, device=device)
    with on_device_of(codes):
        partial = sums_of_squares(layout, codes, addresses, found)
        _totals_kernel[(layout.n,)](layout.table, partial, totals, layout.n, BLOCK, num_warps=WARPS)
    return totals


def grad_norms(grads: Sequence[Tensor], grad_scale: float | Tensor, max_norm: float | None) -> Tensor:
    """Norms fp32 [n] of plain gradients divided by ``grad_scale``; with ``max_norm`` they are unscaled and
    clipped."""
    device = grads[0].device
    layout = multi_tensor.layout([g.numel() for g in grads], device)
    codes = multi_tensor.constants([[DTYPES[g.dtype] for g in grads]], device)
    addresses, numbers = multi_tensor.per_step(
        list(map(address, grads)), [0.0, grad_scale, max_norm or 0.0], device
    )
    norms, factors = torch.empty(2, layout.n, dtype=torch.float32, device=device)
    with on_device_of(codes):
        partial = sums_of_squares(layout, codes, addresses, numbers)
        _norms_kernel[(layout.n,)](
            layout.table, numbers, partial, norms, factors, layout.n, BLOCK, num_warps=WARPS
        )
        if max_norm is not None and layout.n_chunks:
            _scale_kernel[(layout.n_chunks,)](
                layout.table, codes, addresses, factors, layout.n, layout.n_chunks,
                CHUNK, BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return norms


def launches() -> list[Launch]:
    """ViT-S/16 with its head at K = 65536."""
    elements, n, n_chunks, problem = multi_tensor.MODEL
    sizes = dict(n="i32", n_chunks="i32")
    blocks = dict(CHUNK=CHUNK, BLOCK=BLOCK)
    ema = dict(layout="*i64", table="*i64", momentum="*fp32", keep="fp32", rest="fp32", **sizes)
    squares = dict(layout="*i64", codes="*i64", grads="*i64", partial="*fp64", found="*fp64", **sizes)
    norms = dict(layout="*i64", numbers="*fp64", partial="*fp64", norms="*fp32", factors="*fp32", n="i32")
    totals = dict(layout="*i64", partial="*fp64", totals="*fp64", n="i32")
    scale = dict(layout="*i64", codes="*i64", grads="*i64", factors="*fp32", **sizes)
    rows = [
        ("ema_update_", _ema_kernel, ema, dict(ON_DEVICE=False, **blocks), n_chunks, 12 * elements),
        ("grad_norms", _squares_kernel, squares, blocks, n_chunks, 4 * elements),
        ("grad_norms: by tensor", _norms_kernel, norms, dict(BLOCK=BLOCK), n, 8 * n_chunks),
        ("grad_square_sums: by tensor", _totals_kernel, totals, dict(BLOCK=BLOCK), n, 8 * n_chunks),
        ("clip_grad_per_tensor_", _scale_kernel, scale, blocks, n_chunks, 8 * elements),
    ]
    return [
        Launch(name, kernel, signature, constants, WARPS, 1, problem, grid, traffic)
        for name, kernel, signature, constants, grid, traffic in rows
    ]
