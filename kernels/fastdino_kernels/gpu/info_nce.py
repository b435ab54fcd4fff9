"""Triton form of :func:`fastdino_kernels.info_nce`.

Flash: a program has a block of queries and a part of the queue. It leaves (m, s, O) for each query: the
largest similarity, the sum of the weights exp((l - m) / T), and the weighted sum of the queue's columns.
Similarities and weights never leave the registers. Chunked: GEMMs of blocks of the queue, the weights by
`_fold_kernel`; it leaves the same three, of a single part. Either way `_finish_kernel` merges a query's parts
with its key.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted
from ..info_nce import SMALLEST, autograd, chunked, fake_forward, setup_context
from ..operators import operator
from .launch import LOG2E, Launch, needs_int64, on_device_of, scalar

FLASH_ROWS, FLASH_COLUMNS, FLASH_WARPS, FLASH_STAGES = 64, 64, 8, 2
FLASH_MAX_D = 256
FOLD_BLOCK, FOLD_WARPS = 2048, 8
FINISH_WARPS = 4
MAX_PARTS = 128


@triton.jit
def _start(row, WIDTH: tl.constexpr, INT64: tl.constexpr):
    return row.to(tl.int64) * WIDTH if INT64 else row * WIDTH


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """WIDEN is for Triton's interpreter, which would multiply the bits of bf16 numbers as integers."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit(do_not_specialize=["rows", "blocks_per_part"])
def _flash_kernel(
    query_ptr,  # [R, D]
    queue_ptr,  # [D, Q]
    temp_ptr,  # []
    stats_ptr,  # [parts, R, 2] fp32: m, s
    out_ptr,  # [parts, R, D] fp32: O, where NEEDS_GRAD
    rows,
    blocks_per_part,
    D: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    LOG2E: tl.constexpr,
    INT64: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    start = _start(d, Q, INT64)
    scale = LOG2E / tl.load(temp_ptr)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    query = tl.load(query_ptr + _start(row, D, INT64)[:, None] + d[None, :], inside, 0.0)
    m = tl.full([BLOCK_R], -3.0e38, tl.float32)
    s = tl.zeros([BLOCK_R], tl.float32)
    out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = tl.program_id(1) * blocks_per_part
    for block in range(first, min(first + blocks_per_part, tl.cdiv(Q, BLOCK_Q))):
        offs = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        at = queue_ptr + start[:, None] + offs[None, :]
        if D == BLOCK_D and Q % BLOCK_Q == 0:
            columns = tl.load(at)
        else:
            columns = tl.load(at, (d < D)[:, None] & (offs < Q)[None, :], 0.0)
        similar = _dot(query, columns, tl.zeros([BLOCK_R, BLOCK_Q], tl.float32), WIDEN)
        if Q % BLOCK_Q != 0:
            similar = tl.where((offs < Q)[None, :], similar, -float("inf"))
        top = tl.maximum(m, tl.max(similar, 1))
        p = tl.exp2((similar - top[:, None]) * scale)
        moved = tl.exp2((m - top) * scale)
        s = s * moved + tl.sum(p, 1)
        m = top
        if NEEDS_GRAD:
            out = _dot(p.to(columns.dtype), tl.trans(columns), out * moved[:, None], WIDEN)
    part = tl.program_id(1) * rows + row
    tl.store(stats_ptr + part * 2, m, row < rows)
    tl.store(stats_ptr + part * 2 + 1, s, row < rows)
    if NEEDS_GRAD:
        tl.store(out_ptr + _start(part, D, INT64)[:, None] + d[None, :], out, inside)


@triton.jit
def _fold_kernel(
    block_ptr,  # [R, C]: similarities, then weights where NEEDS_GRAD
    temp_ptr,  # []
    stats_ptr,  # [1, R, 2]: m, s
    out_ptr,  # [1, R, D]: O, moved to the new maximum
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    LOG2E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = LOG2E / tl.load(temp_ptr)
    m = tl.load(stats_ptr + row * 2)
    at = block_ptr + row * C
    tops = tl.full([BLOCK], -float("inf"), tl.float32)
    for begin in range(0, C, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        tops = tl.maximum(tops, tl.load(at + offs, offs < C, -float("inf")).to(tl.float32))
    top = tl.maximum(m, tl.max(tops, 0))
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, C, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        x = tl.load(at + offs, offs < C, -float("inf")).to(tl.float32)
        p = tl.exp2((x - top) * scale)
        sums += p
        if NEEDS_GRAD:
            tl.store(at + offs, p.to(block_ptr.dtype.element_ty), offs < C)
    moved = tl.exp2((m - top) * scale)
    tl.store(stats_ptr + row * 2, top)
    tl.store(stats_ptr + row * 2 + 1, tl.load(stats_ptr + row * 2 + 1) * moved + tl.sum(sums, 0))
    if NEEDS_GRAD:
        for begin in range(0, D, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            out = out_ptr + row * D + d
            tl.store(out, tl.load(out, d < D) * moved, d < D)


@triton.jit(do_not_specialize=["rows", "parts"])
def _finish_kernel(
    query_ptr,  # [R, D]
    key_ptr,  # [R, D]
    temp_ptr,  # []
    stats_ptr,  # [parts, R, 2]
    out_ptr,  # [parts, R, D]
    result_ptr,  # [2, R]: loss, 1 where the key is closest
    grad_ptr,  # [R, D] fp32
    rows,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    LOG2E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    temp = tl.load(temp_ptr)
    scale = LOG2E / temp
    query = tl.load(query_ptr + row * D + d, d < D, 0.0).to(tl.float32)
    key = tl.load(key_ptr + row * D + d, d < D, 0.0).to(tl.float32)
    positive = tl.sum(query * key, 0)
    part = tl.arange(0, MAX_PARTS)
    at = stats_ptr + (part * rows + row) * 2
    m = tl.load(at, part < parts, -3.0e38)
    s = tl.load(at + 1, part < parts, 0.0)
    top = tl.max(m, 0)
    total = tl.sum(s * tl.exp2((m - top) * scale), 0)
    difference = (top - positive) * scale + tl.log2(total)
    difference = tl.where(positive == float("inf"), float("nan"), difference)  # no perfect match: an overflow
    loss = tl.maximum(difference, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(difference)))
    tl.store(result_ptr + row, loss * (1 / LOG2E))
    tl.store(result_ptr + rows + row, tl.where((positive > top) & (total == total), 1.0, 0.0))
    if NEEDS_GRAD:
        out = tl.zeros([BLOCK_D], tl.float32)
        for i in range(parts):
            weight = tl.exp2((tl.load(stats_ptr + (i * rows + row) * 2) - top) * scale)
            out += weight * tl.load(out_ptr + (i * rows + row) * D + d, d < D, 0.0)
        share = 1.0 / (1.0 + tl.exp2(-difference)) / (rows * temp)
        tl.store(grad_ptr + row * D + d, share * (out / tl.where(total == 0.0, 1.0, total) - key), d < D)


@functools.cache
def _programs(device: torch.device) -> int:
    """One flash program per multiprocessor; the number of an H100 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _parts(rows: int, q: int, programs: int) -> tuple[int, int]:
    """Parts of the queue, and blocks of FLASH_COLUMNS in each."""
    blocks = triton.cdiv(q, FLASH_COLUMNS)
    wanted = max(1, min(MAX_PARTS, programs // triton.cdiv(rows, FLASH_ROWS)))
    per_part = triton.cdiv(blocks, min(wanted, blocks))
    return triton.cdiv(blocks, per_part), per_part


def _uses_flash(query: Tensor, dtype: torch.dtype) -> bool:
    """Tensor cores as Triton programs them, and a width that registers hold."""
    cores = not query.is_cuda or torch.cuda.get_device_capability(query.device)[0] >= 8
    return cores and dtype in (torch.float16, torch.bfloat16) and query.shape[1] <= FLASH_MAX_D


def _flash(query: Tensor, queue: Tensor, temp: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """-> statistics [parts, R, 2] and weighted sums [parts, R, D] ([parts, R, 0] where not needed)."""
    (rows, d), q = query.shape, queue.shape[1]
    parts, per_part = _parts(rows, q, _programs(query.device))
    stats = torch.empty(parts, rows, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(parts, rows, d if needs_grad else 0, dtype=torch.float32, device=query.device)
    _flash_kernel[(triton.cdiv(rows, FLASH_ROWS), parts)](
        query,
        queue,
        temp,
        stats,
        out,
        rows,
        per_part,
        D=d,
        Q=q,
        BLOCK_R=FLASH_ROWS,
        BLOCK_Q=FLASH_COLUMNS,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        NEEDS_GRAD=needs_grad,
        LOG2E=LOG2E,
        INT64=needs_int64(query, queue, out),
        WIDEN=interpreted() and query.dtype == torch.bfloat16,
        num_warps=FLASH_WARPS,
        num_stages=FLASH_STAGES,
    )
    return stats, out


def _chunked(query: Tensor, queue: Tensor, temp: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """As :func:`_flash`, with one part."""
    rows, d = query.shape
    stats = torch.zeros(1, rows, 2, dtype=torch.float32, device=query.device)
    stats[..., 0] = SMALLEST
    out = torch.zeros(1, rows, d if needs_grad else 0, dtype=torch.float32, device=query.device)

    def fold(block: Tensor) -> None:
        _fold_kernel[(rows,)](
            block,
            temp,
            stats,
            out,
            C=block.shape[1],
            D=d,
            BLOCK=FOLD_BLOCK,
            BLOCK_D=256,
            NEEDS_GRAD=needs_grad,
            LOG2E=LOG2E,
            num_warps=FOLD_WARPS,
        )

    chunked(query, queue, out[0], fold)
    return stats, out


@operator("fastdino::info_nce_triton_fwd", device="default")
def _forward(
    query: Tensor, key: Tensor, queue: Tensor, temp: Tensor, dtype: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss [], accuracy [], gradient of the loss [R, D] fp32 ([R, 0] where not needed)."""
    rows, d = query.shape
    result = torch.empty(2, rows, dtype=torch.float32, device=query.device)
    grad = torch.empty(rows, d if needs_grad else 0, dtype=torch.float32, device=query.device)
    with on_device_of(query):
        if _uses_flash(query, dtype):
            stats, out = _flash(query.to(dtype), queue.to(dtype), temp, needs_grad)
        else:
            stats, out = _chunked(query.to(dtype), queue, temp, needs_grad)
        _finish_kernel[(rows,)](
            query,
            key,
            temp,
            stats,
            out,
            result,
            grad,
            rows,
            len(stats),
            D=d,
            BLOCK_D=triton.next_power_of_2(d),
            MAX_PARTS=MAX_PARTS,
            NEEDS_GRAD=needs_grad,
            LOG2E=LOG2E,
            num_warps=FINISH_WARPS,
        )
    return result[0].mean(), result[1].mean(), grad


torch.library.register_fake(_forward, fake_forward)
torch.library.register_autograd(_forward, autograd, setup_context=setup_context)


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temp: float | Tensor, dtype: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of checked, contiguous arguments, the GEMMs in ``dtype``."""
    return _forward(query, key, queue, scalar(temp, query), dtype, needs_grad)[:2]


def launches() -> list[Launch]:
    rows, q = 256, 65536
    found = []
    shared = dict(temp_ptr="*fp32", stats_ptr="*fp32", out_ptr="*fp32")
    for dtype, d in (("bf16", 256), ("fp16", 256), ("bf16", 128), ("fp16", 128)):
        x = f"*{dtype}"
        parts, per_part = _parts(rows, q, 132)
        found.append(
            Launch(
                f"info_nce_flash_{d}_{dtype}",
                _flash_kernel,
                dict(shared, query_ptr=x, queue_ptr=x, rows="i32", blocks_per_part="i32"),
                dict(
                    dict(D=d, Q=q, BLOCK_R=FLASH_ROWS, BLOCK_Q=FLASH_COLUMNS, BLOCK_D=d),
                    NEEDS_GRAD=True,
                    LOG2E=LOG2E,
                    INT64=False,
                    WIDEN=False,
                ),
                num_warps=FLASH_WARPS,
                num_stages=FLASH_STAGES,
                problem=f"{rows} x {d} queries, {q} negatives, {dtype}",
                grid=triton.cdiv(rows, FLASH_ROWS) * parts,
                bytes=(rows + q) * d * 2 + parts * rows * (d + 2) * 4,
                flops=4 * rows * q * d,
                capabilities=(80, 90),
            )
        )
    for dtype, size, capabilities in (
        ("fp32", 4, (70, 80, 90)),
        ("fp16", 2, (70, 80, 90)),
        ("bf16", 2, (80, 90)),
    ):
        x, d, columns = f"*{dtype}", 256, 8192
        found += [
            Launch(
                f"info_nce_fold_{dtype}",
                _fold_kernel,
                dict(shared, block_ptr=x),
                dict(C=columns, D=d, BLOCK=FOLD_BLOCK, BLOCK_D=256, NEEDS_GRAD=True, LOG2E=LOG2E),
                num_warps=FOLD_WARPS,
                num_stages=3,
                problem=f"{rows} x {columns} similarities, {dtype}",
                grid=rows,
                bytes=2 * rows * columns * size,
                capabilities=capabilities,
            ),
            Launch(
                f"info_nce_finish_{dtype}",
                _finish_kernel,
                dict(
                    shared,
                    query_ptr=x,
                    key_ptr=x,
                    result_ptr="*fp32",
                    grad_ptr="*fp32",
                    rows="i32",
                    parts="i32",
                ),
                dict(D=d, BLOCK_D=d, MAX_PARTS=MAX_PARTS, NEEDS_GRAD=True, LOG2E=LOG2E),
                num_warps=FINISH_WARPS,
                num_stages=3,
                problem=f"{rows} x {d} queries, 33 parts",
                grid=rows,
                bytes=33 * rows * (d + 2) * 4 + rows * d * (2 * size + 4),
                capabilities=capabilities,
            ),
        ]
    return found
