"""Triton kernels of the loss between matched rows (matched_loss.py), on chunks of columns of the logits.

Each row and block of BLOCK columns leaves a record of its own, in base 2 and relative to its own maximum.
With ``y = (x - max) log2(e) / temp`` that is, of the student, max, sum = sum 2^y and, for each target g,
cross = sum 2^y_g y; of the teacher, max, sum, energy = sum 2^y y. The teacher's rows are found by index while
a block of the student's is at hand, and are never copied. Two small kernels merge the records in a fixed
order: neither the size of a chunk nor a second run changes a bit. There is no tl.dot; the same code serves
every GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import LOG2E, Launch

BLOCK = 1024  # columns of a record
ROWS = 4  # of a tile of logits
WARPS = 4  # of every program; a thread holds eight columns of each of the four rows, loaded by 16 bytes
MERGE_BLOCKS, MERGE_ROWS = 16, 32
CENTER_ROWS = 32
CHUNK_BYTES = 48 << 20  # logits of both networks in a chunk; about what a large GPU's L2 holds
_LOG2E = tl.constexpr(LOG2E)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # as maximum, so that -inf - max is no NaN


def column_chunks(k: int, bytes_per_column: int) -> Iterator[slice]:
    """Slices of the K columns, multiples of BLOCK wide but for the last."""
    size = max(1, CHUNK_BYTES // (bytes_per_column * BLOCK)) * BLOCK
    return (slice(begin, min(begin + size, k)) for begin in range(0, k, size))


@triton.jit
def _tile(
    center_ptr,
    rows,
    first_block,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """A program's rows, its columns in the chunk, the mask of both, and the center [1, BLOCK]."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = first_block * BLOCK + cols
    mask = (r < rows)[:, None]
    if K % BLOCK == 0:
        center = tl.load(center_ptr + k)
    else:
        mask = mask & (k < K)[None, :]
        center = tl.load(center_ptr + k, k < K, 0.0)
    return r.to(tl.int64) if INT64 else r, cols, mask, center[None, :]


@triton.jit
def _record(part_ptr, first_block, size, rows, INT64: tl.constexpr):
    """First number of a program's record, of ``size`` numbers for each row: part [blocks, size, rows]."""
    block = first_block + tl.program_id(1)
    return part_ptr + (block.to(tl.int64) if INT64 else block) * size * rows


@triton.jit
def _target(match_ptr, r, g, rows, teacher_rows, G: tl.constexpr, INT64: tl.constexpr):
    """Teacher row that student row r is compared with, and whether there is one."""
    found = tl.load(match_ptr + r * G + g, r < rows, -1)
    valid = (found >= 0) & (found < teacher_rows)
    return found if INT64 else found.to(tl.int32), valid


@triton.jit(do_not_specialize=["rows", "first_block", "stride_blocks"])
def teacher_kernel(
    logits_ptr,  # [T, stride_blocks * BLOCK], a chunk
    center_ptr,  # [K] fp32
    temp_ptr,  # []
    part_ptr,  # [blocks, 3, T] fp32: max, sum, energy
    rows,
    first_block,
    stride_blocks,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    r, cols, mask, center = _tile(center_ptr, rows, first_block, K, ROWS, BLOCK, INT64)
    t = tl.load(logits_ptr + r[:, None] * (stride_blocks * BLOCK) + cols[None, :], mask, -float("inf"))
    t = t.to(tl.float32) - center  # [ROWS, BLOCK]
    top = tl.maximum(tl.max(t, 1), _LOWEST)
    y = (t - top[:, None]) * (_LOG2E / tl.load(temp_ptr))
    w = tl.exp2(y)
    out = _record(part_ptr, first_block, 3, rows, INT64) + r
    tl.store(out, top, r < rows)
    tl.store(out + rows, tl.sum(w, 1), r < rows)
    tl.store(out + 2 * rows, tl.sum(tl.where(w == 0, 0.0, w * y), 1), r < rows)  # no 0 * -inf


@triton.jit(do_not_specialize=["rows", "teacher_rows", "first_block", "stride_blocks"])
def student_kernel(
    student_ptr,  # [R, stride_blocks * BLOCK], a chunk
    teacher_ptr,  # [T, stride_blocks * BLOCK]
    center_ptr,  # [K] fp32
    match_ptr,  # [R, G] int64
    student_temp_ptr,  # []
    teacher_temp_ptr,  # []
    teacher_part_ptr,  # [blocks, 3, T]
    part_ptr,  # [blocks, 2 + G, R] fp32: max, sum, cross terms
    rows,
    teacher_rows,
    first_block,
    stride_blocks,
    K: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    r, cols, mask, center = _tile(center_ptr, rows, first_block, K, ROWS, BLOCK, INT64)
    stride = stride_blocks * BLOCK
    x = tl.load(student_ptr + r[:, None] * stride + cols[None, :], mask, -float("inf")).to(tl.float32)
    top = tl.maximum(tl.max(x, 1), _LOWEST)
    y = (x - top[:, None]) * (_LOG2E / tl.load(student_temp_ptr))  # [ROWS, BLOCK]
    out = _record(part_ptr, first_block, 2 + G, rows, INT64) + r
    tl.store(out, top, r < rows)
    tl.store(out + rows, tl.sum(tl.exp2(y), 1), r < rows)
    if K % BLOCK != 0:
        y = tl.where(mask, y, 0.0)
    teacher_part = _record(teacher_part_ptr, first_block, 3, teacher_rows, INT64)
    teacher_scale = _LOG2E / tl.load(teacher_temp_ptr)
    for g in tl.static_range(G):
        t_row, valid = _target(match_ptr, r, g, rows, teacher_rows, G, INT64)
        t_top = tl.load(teacher_part + t_row, valid, 0.0)
        t_ptr = teacher_ptr + t_row[:, None] * stride + cols[None, :]
        t = tl.load(t_ptr, mask & valid[:, None], -float("inf")).to(tl.float32)
        w = tl.exp2((t - center - t_top[:, None]) * teacher_scale)
        tl.store(out + (2 + g) * rows, tl.sum(w * y, 1), r < rows)


@triton.jit
def _merge_tile(rows, blocks, size, first, BLOCKS: tl.constexpr, ROWS: tl.constexpr, INT64: tl.constexpr):
    """Blocks [BLOCKS] from ``first`` on, rows [ROWS] of a program, offsets of their records, the mask."""
    b = first + tl.arange(0, BLOCKS)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b64 = b.to(tl.int64) if INT64 else b
    return b64, r, (b64 * size)[:, None] * rows + r[None, :], (b < blocks)[:, None] & (r < rows)[None, :]


@triton.jit
def _merged_max(part_ptr, rows, blocks, size, BLOCKS: tl.constexpr, ROWS: tl.constexpr, INT64: tl.constexpr):
    top = tl.full([ROWS], _LOWEST, tl.float32)
    for first in range(0, blocks, BLOCKS):
        _, _, offset, mask = _merge_tile(rows, blocks, size, first, BLOCKS, ROWS, INT64)
        top = tl.maximum(top, tl.max(tl.load(part_ptr + offset, mask, _LOWEST), 0))
    return top


@triton.jit(do_not_specialize=["rows", "blocks"])
def merge_teacher_kernel(
    part_ptr,  # [blocks, 3, T]
    temp_ptr,  # []
    stats_ptr,  # [2, T]: max, sum
    entropy_ptr,  # [T], nats
    rows,
    blocks,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    INT64: tl.constexpr,
):
    scale = _LOG2E / tl.load(temp_ptr)
    top = _merged_max(part_ptr, rows, blocks, 3, BLOCKS, ROWS, INT64)
    total = tl.zeros([ROWS], tl.float32)
    energy = tl.zeros([ROWS], tl.float32)
    for first in range(0, blocks, BLOCKS):
        _, _, offset, mask = _merge_tile(rows, blocks, 3, first, BLOCKS, ROWS, INT64)
        part = part_ptr + offset
        shift = tl.maximum((tl.load(part, mask, _LOWEST) - top[None, :]) * scale, -1e30)  # finite
        factor = tl.exp2(shift)
        sums = tl.load(part + rows, mask, 0.0)
        total += tl.sum(factor * sums, 0)
        energy += tl.sum(factor * (tl.load(part + 2 * rows, mask, 0.0) + shift * sums), 0)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(stats_ptr + r, top, r < rows)
    tl.store(stats_ptr + rows + r, total, r < rows)
    tl.store(entropy_ptr + r, (tl.log2(total) - energy / total) / _LOG2E, r < rows)


@triton.jit(do_not_specialize=["rows", "teacher_rows", "blocks"])
def merge_student_kernel(
    part_ptr,  # [blocks, 2 + G, R]
    teacher_part_ptr,  # [blocks, 3, T]
    match_ptr,  # [R, G]
    row_weight_ptr,  # [R]
    student_temp_ptr,  # []
    teacher_temp_ptr,  # []
    teacher_stats_ptr,  # [2, T]
    entropy_ptr,  # [T]
    stats_ptr,  # [2, R]: max, sum
    loss_ptr,  # [2, R]: weighted loss and divergence of each row
    rows,
    teacher_rows,
    blocks,
    G: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    INT64: tl.constexpr,
):
    student_scale = _LOG2E / tl.load(student_temp_ptr)
    teacher_scale = _LOG2E / tl.load(teacher_temp_ptr)
    top = _merged_max(part_ptr, rows, blocks, 2 + G, BLOCKS, ROWS, INT64)
    total = tl.zeros([ROWS], tl.float32)
    cross = tl.zeros([ROWS], tl.float32)
    for first in range(0, blocks, BLOCKS):
        b, r, offset, mask = _merge_tile(rows, blocks, 2 + G, first, BLOCKS, ROWS, INT64)
        part = part_ptr + offset
        shift = tl.maximum((tl.load(part, mask, _LOWEST) - top[None, :]) * student_scale, -1e30)
        total += tl.sum(tl.exp2(shift) * tl.load(part + rows, mask, 0.0), 0)
        for g in tl.static_range(G):
            t, valid = _target(match_ptr, r, g, rows, teacher_rows, G, INT64)
            t_top = tl.load(teacher_stats_ptr + t, valid, 0.0)
            t_total = tl.load(teacher_stats_ptr + teacher_rows + t, valid, 1.0)
            t_part = teacher_part_ptr + (b * 3)[:, None] * teacher_rows + t[None, :]
            t_mask = mask & valid[None, :]
            t_shift = (tl.load(t_part, t_mask, _LOWEST) - t_top[None, :]) * teacher_scale
            factor = tl.exp2(tl.maximum(t_shift, -1e30)) / t_total[None, :]
            moved = tl.load(part + (2 + g) * rows, t_mask, 0.0)
            moved += shift * tl.load(t_part + teacher_rows, t_mask, 0.0)
            cross += tl.sum(tl.where(factor == 0, 0.0, factor * moved), 0)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.zeros([ROWS], tl.float32)
    entropy = tl.zeros([ROWS], tl.float32)
    for g in tl.static_range(G):
        t, valid = _target(match_ptr, r, g, rows, teacher_rows, G, True)
        n += tl.where(valid, 1.0, 0.0)
        entropy += tl.load(entropy_ptr + t, valid, 0.0)
        entropy = tl.where(t < teacher_rows, entropy, float("nan"))  # there is no such row
    loss = tl.where(n > 0, (n * tl.log2(total) - cross) / _LOG2E, 0.0)
    loss = tl.where(entropy == entropy, loss, float("nan"))
    weight = tl.load(row_weight_ptr + r, r < rows, 0.0)
    tl.store(stats_ptr + r, top, r < rows)
    tl.store(stats_ptr + rows + r, total, r < rows)
    tl.store(loss_ptr + r, weight * loss, r < rows)
    tl.store(loss_ptr + rows + r, weight * (loss - entropy), r < rows)


@triton.jit(do_not_specialize=["rows", "teacher_rows", "first_block", "stride_blocks"])
def gradient_kernel(
    student_ptr,  # [R, stride_blocks * BLOCK], a chunk: logits, overwritten by their gradients
    teacher_ptr,  # [T, stride_blocks * BLOCK]
    center_ptr,  # [K] fp32
    match_ptr,  # [R, G] int64
    factor_ptr,  # [R] fp32, of each row's gradient
    student_temp_ptr,  # []
    teacher_temp_ptr,  # []
    stats_ptr,  # [2, R]
    teacher_stats_ptr,  # [2, T]
    rows,
    teacher_rows,
    first_block,
    stride_blocks,
    K: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    r, cols, mask, center = _tile(center_ptr, rows, first_block, K, ROWS, BLOCK, INT64)
    stride = stride_blocks * BLOCK
    teacher_scale = _LOG2E / tl.load(teacher_temp_ptr)
    n = tl.zeros([ROWS], tl.float32)
    target = tl.zeros([ROWS, BLOCK], tl.float32)
    for g in tl.static_range(G):
        t_row, valid = _target(match_ptr, r, g, rows, teacher_rows, G, INT64)
        t_top = tl.load(teacher_stats_ptr + t_row, valid, 0.0)
        t_share = 1.0 / tl.load(teacher_stats_ptr + teacher_rows + t_row, valid, 1.0)
        t_ptr = teacher_ptr + t_row[:, None] * stride + cols[None, :]
        t = tl.load(t_ptr, mask & valid[:, None], -float("inf")).to(tl.float32)
        target += tl.exp2((t - center - t_top[:, None]) * teacher_scale) * t_share[:, None]
        n += tl.where(valid, 1.0, 0.0)
    x_ptr = student_ptr + r[:, None] * stride + cols[None, :]
    top = tl.load(stats_ptr + r, r < rows, 0.0)
    share = n / tl.load(stats_ptr + rows + r, r < rows, 1.0)
    y = (tl.load(x_ptr, mask, 0.0).to(tl.float32) - top[:, None]) * (_LOG2E / tl.load(student_temp_ptr))
    dx = (tl.exp2(y) * share[:, None] - target) * tl.load(factor_ptr + r, r < rows, 0.0)[:, None]
    dx = tl.where((n > 0)[:, None], dx, 0.0)
    tl.store(x_ptr, dx.to(student_ptr.dtype.element_ty), mask)


@triton.jit
def center_kernel(
    weight_ptr,  # [K, D]
    mean_ptr,  # [D] fp32, mean of the teacher's rows
    out_ptr,  # [K] fp32
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INT64: tl.constexpr,
):
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = k.to(tl.int64) if INT64 else k
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, D, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        mask = (k < K)[:, None]
        if D % COLUMNS != 0:
            mask = mask & (d < D)[None, :]
        w = tl.load(weight_ptr + row[:, None] * D + d[None, :], mask, 0.0).to(tl.float32)
        acc += w * tl.load(mean_ptr + d, d < D, 0.0)[None, :]
    tl.store(out_ptr + k, tl.sum(acc, 1), k < K)


def center_columns(d: int) -> int:
    return min(256, triton.next_power_of_2(d))


def _launch(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    logits: str,
    problem: str,
    cost: tuple[int, int],
    gpus: tuple[int, ...] = (70, 80, 90),
) -> Launch:
    """``cost``: programs and bytes. Pointers are fp32 but for ``logits``, prototypes and match."""
    names = [n for n in kernel.arg_names if n not in constants]
    types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names}
    other = dict.fromkeys(("logits_ptr", "student_ptr", "teacher_ptr", "weight_ptr"), f"*{logits}")
    types.update({n: t for n, t in {**other, "match_ptr": "*i64"}.items() if n in types})
    return Launch(
        f"matched_loss_{name}", kernel, types, constants, WARPS, 3, problem, *cost, capabilities=gpus
    )


def launches() -> list[Launch]:
    """EsViT, Swin-T: 32 images, regions 2 x 49 + 8 x 9, K = 65536, D = 256."""
    images, k, d, targets = 32, 65536, 256, 2
    rows, teacher_rows, blocks = images * 170, images * 98, k // BLOCK
    tile = dict(K=k, ROWS=ROWS, BLOCK=BLOCK, INT64=False)
    merge = dict(BLOCKS=MERGE_BLOCKS, ROWS=MERGE_ROWS, INT64=False)
    center = dict(K=k, D=d, ROWS=CENTER_ROWS, COLUMNS=center_columns(d), INT64=False)
    found = []
    for dtype, size, gpus in (("fp32", 4, (70, 80, 90)), ("fp16", 2, (70, 80, 90)), ("bf16", 2, (80, 90))):
        columns = next(column_chunks(k, (rows + teacher_rows) * size)).stop
        problem = f"{rows} student rows, {teacher_rows} teacher rows, {columns} of {k} columns, {dtype}"
        for part, kernel, n, elements in (
            ("teacher", teacher_kernel, teacher_rows, teacher_rows),
            ("student", student_kernel, rows, rows + teacher_rows),
            ("gradient", gradient_kernel, rows, 2 * rows + teacher_rows),
        ):
            constants = tile if part == "teacher" else dict(tile, G=targets)
            cost = (n // ROWS * (columns // BLOCK), elements * columns * size)
            found.append(_launch(f"{part}_{dtype}", kernel, constants, dtype, problem, cost, gpus))
        problem, cost = f"{k} x {d} prototypes, {dtype}", (k // CENTER_ROWS, k * d * size)
        found.append(_launch(f"center_{dtype}", center_kernel, center, dtype, problem, cost, gpus))
    problem, cost = (
        f"{teacher_rows} rows of {blocks} records",
        (teacher_rows // MERGE_ROWS, blocks * teacher_rows * 12),
    )
    found.append(_launch("merge_teacher", merge_teacher_kernel, merge, "fp32", problem, cost))
    cost = (rows // MERGE_ROWS, blocks * (rows * (2 + targets) + teacher_rows * 2) * 4)
    merge, problem = dict(merge, G=targets), f"{rows} rows of {blocks} records"
    found.append(_launch("merge_student", merge_student_kernel, merge, "fp32", problem, cost))
    return found
