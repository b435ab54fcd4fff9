"""Triton form of :mod:`fastdino_kernels.sinkhorn`.

In base 2, ``y_rk = (x_rk / u - c_k) log2(e)``. A sample's sum is taken by several programs, each of a part of
its prototypes, which leave (M, S): the largest y and the sum of 2^(y - M); readers merge the parts. Then

    q_rk = 2^(y_rk - M_r) / S_r,    next c_k = c_k + log sum_r q_rk

No half-iteration after the first needs a maximum over the samples, since their sum is at least 1 / (R K).
Maxima are kept element by element, so the loops exchange nothing between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import operator
from ..sinkhorn import Form, fake_columns, fake_step, fake_targets
from .launch import LOG2E, Launch, needs_int64, on_device_of

ROWS_TILE, ROWS_WARPS = (8, 256), 4  # samples by prototypes
COLUMNS_TILE, COLUMNS_WARPS = (16, 128), 4
NARROW_TILE = (64, 32)  # for the columns of few prototypes
WRITE_TILE, WRITE_WARPS = (8, 256), 4
MAX_PARTS = 32
PROGRAMS = 1024  # wanted at least


@triton.jit
def _start(row, WIDTH: tl.constexpr, INT64: tl.constexpr):
    return row.to(tl.int64) * WIDTH if INT64 else row * WIDTH


@triton.jit
def _offsets(c_ptr, offs, mask, scale, LOG2E: tl.constexpr):
    """c log2(e) = logit * scale + rest, in fp32; 0 for a prototype that no sample admits.

    Logits are compared before they are scaled, so that large ones lose no digits.
    """
    c = tl.load(c_ptr + offs, mask, 0.0)
    c = tl.where(c == -float("inf"), 0.0, c) * LOG2E
    logit = (c * (1.0 / scale.to(tl.float64))).to(tl.float32)
    rest = tl.where(c == float("inf"), 0.0, c - logit.to(tl.float64) * scale.to(tl.float64))
    return logit, rest.to(tl.float32)


@triton.jit
def _merge(part_ptr, row, mask, PARTS: tl.constexpr):
    """-> M [rows], 1 / S [rows] from part_ptr [R, PARTS, 2]."""
    at = part_ptr + (row[:, None] * PARTS + tl.arange(0, PARTS)[None, :]) * 2
    m = tl.load(at, mask[:, None], 0.0)
    s = tl.load(at + 1, mask[:, None], 0.0)
    top = tl.max(m, 1)
    return top, 1.0 / tl.sum(s * tl.exp2(m - top[:, None]), 1)


@triton.jit(do_not_specialize=["rows"])
def _columns_kernel(
    x_ptr,  # [R, K]
    temp_ptr,  # []
    out_ptr,  # [K] fp64: log sum_r exp(x / u)
    rows,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG2E: tl.constexpr,
    INT64: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = LOG2E / tl.load(temp_ptr)
    m = tl.full([BLOCK_R, BLOCK_K], -3.0e38, tl.float32)
    s = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for begin in range(0, rows, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (offs < K)[None, :]
        x = tl.load(x_ptr + _start(row, K, INT64)[:, None] + offs[None, :], mask, -float("inf")).to(
            tl.float32
        )
        d = (x - m) * scale
        e = tl.exp2(-tl.abs(d))
        s = tl.where(d > 0, s * e + 1.0, s + e)
        m = tl.maximum(m, x)
    top = tl.max(m, 0)
    total = tl.sum(s * tl.exp2((m - top[None, :]) * scale), 0)
    result = (top.to(tl.float64) * scale.to(tl.float64) + tl.log2(total).to(tl.float64)) * (1 / LOG2E)
    tl.store(out_ptr + offs, result, offs < K)


@triton.jit(do_not_specialize=["rows", "blocks_per_part"])
def _rows_kernel(
    x_ptr,  # [R, K]
    c_ptr,  # [K] fp64
    temp_ptr,  # []
    part_ptr,  # [R, PARTS, 2]: M, S
    rows,
    blocks_per_part,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    LOG2E: tl.constexpr,
    INT64: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = _start(row, K, INT64)
    scale = LOG2E / tl.load(temp_ptr)
    m = tl.full([BLOCK_R, BLOCK_K], -3.0e38, tl.float32)
    s = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    first = tl.program_id(1) * blocks_per_part
    for block in range(first, min(first + blocks_per_part, tl.cdiv(K, BLOCK_K))):
        offs = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (row < rows)[:, None] & (offs < K)[None, :]
        logit, rest = _offsets(c_ptr, offs, offs < K, scale, LOG2E)
        x = tl.load(x_ptr + start[:, None] + offs[None, :], mask, -float("inf")).to(tl.float32)
        y = (x - logit[None, :]) * scale - rest[None, :]
        e = tl.exp2(-tl.abs(y - m))
        s = tl.where(y > m, s * e + 1.0, s + e)
        m = tl.maximum(m, y)
    top = tl.max(m, 1)
    total = tl.sum(s * tl.exp2(m - top[:, None]), 1)
    out = part_ptr + (row * PARTS + tl.program_id(1)) * 2
    tl.store(out, top, row < rows)
    tl.store(out + 1, total, row < rows)


@triton.jit(do_not_specialize=["rows"])
def _step_kernel(
    x_ptr,  # [R, K]
    c_ptr,  # [K] fp64
    temp_ptr,  # []
    part_ptr,  # [R, PARTS, 2]
    out_ptr,  # [K] fp64: c + log sum_r q
    rows,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    LOG2E: tl.constexpr,
    INT64: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = LOG2E / tl.load(temp_ptr)
    logit, rest = _offsets(c_ptr, offs, offs < K, scale, LOG2E)
    sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for begin in range(0, rows, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (offs < K)[None, :]
        m, factor = _merge(part_ptr, row, row < rows, PARTS)
        x = tl.load(x_ptr + _start(row, K, INT64)[:, None] + offs[None, :], mask, 0.0).to(tl.float32)
        y = (x - logit[None, :]) * scale - rest[None, :]
        sums += tl.where(mask, tl.exp2(y - m[:, None]) * factor[:, None], 0.0)
    c = logit.to(tl.float64) * scale.to(tl.float64) + rest.to(tl.float64)
    tl.store(out_ptr + offs, (c + tl.log2(tl.sum(sums, 0)).to(tl.float64)) * (1 / LOG2E), offs < K)


@triton.jit(do_not_specialize=["rows"])
def _write_kernel(
    x_ptr,  # [R, K]
    c_ptr,  # [K] fp64
    temp_ptr,  # []
    part_ptr,  # [R, PARTS, 2]
    out_ptr,  # [R, K]
    rows,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    LOG2E: tl.constexpr,
    INT64: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(K, BLOCK_K)
    row = (tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = _start(row, K, INT64)[:, None] + offs[None, :]
    mask = (row < rows)[:, None] & (offs < K)[None, :]
    scale = LOG2E / tl.load(temp_ptr)
    logit, rest = _offsets(c_ptr, offs, offs < K, scale, LOG2E)
    m, factor = _merge(part_ptr, row, row < rows, PARTS)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    q = tl.exp2((x - logit[None, :]) * scale - rest[None, :] - m[:, None]) * factor[:, None]
    tl.store(out_ptr + at, q.to(out_ptr.dtype.element_ty), mask)


def _columns_tile(k: int) -> tuple[int, int]:
    return COLUMNS_TILE if k >= 256 * COLUMNS_TILE[1] else NARROW_TILE


def _parts(rows: int, k: int) -> int:
    """Programs for each sample, a power of two."""
    parts, row_blocks = 1, triton.cdiv(rows, ROWS_TILE[0])
    while parts < MAX_PARTS and 2 * parts * row_blocks <= PROGRAMS and 2 * parts * ROWS_TILE[1] <= k:
        parts *= 2
    return parts


def _sums(logits: Tensor, temp: Tensor, c: Tensor) -> Tensor:
    """-> M, S of the parts of all samples, [R, PARTS, 2]."""
    rows, k = logits.shape
    parts = _parts(rows, k)
    out = torch.empty(rows, parts, 2, dtype=torch.float32, device=logits.device)
    _rows_kernel[(triton.cdiv(rows, ROWS_TILE[0]), parts)](
        logits,
        c,
        temp,
        out,
        rows,
        triton.cdiv(triton.cdiv(k, ROWS_TILE[1]), parts),
        K=k,
        BLOCK_R=ROWS_TILE[0],
        BLOCK_K=ROWS_TILE[1],
        PARTS=parts,
        LOG2E=LOG2E,
        INT64=needs_int64(logits),
        num_warps=ROWS_WARPS,
    )
    return out


@operator("fastdino::sinkhorn_columns_triton", device="default")
def _columns(logits: Tensor, temp: Tensor) -> Tensor:
    rows, k = logits.shape
    block_r, block_k = _columns_tile(k)
    out = torch.empty(k, dtype=torch.float64, device=logits.device)
    with on_device_of(logits):
        _columns_kernel[(triton.cdiv(k, block_k),)](
            logits,
            temp,
            out,
            rows,
            K=k,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            LOG2E=LOG2E,
            INT64=needs_int64(logits),
            num_warps=COLUMNS_WARPS,
        )
    return out


@operator("fastdino::sinkhorn_step_triton", device="default")
def _step(logits: Tensor, temp: Tensor, c: Tensor) -> Tensor:
    rows, k = logits.shape
    block_r, block_k = _columns_tile(k)
    out = torch.empty_like(c)
    with on_device_of(logits):
        part = _sums(logits, temp, c)
        _step_kernel[(triton.cdiv(k, block_k),)](
            logits,
            c,
            temp,
            part,
            out,
            rows,
            K=k,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            PARTS=part.shape[1],
            LOG2E=LOG2E,
            INT64=needs_int64(logits),
            num_warps=COLUMNS_WARPS,
        )
    return out


@operator("fastdino::sinkhorn_targets_triton", device="default")
def _targets(logits: Tensor, temp: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    rows, k = logits.shape
    out = torch.empty_like(logits, dtype=dtype)
    with on_device_of(logits):
        part = _sums(logits, temp, c)
        _write_kernel[(triton.cdiv(rows, WRITE_TILE[0]) * triton.cdiv(k, WRITE_TILE[1]),)](
            logits,
            c,
            temp,
            part,
            out,
            rows,
            K=k,
            BLOCK_R=WRITE_TILE[0],
            BLOCK_K=WRITE_TILE[1],
            PARTS=part.shape[1],
            LOG2E=LOG2E,
            INT64=needs_int64(logits, out),
            num_warps=WRITE_WARPS,
        )
    return out


torch.library.register_fake(_columns, fake_columns)
torch.library.register_fake(_step, fake_step)
torch.library.register_fake(_targets, fake_targets)

TRITON = Form(_columns, _step, _targets)


def launches() -> list[Launch]:
    rows, k = 128, 65536  # two global views of 64 images
    tile, parts = _columns_tile(k), _parts(rows, k)
    blocks = triton.cdiv(k, tile[1])
    row_programs = triton.cdiv(rows, ROWS_TILE[0]) * parts
    write_programs = triton.cdiv(rows, WRITE_TILE[0]) * triton.cdiv(k, WRITE_TILE[1])
    passes = (  # kernel, tile, warps, programs, bytes written for each logit
        (_columns_kernel, tile, COLUMNS_WARPS, blocks, 0),
        (_rows_kernel, ROWS_TILE, ROWS_WARPS, row_programs, 0),
        (_step_kernel, tile, COLUMNS_WARPS, blocks, 0),
        (_write_kernel, WRITE_TILE, WRITE_WARPS, write_programs, 4),
    )
    everywhere, from_80 = (70, 80, 90), (80, 90)
    found = []
    for dtype, size, capabilities in (("fp32", 4, everywhere), ("fp16", 2, everywhere), ("bf16", 2, from_80)):
        for kernel, (block_r, block_k), warps, programs, written in passes:
            pointers = dict(x_ptr=f"*{dtype}", c_ptr="*fp64", temp_ptr="*fp32", part_ptr="*fp32")
            out = "*fp32" if kernel is _write_kernel else "*fp64"
            signature = dict(pointers, out_ptr=out, rows="i32", blocks_per_part="i32")
            constants = dict(K=k, BLOCK_R=block_r, BLOCK_K=block_k, PARTS=parts, LOG2E=LOG2E, INT64=False)
            found.append(
                Launch(
                    f"sinkhorn{kernel.__name__.removesuffix('_kernel')}_{dtype}",
                    kernel,
                    {name: kind for name, kind in signature.items() if name in kernel.arg_names},
                    {name: value for name, value in constants.items() if name in kernel.arg_names},
                    num_warps=warps,
                    num_stages=3,
                    problem=f"{rows} x {k}, {dtype} logits",
                    grid=programs,
                    bytes=rows * k * (size + written),
                    capabilities=capabilities,
                )
            )
    return found
