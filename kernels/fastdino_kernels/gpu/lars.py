"""LARS in Triton: sums of g.g, g.p and p.p by chunks; one program per tensor that turns them into
coefficients, trust ratio and clipping included; one pass that writes. 8 + 20 bytes per parameter, 8 + 28 with
a teacher; without eta the sums need g.g alone, 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..optimizer import Common, Row
from . import multi_tensor
from .ema import sums_of_squares
from .launch import Launch, on_device_of
from .multi_tensor import (
    BLOCK,
    CHUNK,
    PER_STEP,
    WARPS,
    Layout,
    Step,
    chunk_of,
    clip,
    follow,
    given_squares,
    pointer,
    total_of,
    whole_blocks,
)

COEFFICIENTS = 7  # per tensor, fp32: active, factors of g and p, momentum, lr, the teacher's two
PER_GROUP = 4  # lr, weight decay, momentum, eta


@triton.jit
def _products(x_at, y_at, xx, xy, yy, valid, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(pointer(x_at, tl.float32, ALIGNED) + offs, mask=valid, other=0.0).to(tl.float64)
    y = tl.load(pointer(y_at, tl.float32, ALIGNED) + offs, mask=valid, other=0.0).to(tl.float64)
    return xx + x * x, xy + x * y, yy + y * y


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _lars_sums_kernel(
    layout,
    table,  # int64 [8, n]: group, whether decayed, then addresses of p, b, teacher, copies, step (none)
    grads,
    partial,  # fp64 [3, n_chunks]: g.g, g.p, p.p
    found,
    n,
    n_chunks,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    tensor, start, count = chunk_of(layout, i, n, n_chunks, CHUNK)
    g = tl.load(grads + tensor)
    count = tl.where(g == 0, 0, count)
    g += start * 4
    p = tl.load(table + 2 * n + tensor) + start * 4
    whole = whole_blocks(g | p, count, BLOCK)
    every = tl.full([BLOCK], 1, tl.int1)
    gg, gp, pp = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for k in range(0, whole, BLOCK):
        gg, gp, pp = _products(g + k * 4, p + k * 4, gg, gp, pp, every, BLOCK, True)
    for k in range(whole, count, BLOCK):
        gg, gp, pp = _products(
            g + k * 4, p + k * 4, gg, gp, pp, tl.arange(0, BLOCK) < count - k, BLOCK, False
        )
    total = tl.sum(gg)
    tl.store(partial + i, total)
    tl.store(partial + n_chunks + i, tl.sum(gp))
    tl.store(partial + 2 * n_chunks + i, tl.sum(pp))
    tl.store(found, 1.0, mask=(total < float("inf")) == 0)


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _lars_coefficients_kernel(
    layout,  # of the partial sums
    table,
    numbers,  # fp64: PER_STEP, then PER_GROUP for each group
    partial,
    norms,
    coefficients,  # fp32 [n, COEFFICIENTS]
    flags,  # uint8 [2]: found, frozen
    n,
    n_chunks,
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
    gg = total_of(layout, partial, tensor, n, BLOCK)
    gp = total_of(layout, partial + n_chunks, tensor, n, BLOCK)
    pp = total_of(layout, partial + 2 * n_chunks, tensor, n, BLOCK)
    scale = tl.load(numbers + 3)
    norm = tl.sqrt(gg) / scale
    tl.store(norms + tensor, norm.to(tl.float32))

    group = numbers + PER_STEP + PER_GROUP * tl.load(table + tensor)
    decayed = tl.load(table + n + tensor) != 0
    c = clip(norm, tl.load(numbers + 4)) / scale
    decay = tl.where(decayed, tl.load(group + 1), 0.0)
    square = c * c * gg + 2.0 * c * decay * gp + decay * decay * pp
    ratio = tl.load(group + 3) * tl.sqrt(pp / tl.where(square > 0.0, square, 1.0))
    sound = decayed & (square > 0.0) & (ratio > 0.0) & (ratio < float("inf"))
    ratio = tl.where(sound, ratio, 1.0)
    row = coefficients + COEFFICIENTS * tensor
    tl.store(row, tl.where(frozen, 0.0, 1.0))
    tl.store(row + 1, (ratio * c).to(tl.float32))
    tl.store(row + 2, (ratio * decay).to(tl.float32))
    tl.store(row + 3, tl.load(group + 2).to(tl.float32))
    tl.store(row + 4, tl.load(group).to(tl.float32))
    momentum = tl.load(numbers + 2)
    tl.store(row + 5, momentum.to(tl.float32))
    tl.store(row + 6, (1.0 - momentum).to(tl.float32))


@triton.jit
def _lars_block(
    p_at, g_at, b_at, t_at, copy_at, t_copy_at, has, c, valid,
    COPY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    trained, taught, copied, t_copied = has
    of_grad, of_param, momentum, lr, keep, rest = c
    offs = tl.arange(0, BLOCK)
    b_ptr = pointer(b_at, tl.float32, ALIGNED) + offs
    old = tl.load(pointer(p_at, tl.float32, ALIGNED) + offs, mask=valid, other=0.0)
    g = tl.load(pointer(g_at, tl.float32, ALIGNED) + offs, mask=valid & trained, other=0.0)
    b = tl.load(b_ptr, mask=valid & trained, other=0.0)
    t = tl.load(pointer(t_at, tl.float32, ALIGNED) + offs, mask=valid & taught, other=0.0)
    b = momentum * b + (of_grad * g + of_param * old)
    tl.store(b_ptr, b, mask=valid & trained)
    p = tl.where(trained, old - lr * b, old)
    follow(p_at, p, t_at, t, copy_at, t_copy_at, has, keep, rest, valid, COPY, BLOCK, ALIGNED)


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _lars_kernel(
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
    i = n_chunks - 1 - tl.program_id(0)
    tensor, start, count = chunk_of(layout, i, n, n_chunks, CHUNK)
    row = coefficients + COEFFICIENTS * tensor
    count = tl.where(tl.load(row) == 0.0, 0, count)
    c = (
        tl.load(row + 1), tl.load(row + 2), tl.load(row + 3),
        tl.load(row + 4), tl.load(row + 5), tl.load(row + 6),
    )  # fmt: skip
    p, b = tl.load(table + 2 * n + tensor), tl.load(table + 3 * n + tensor)
    t, copy = tl.load(table + 4 * n + tensor), tl.load(table + 5 * n + tensor)
    t_copy, g = tl.load(table + 6 * n + tensor), tl.load(grads + tensor)
    has = (g != 0, t != 0, copy != 0, t_copy != 0)
    p, g, b, t = p + start * 4, g + start * 4, b + start * 4, t + start * 4
    copy, t_copy = copy + start * 2, t_copy + start * 2
    whole = whole_blocks(p | g | b | t | copy | t_copy, count, BLOCK)
    every = tl.full([BLOCK], 1, tl.int1)
    for k in range(0, whole, BLOCK):
        _lars_block(
            p + k * 4, g + k * 4, b + k * 4, t + k * 4, copy + k * 2, t_copy + k * 2,
            has, c, every, COPY, BLOCK, True,
        )  # fmt: skip
    for k in range(whole, count, BLOCK):
        _lars_block(
            p + k * 4, g + k * 4, b + k * 4, t + k * 4, copy + k * 2, t_copy + k * 2,
            has, c, tl.arange(0, BLOCK) < count - k, COPY, BLOCK, False,
        )  # fmt: skip


def lars(rows: Sequence[Row], common: Common, max_norm: float) -> tuple[Tensor, Tensor]:
    """A step on plain rows whose group has lr, weight_decay, momentum and eta.

    Returns norms fp32 [n] and flags bool [2]: a gradient was not finite, nothing was changed."""
    decayed = [int(row.param.ndim != 1 or row.group.eta is None) for row in rows]
    step = Step.of(rows, common, max_norm, COEFFICIENTS, _numbers, [decayed], moments=1)
    layout = step.layout
    sizes = (layout.n, layout.n_chunks)
    with on_device_of(step.table):
        sums, partial = _sums(step, common, any(row.group.eta is not None for row in rows))
        _lars_coefficients_kernel[(layout.n,)](
            sums.table, step.table, step.numbers, partial, step.norms, step.coefficients,
            step.flags.view(torch.uint8), layout.n, sums.n_chunks,
            PER_STEP, PER_GROUP, COEFFICIENTS, BLOCK, num_warps=WARPS,
        )  # fmt: skip
        if layout.n_chunks:
            _lars_kernel[(layout.n_chunks,)](
                layout.table, step.table, step.grads, step.coefficients, *sizes,
                step.copy, COEFFICIENTS, CHUNK, BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return step.norms, step.flags


def _numbers(group: Any) -> list[float | Tensor]:
    """PER_GROUP numbers; an eta of 0 gives no trust ratio, which then is 1."""
    return [group.lr, group.weight_decay, group.momentum, group.eta or 0.0]


def _sums(step: Step, common: Common, scaled: bool) -> tuple[Layout, Tensor]:
    """Partial sums fp64 [3, chunks] and the layout of the chunks; only g.g unless ``scaled``, which excludes
    given norms."""
    layout = step.layout
    if not scaled:
        if common.norms is None:
            gg = sums_of_squares(layout, step.codes, step.grads, step.numbers)
        else:
            layout, gg = given_squares(step, common.norms)
        return layout, torch.cat([gg, gg.new_zeros(2 * len(gg))])
    partial = torch.empty(3 * layout.n_chunks, dtype=torch.float64, device=step.table.device)
    if layout.n_chunks:
        _lars_sums_kernel[(layout.n_chunks,)](
            layout.table, step.table, step.grads, partial, step.numbers, layout.n, layout.n_chunks,
            CHUNK, BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return layout, partial


def launches() -> list[Launch]:
    """ViT-S/16 with its head at K = 65536."""
    elements, n, n_chunks, problem = multi_tensor.MODEL
    table, sizes = dict(layout="*i64", table="*i64"), dict(n="i32", n_chunks="i32")
    blocks = dict(CHUNK=CHUNK, BLOCK=BLOCK)
    sums = {**table, "grads": "*i64", "partial": "*fp64", "found": "*fp64", **sizes}
    middle = dict(numbers="*fp64", partial="*fp64", norms="*fp32", coefficients="*fp32", flags="*u8", **sizes)
    numbers = dict(PER_STEP=PER_STEP, PER_GROUP=PER_GROUP, COEFFICIENTS=COEFFICIENTS, BLOCK=BLOCK)
    update = {**table, "grads": "*i64", "coefficients": "*fp32", **sizes}
    rows = [
        ("lars: sums", _lars_sums_kernel, sums, blocks, n_chunks, 8 * elements),
        ("lars: coefficients", _lars_coefficients_kernel, {**table, **middle}, numbers, n, 24 * n_chunks),
        (
            "lars",
            _lars_kernel,
            update,
            dict(COPY=0, COEFFICIENTS=COEFFICIENTS, **blocks),
            n_chunks,
            28 * elements,
        ),
    ]
    return [
        Launch(name, kernel, signature, constants, WARPS, 1, problem, grid, traffic)
        for name, kernel, signature, constants, grid, traffic in rows
    ]
