"""LAMB in Triton: squares of the gradients by chunks; coefficients; moments, with p.p and u.u by chunks;
trust ratios; parameters. 4 + 24 + 16 bytes per parameter, with a teacher 4 + 24 + 24.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..optimizer import Common, Row
from . import multi_tensor
from .adamw_ema import PER_GROUP, adam_numbers
from .ema import sums_of_squares
from .launch import Launch, on_device_of
from .multi_tensor import (
    BLOCK,
    CHUNK,
    PER_STEP,
    WARPS,
    Step,
    chunk_of,
    clip,
    correction,
    follow,
    pointer,
    total_of,
    whole_blocks,
)

COEFFICIENTS = 12  # per tensor, fp32: the last lines of _lamb_coefficients_kernel


@triton.jit(do_not_specialize=["n"])
def _lamb_norms_kernel(layout, numbers, partial, norms, clipped, n, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    norm = tl.sqrt(total_of(layout, partial, tensor, n, BLOCK)) / tl.load(numbers + 3)
    tl.store(norms + tensor, norm.to(tl.float32))
    tl.store(clipped + tensor, clip(norm, tl.load(numbers + 4)) * norm)


@triton.jit(do_not_specialize=["n", "n_others"])
def _lamb_coefficients_kernel(
    table,  # int64 [9, n]: group, whether adapted, then addresses of p, m, v, teacher, copies, step
    grads,
    numbers,  # fp64: PER_STEP, then PER_GROUP for each group
    norms,  # fp32 [n]
    clipped,  # fp64 [n]: norms after the clipping of each tensor
    others,  # fp64 [n_others]: the same of gradients outside of the table
    max_norm,  # of all gradients together, 0: no clipping
    coefficients,  # fp32 [n, COEFFICIENTS]
    flags,  # uint8 [2]: found, frozen
    n,
    n_others,
    PER_STEP: tl.constexpr,
    PER_GROUP: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0)
    found = tl.load(numbers) != 0.0
    frozen = found | (tl.load(numbers + 1) != 0.0)
    tl.store(flags, found.to(tl.uint8), mask=tensor == 0)
    tl.store(flags + 1, frozen.to(tl.uint8), mask=tensor == 0)
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for i in range(0, n, BLOCK):
        x = tl.load(clipped + i + offs, mask=i + offs < n, other=0.0)
        squares += x * x
    for i in range(0, n_others, BLOCK):
        x = tl.load(others + i + offs, mask=i + offs < n_others, other=0.0)
        squares += x * x
    every = tl.sqrt(tl.sum(squares))
    limit = tl.load(max_norm)
    together = tl.where((limit > 0.0) & (every > limit), limit / every, 1.0)

    group = numbers + PER_STEP + PER_GROUP * tl.load(table + tensor)
    beta1, beta2 = tl.load(group + 2), tl.load(group + 3)
    trained = tl.load(grads + tensor) != 0
    step_ptr = tl.load(table + 8 * n + tensor).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=trained, other=0.0) + 1.0
    tl.store(step_ptr, step, mask=trained & (frozen == 0))
    momentum = tl.load(numbers + 2)
    factor = clip(tl.load(norms + tensor).to(tl.float64), tl.load(numbers + 4)) * together
    row = coefficients + COEFFICIENTS * tensor
    tl.store(row, tl.where(frozen, 0.0, 1.0))
    tl.store(row + 1, (factor / tl.load(numbers + 3)).to(tl.float32))
    tl.store(row + 2, (1.0 - beta1).to(tl.float32))
    tl.store(row + 3, beta2.to(tl.float32))
    tl.store(row + 4, (1.0 - beta2).to(tl.float32))
    tl.store(row + 5, (1.0 / correction(step, tl.load(group + 5))).to(tl.float32))
    tl.store(row + 6, (1.0 / tl.sqrt(correction(step, tl.load(group + 6)))).to(tl.float32))
    tl.store(row + 7, tl.load(group + 4).to(tl.float32))
    tl.store(row + 8, tl.load(group + 1).to(tl.float32))
    tl.store(row + 9, tl.load(group).to(tl.float32))
    tl.store(row + 10, momentum.to(tl.float32))
    tl.store(row + 11, (1.0 - momentum).to(tl.float32))


@triton.jit
def _lamb_update(p, m, v, inv_correction1, inv_sqrt_correction2, eps, decay):
    return m * inv_correction1 / (tl.sqrt(v) * inv_sqrt_correction2 + eps) + decay * p


@triton.jit
def _lamb_moments_block(p_at, g_at, m_at, v_at, c, pp, uu, valid, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    factor, beta1_rest, beta2, beta2_rest, inv_correction1, inv_sqrt_correction2, eps, decay = c
    offs = tl.arange(0, BLOCK)
    m_ptr, v_ptr = pointer(m_at, tl.float32, ALIGNED) + offs, pointer(v_at, tl.float32, ALIGNED) + offs
    p = tl.load(pointer(p_at, tl.float32, ALIGNED) + offs, mask=valid, other=0.0)
    g = factor * tl.load(pointer(g_at, tl.float32, ALIGNED) + offs, mask=valid, other=0.0)
    m, v = tl.load(m_ptr, mask=valid, other=0.0), tl.load(v_ptr, mask=valid, other=0.0)
    m += beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * (g * g)
    tl.store(m_ptr, m, mask=valid)
    tl.store(v_ptr, v, mask=valid)
    u = _lamb_update(p, m, v, inv_correction1, inv_sqrt_correction2, eps, decay).to(tl.float64)
    p = p.to(tl.float64)
    return pp + p * p, uu + tl.where(valid, u * u, 0.0)


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _lamb_moments_kernel(
    layout,
    table,
    grads,
    coefficients,
    partial,  # fp64 [2, n_chunks]: p.p, u.u
    n,
    n_chunks,
    COEFFICIENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = n_chunks - 1 - tl.program_id(0)
    tensor, start, count = chunk_of(layout, i, n, n_chunks, CHUNK)
    row = coefficients + COEFFICIENTS * tensor
    g = tl.load(grads + tensor)
    count = tl.where((tl.load(row) == 0.0) | (g == 0), 0, count)
    c = (
        tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4),
        tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 8),
    )  # fmt: skip
    g += start * 4
    p = tl.load(table + 2 * n + tensor) + start * 4
    m, v = tl.load(table + 3 * n + tensor) + start * 4, tl.load(table + 4 * n + tensor) + start * 4
    whole = whole_blocks(p | g | m | v, count, BLOCK)
    every = tl.full([BLOCK], 1, tl.int1)
    pp, uu = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for k in range(0, whole, BLOCK):
        pp, uu = _lamb_moments_block(
            p + k * 4, g + k * 4, m + k * 4, v + k * 4, c, pp, uu, every, BLOCK, True
        )
    for k in range(whole, count, BLOCK):
        valid = tl.arange(0, BLOCK) < count - k
        pp, uu = _lamb_moments_block(
            p + k * 4, g + k * 4, m + k * 4, v + k * 4, c, pp, uu, valid, BLOCK, False
        )
    tl.store(partial + i, tl.sum(pp))
    tl.store(partial + n_chunks + i, tl.sum(uu))


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _lamb_ratios_kernel(
    layout, table, partial, coefficients, n, n_chunks, COEFFICIENTS: tl.constexpr, BLOCK: tl.constexpr
):
    tensor = tl.program_id(0)
    pp = total_of(layout, partial, tensor, n, BLOCK)
    uu = total_of(layout, partial + n_chunks, tensor, n, BLOCK)
    adapted = (tl.load(table + n + tensor) != 0) & (pp > 0.0) & (uu > 0.0)
    ratio = tl.where(adapted, tl.sqrt(pp / tl.where(uu > 0.0, uu, 1.0)), 1.0)
    size = coefficients + COEFFICIENTS * tensor + 9
    tl.store(size, (tl.load(size) * ratio).to(tl.float32))


@triton.jit
def _lamb_block(
    p_at, m_at, v_at, t_at, copy_at, t_copy_at, has, c, valid,
    COPY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    trained, taught, copied, t_copied = has
    inv_correction1, inv_sqrt_correction2, eps, decay, step_size, keep, rest = c
    offs = tl.arange(0, BLOCK)
    old = tl.load(pointer(p_at, tl.float32, ALIGNED) + offs, mask=valid, other=0.0)
    m = tl.load(pointer(m_at, tl.float32, ALIGNED) + offs, mask=valid & trained, other=0.0)
    v = tl.load(pointer(v_at, tl.float32, ALIGNED) + offs, mask=valid & trained, other=0.0)
    t = tl.load(pointer(t_at, tl.float32, ALIGNED) + offs, mask=valid & taught, other=0.0)
    u = _lamb_update(old, m, v, inv_correction1, inv_sqrt_correction2, eps, decay)
    p = tl.where(trained, old - step_size * u, old)
    follow(p_at, p, t_at, t, copy_at, t_copy_at, has, keep, rest, valid, COPY, BLOCK, ALIGNED)


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _lamb_kernel(
    layout,
    table,
    grads,
    coefficients,
    n,
    n_chunks,
    COPY: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, count = chunk_of(layout, tl.program_id(0), n, n_chunks, CHUNK)
    row = coefficients + COEFFICIENTS * tensor
    count = tl.where(tl.load(row) == 0.0, 0, count)
    c = (
        tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 8),
        tl.load(row + 9), tl.load(row + 10), tl.load(row + 11),
    )  # fmt: skip
    p, m = tl.load(table + 2 * n + tensor), tl.load(table + 3 * n + tensor)
    v, t = tl.load(table + 4 * n + tensor), tl.load(table + 5 * n + tensor)
    copy, t_copy = tl.load(table + 6 * n + tensor), tl.load(table + 7 * n + tensor)
    has = (tl.load(grads + tensor) != 0, t != 0, copy != 0, t_copy != 0)
    p, m, v, t = p + start * 4, m + start * 4, v + start * 4, t + start * 4
    copy, t_copy = copy + start * 2, t_copy + start * 2
    whole = whole_blocks(p | m | v | t | copy | t_copy, count, BLOCK)
    every = tl.full([BLOCK], 1, tl.int1)
    for k in range(0, whole, BLOCK):
        _lamb_block(
            p + k * 4, m + k * 4, v + k * 4, t + k * 4, copy + k * 2, t_copy + k * 2,
            has, c, every, COPY, BLOCK, True,
        )  # fmt: skip
    for k in range(whole, count, BLOCK):
        _lamb_block(
            p + k * 4, m + k * 4, v + k * 4, t + k * 4, copy + k * 2, t_copy + k * 2,
            has, c, tl.arange(0, BLOCK) < count - k, COPY, BLOCK, False,
        )  # fmt: skip


def lamb(
    rows: Sequence[Row],
    common: Common,
    adapted: Sequence[bool],
    max_tensor_norm: float,
    max_grad_norm: float,
    others: Tensor,
) -> tuple[Tensor, Tensor]:
    """A step on plain rows whose group has lr, weight_decay, betas and eps; ``others`` fp64 [m] are norms of
    further gradients, clipped each by itself, that count for ``max_grad_norm``.

    Returns norms fp32 [n] and flags bool [2]: a gradient was not finite, nothing was changed."""
    step = Step.of(rows, common, max_tensor_norm, COEFFICIENTS, adam_numbers, [list(map(int, adapted))])
    layout, device = step.layout, step.table.device
    clipped = torch.empty(layout.n, dtype=torch.float64, device=device)
    limit = torch.full((), max_grad_norm, dtype=torch.float64, device=device)
    partial = torch.empty(2 * layout.n_chunks, dtype=torch.float64, device=device)
    sizes = (layout.n, layout.n_chunks)
    with on_device_of(step.table):
        squares = sums_of_squares(layout, step.codes, step.grads, step.numbers)
        _lamb_norms_kernel[(layout.n,)](
            layout.table, step.numbers, squares, step.norms, clipped, layout.n, BLOCK, num_warps=WARPS
        )
        _lamb_coefficients_kernel[(layout.n,)](
            step.table, step.grads, step.numbers, step.norms, clipped, others, limit, step.coefficients,
            step.flags.view(torch.uint8), layout.n, len(others), PER_STEP, PER_GROUP, COEFFICIENTS, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
        if layout.n_chunks:
            _lamb_moments_kernel[(layout.n_chunks,)](
                layout.table, step.table, step.grads, step.coefficients, partial, *sizes,
                COEFFICIENTS, CHUNK, BLOCK, num_warps=WARPS,
            )  # fmt: skip
        _lamb_ratios_kernel[(layout.n,)](
            layout.table, step.table, partial, step.coefficients, *sizes, COEFFICIENTS, BLOCK, num_warps=WARPS
        )
        if layout.n_chunks:
            _lamb_kernel[(layout.n_chunks,)](
                layout.table, step.table, step.grads, step.coefficients, *sizes,
                step.copy, COEFFICIENTS, CHUNK, BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return step.norms, step.flags


def launches() -> list[Launch]:
    """ViT-S/16 with its head at K = 65536."""
    elements, n, n_chunks, problem = multi_tensor.MODEL
    table, sizes = dict(layout="*i64", table="*i64"), dict(n="i32", n_chunks="i32")
    blocks = dict(COEFFICIENTS=COEFFICIENTS, CHUNK=CHUNK, BLOCK=BLOCK)
    norms = dict(layout="*i64", numbers="*fp64", partial="*fp64", norms="*fp32", clipped="*fp64", n="i32")
    middle = dict(
        table="*i64", grads="*i64", numbers="*fp64", norms="*fp32", clipped="*fp64", others="*fp64",
        max_norm="*fp64", coefficients="*fp32", flags="*u8", n="i32", n_others="i32",
    )  # fmt: skip
    numbers = dict(PER_STEP=PER_STEP, PER_GROUP=PER_GROUP, COEFFICIENTS=COEFFICIENTS, BLOCK=BLOCK)
    update = {**table, "grads": "*i64", "coefficients": "*fp32", **sizes}
    ratios = {**table, "partial": "*fp64", "coefficients": "*fp32", **sizes}
    short = dict(COEFFICIENTS=COEFFICIENTS, BLOCK=BLOCK)
    rows = [
        ("lamb: norms", _lamb_norms_kernel, norms, dict(BLOCK=BLOCK), n, 8 * n_chunks),
        ("lamb: coefficients", _lamb_coefficients_kernel, middle, numbers, n, 8 * n),
        (
            "lamb: moments",
            _lamb_moments_kernel,
            {**update, "partial": "*fp64"},
            blocks,
            n_chunks,
            24 * elements,
        ),
        ("lamb: ratios", _lamb_ratios_kernel, ratios, short, n, 16 * n_chunks),
        ("lamb", _lamb_kernel, update, dict(COPY=0, **blocks), n_chunks, 24 * elements),
    ]
    return [
        Launch(name, kernel, signature, constants, WARPS, 1, problem, grid, traffic)
        for name, kernel, signature, constants, grid, traffic in rows
    ]
