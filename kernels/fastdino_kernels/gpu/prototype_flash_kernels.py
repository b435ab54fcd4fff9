"""Kernels of prototype_flash.py: rows attend to the prototypes, merges of their parts, weight gradient.

A matrix with D columns is held as a tuple of tiles of BLOCK_D columns: D need not be a power of two, and
accumulators no wider than high keep a warp's rows together on sm_80. Every ``tl.dot`` has the program's own
rows as its left operand and the streamed tile, as it is or transposed, as its right one: it is loaded once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(
    ptr,
    rows,
    limit,
    part,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    INT64: tl.constexpr,
):
    """Some ``rows`` and columns of a matrix [limit, D], zero outside; EVEN: all rows are inside."""
    cols = part * BLOCK_D + tl.arange(0, BLOCK_D)
    wide = rows.to(tl.int64) if INT64 else rows
    ptrs = ptr + (wide[:, None] * D + cols[None, :])
    if D % BLOCK_D == 0 and EVEN:
        x = tl.load(ptrs)
    elif D % BLOCK_D == 0:
        x = tl.load(ptrs, mask=(rows < limit)[:, None], other=0.0)
    else:
        x = tl.load(ptrs, mask=(rows < limit)[:, None] & (cols < D)[None, :], other=0.0)
    return x


@triton.jit
def _tiles(ptr, rows, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr):
    tiles = ()
    for part in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        tiles += (_tile(ptr, rows, limit, part, D, BLOCK_D, EVEN, INT64),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _zeros(M: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros([M, N], tl.float32),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _vector(ptr, offs, limit, other, EVEN: tl.constexpr):
    if EVEN:
        x = tl.load(ptr + offs)
    else:
        x = tl.load(ptr + offs, mask=offs < limit, other=other)
    return x


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """WIDEN is for Triton's interpreter, which would multiply the bits of bf16 numbers as integers."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _narrow(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """``x`` in the operands' dtype; to bf16 the interpreter would cut bits off instead of rounding."""
    if WIDEN:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def _logits(a, b, M: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr, WIDEN: tl.constexpr):
    """``a b^T`` [M, N]."""
    x = tl.zeros([M, N], tl.float32)
    for i in tl.static_range(COUNT):
        x = _dot(a[i], tl.trans(b[i]), x, WIDEN)
    return x


@triton.jit(do_not_specialize=["rows", "blocks_per_split"])
def attend_kernel(
    q_ptr,  # [R, D]
    key_ptr,  # [K, D]
    value_ptr,  # [K, D], read for the teacher only: the student's values are its keys
    center_ptr,  # [K] fp32, for the teacher
    temp_ptr,  # [] fp32
    o_ptr,  # [splits, R, D] fp32: sum_k p_k value_k
    stats_ptr,  # [splits, 3, R] fp32: m, sum_k p_k; for the teacher sum_k p_k log2 p_k
    sum_ptr,  # [row blocks, K] fp32, for the teacher: sums of the raw logits over a block's rows
    rows,
    K,
    blocks_per_split,
    D: tl.constexpr,
    TEACHER: tl.constexpr,
    NEEDS_O: tl.constexpr,
    HEADROOM: tl.constexpr,
    LOG2E: tl.constexpr,
    EVEN: tl.constexpr,
    INT64: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some rows against some prototypes; p_k = 2^(x_k - m) of the sharpened logits x in base 2.

    p grows to 2^HEADROOM, so that small ones survive the rounding to fp16.
    """
    COUNT: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row_block = tl.program_id(0)
    split = tl.program_id(1)
    offs_r = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    q = _tiles(q_ptr, offs_r, rows, D, BLOCK_D, False, INT64)
    scale = LOG2E / tl.load(temp_ptr)
    m = tl.full([BLOCK_R], -1e38, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    moment = tl.zeros([BLOCK_R], tl.float32)
    o = _zeros(BLOCK_R, BLOCK_D, COUNT)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    for block in tl.range(first, last, num_stages=STAGES):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        keys = _tiles(key_ptr, offs_k, K, D, BLOCK_D, EVEN, INT64)
        x = _logits(q, keys, BLOCK_R, BLOCK_K, COUNT, WIDEN)
        if TEACHER:
            tl.store(sum_ptr + row_block * K + offs_k, tl.sum(x, 0), mask=offs_k < K)
            x -= _vector(center_ptr, offs_k, K, 0.0, EVEN)[None, :]
        if not EVEN:
            x = tl.where((offs_k < K)[None, :], x, -float("inf"))
        m_new = tl.maximum(m, tl.max(x, 1) * scale - HEADROOM)
        alpha = tl.exp2(m - m_new)
        x = x * scale - m_new[:, None]
        p = tl.exp2(x)
        if TEACHER:
            moment = alpha * (moment + total * (m - m_new)) + tl.sum(tl.where(p > 0, p * x, p), 1)
        total = alpha * total + tl.sum(p, 1)
        if NEEDS_O:
            if TEACHER:
                values = _tiles(value_ptr, offs_k, K, D, BLOCK_D, EVEN, INT64)
            else:
                values = keys
            p = _narrow(p, q_ptr.dtype.element_ty, WIDEN)
            moved = ()
            for i in tl.static_range(COUNT):
                moved += (_dot(p, values[i], o[i] * alpha[:, None], WIDEN),)  # type: ignore[assignment]
            o = moved
        m = m_new
    mask = offs_r < rows
    stats = stats_ptr + split * 3 * rows + offs_r
    tl.store(stats, m, mask=mask)
    tl.store(stats + rows, total, mask=mask)
    if TEACHER:
        tl.store(stats + 2 * rows, moment, mask=mask)
    if NEEDS_O:
        at = split * rows + offs_r
        at = at.to(tl.int64) if INT64 else at
        for i in tl.static_range(COUNT):
            cols = i * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = mask[:, None] & (cols < D)[None, :]
            tl.store(o_ptr + (at[:, None] * D + cols[None, :]), o[i], mask=inside)


@triton.jit
def _merged_o(
    o_ptr,
    stats_ptr,
    row,
    rows,
    splits,
    m,
    cols,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
):
    """``sum_k p_k value_k`` of a row over all splits, relative to the row's ``m``."""
    o = tl.zeros_like(cols).to(tl.float32)
    for begin in range(0, splits, PARTS):
        offs = begin + tl.arange(0, PARTS)
        mask = offs < splits
        alpha = tl.exp2(tl.load(stats_ptr + offs * 3 * rows + row, mask=mask, other=-1e38) - m)
        at = offs * rows + row
        at = at.to(tl.int64) if INT64 else at
        inside = mask[:, None] & (cols < D)[None, :]
        part = tl.load(o_ptr + (at[:, None] * D + cols[None, :]), mask=inside, other=0.0)
        o += tl.sum(part * alpha[:, None], 0)
    return o


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_teacher_kernel(
    o_ptr,  # [splits, G*B, D]
    stats_ptr,  # [splits, 3, G*B]
    u_ptr,  # [G*B, D] fp32
    lse_ptr,  # [G*B] fp32: log2 of the sum of exponentials, less GAIN
    entropy_ptr,  # [G*B] fp32, nats
    rows,
    splits,
    D: tl.constexpr,
    GAIN: tl.constexpr,
    LN2: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0)
    offs = tl.arange(0, MAX_SPLITS)
    mask = offs < splits
    stats = stats_ptr + offs * 3 * rows + row
    parts = tl.load(stats, mask=mask, other=-1e38)
    totals = tl.load(stats + rows, mask=mask, other=0.0)
    moments = tl.load(stats + 2 * rows, mask=mask, other=0.0)
    m = tl.max(parts, 0)
    alpha = tl.exp2(parts - m)
    total = tl.sum(alpha * totals, 0)
    moment = tl.sum(alpha * (moments + totals * (parts - m)), 0)
    tl.store(lse_ptr + row, m + tl.log2(total) - GAIN)
    tl.store(entropy_ptr + row, LN2 * (tl.log2(total) - moment / total))
    cols = tl.arange(0, BLOCK_D)
    u = _merged_o(o_ptr, stats_ptr, row, rows, splits, m, cols, D, PARTS, INT64) / total
    tl.store(u_ptr + row * D + cols, u, mask=cols < D)


@triton.jit(do_not_specialize=["rows", "splits", "images", "weight"])
def merge_student_kernel(
    o_ptr,  # [splits, V*B, D]
    stats_ptr,  # [splits, 3, V*B]
    u_ptr,  # [G*B, D] fp32
    z_ptr,  # [V*B, D]
    temp_ptr,  # [] fp32
    lse_ptr,  # [V*B] fp32: log2 of the sum of exponentials, less GAIN + log2 n
    loss_ptr,  # [V*B] fp32
    dz_ptr,  # [V*B, D] fp32
    rows,
    splits,
    images,
    weight,
    D: tl.constexpr,
    G: tl.constexpr,
    NEEDS_O: tl.constexpr,
    GAIN: tl.constexpr,
    LN2: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0)
    view = row // images
    image = row % images
    n = tl.where(view < G, G - 1.0, 1.0 * G)
    offs = tl.arange(0, MAX_SPLITS)
    mask = offs < splits
    stats = stats_ptr + offs * 3 * rows + row
    parts = tl.load(stats, mask=mask, other=-1e38)
    m = tl.max(parts, 0)
    total = tl.sum(tl.exp2(parts - m) * tl.load(stats + rows, mask=mask, other=0.0), 0)
    lse = m + tl.log2(total)
    # without a partner, n = 0: the backward's 2^(x - inf) leaves the row out
    tl.store(lse_ptr + row, tl.where(n > 0, lse - tl.log2(tl.maximum(n, 1.0)) - GAIN, float("inf")))
    cols = tl.arange(0, BLOCK_D)
    target = tl.zeros([BLOCK_D], tl.float32)  # (M U)_r
    for g in tl.static_range(G):
        at = u_ptr + (g * images + image) * D + cols
        target += tl.load(at, mask=(cols < D) & (g != view), other=0.0)
    start = row.to(tl.int64) * D if INT64 else row * D
    z = tl.load(z_ptr + start + cols, mask=cols < D, other=0.0).to(tl.float32)
    temp = tl.load(temp_ptr)
    tl.store(loss_ptr + row, weight * (n * (lse * LN2) - tl.sum(z * target, 0) / temp))
    if NEEDS_O:
        o = _merged_o(o_ptr, stats_ptr, row, rows, splits, m, cols, D, PARTS, INT64) / total
        tl.store(dz_ptr + start + cols, (weight / temp) * (n * o - target), mask=cols < D)


@triton.jit(do_not_specialize=["images", "views", "weight"])
def weight_grad_kernel(
    z_ptr,  # [V*B, D]
    weight_ptr,  # [K, D]
    y_ptr,  # [G*B, D]
    teacher_weight_ptr,  # [K, D]
    center_ptr,  # [K] fp32
    student_lse_ptr,  # [V*B] fp32, as merge_student_kernel leaves it
    teacher_lse_ptr,  # [G*B] fp32
    student_temp_ptr,  # [] fp32
    teacher_temp_ptr,  # [] fp32
    grad_ptr,  # [] fp32
    out_ptr,  # [K, D]
    images,
    K,
    views,
    weight,  # 2^-GAIN times that of a pair
    D: tl.constexpr,
    G: tl.constexpr,
    LOG2E: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_B: tl.constexpr,
    INT64: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some rows of dW. The logits' gradient appears as [BLOCK_K, BLOCK_B], for one view of some images.

    The teacher's tiles stay in registers for all views; W', which only they need, is streamed by columns.
    """
    COUNT: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    temp = tl.load(student_temp_ptr)
    scale = LOG2E / temp
    teacher_scale = LOG2E / tl.load(teacher_temp_ptr)
    center = _vector(center_ptr, offs_k, K, 0.0, EVEN_K)
    w = _tiles(weight_ptr, offs_k, K, D, BLOCK_D, EVEN_K, INT64)
    dw = _zeros(BLOCK_K, BLOCK_D, COUNT)
    for b in tl.range(0, images, BLOCK_B, num_stages=1):
        offs_b = b + tl.arange(0, BLOCK_B)
        logits = _zeros(BLOCK_K, BLOCK_B, G)
        for part in tl.range(0, (D + BLOCK_T - 1) // BLOCK_T, num_stages=STAGES):
            v = _tile(teacher_weight_ptr, offs_k, K, part, D, BLOCK_T, EVEN_K, INT64)
            longer = ()
            for g in tl.static_range(G):
                rows = g * images + offs_b
                y = _tile(y_ptr, rows, (g + 1) * images, part, D, BLOCK_T, EVEN_B, INT64)
                longer += (_dot(v, tl.trans(y), logits[g], WIDEN),)  # type: ignore[assignment]
            logits = longer
        p = ()
        for g in tl.static_range(G):
            # rows outside have probability 2^-inf
            lse = _vector(teacher_lse_ptr, g * images + offs_b, (g + 1) * images, float("inf"), EVEN_B)
            p += (tl.exp2((logits[g] - center[:, None]) * teacher_scale - lse[None, :]),)  # type: ignore[assignment]
        for view in tl.range(0, views, num_stages=STAGES):
            rows = view * images + offs_b
            lse = _vector(student_lse_ptr, rows, (view + 1) * images, float("inf"), EVEN_B)
            z = _tiles(z_ptr, rows, (view + 1) * images, D, BLOCK_D, EVEN_B, INT64)
            dx = tl.exp2(_logits(w, z, BLOCK_K, BLOCK_B, COUNT, WIDEN) * scale - lse[None, :])
            for g in tl.static_range(G):
                dx -= tl.where(view == g, 0.0, 1.0) * p[g]
            dx = _narrow(dx, z_ptr.dtype.element_ty, WIDEN)
            moved = ()
            for i in tl.static_range(COUNT):
                moved += (_dot(dx, z[i], dw[i], WIDEN),)  # type: ignore[assignment]
            dw = moved
    factor = weight * tl.load(grad_ptr) / temp
    at = offs_k.to(tl.int64) if INT64 else offs_k
    for i in tl.static_range(COUNT):
        cols = i * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (offs_k < K)[:, None] & (cols < D)[None, :]
        value = _narrow(dw[i] * factor, out_ptr.dtype.element_ty, WIDEN).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (at[:, None] * D + cols[None, :]), value, mask=inside)
