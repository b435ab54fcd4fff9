"""AdamW with clipping and the teacher's EMA in Triton: three launches whatever the number of tensors.

Sums of squares by chunks; one program per tensor that adds them up, clips, counts the step and writes the
tensor's coefficients; one pass that writes. Only gradients are read twice: 4 bytes per parameter beside the
36 of the pass, 38 or 40 with 16-bit copies. What depends on the data, skipping included, is decided on the
device.
"""

from __future__ import annotations

import math
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
    Step,
    chunk_of,
    clip,
    correction,
    follow,
    given_squares,
    pointer,
    total_of,
    whole_blocks,
)

COEFFICIENTS = 11  # per tensor, fp32: the last lines of _adamw_coefficients_kernel
PER_GROUP = 7  # lr, weight decay, beta1, beta2, eps, log2(beta1), log2(beta2)


@triton.jit(do_not_specialize=["n"])
def _adamw_coefficients_kernel(
    layout,  # of the partial sums
    table,  # int64 [8, n]: group, then addresses of p, m, v, teacher, copies of p and of the teacher, step
    grads,
    numbers,  # fp64: PER_STEP, then PER_GROUP for each group
    partial,
    norms,
    coefficients,  # fp32 [n, COEFFICIENTS]
    flags,  # uint8 [2]: found, frozen
    n,
    PER_STEP: tl.constexpr,
    PER_GROUP: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0)
    found = tl.load(numbers) != 0.0
    frozen = found | (tl.load(numbers + 1) != 0.0)
    momentum, scale = tl.load(numbers + 2), tl.load(numbers + 3)
    tl.store(flags, found.to(tl.uint8), mask=tensor == 0)
    tl.store(flags + 1, frozen.to(tl.uint8), mask=tensor == 0)
    norm = tl.sqrt(total_of(layout, partial, tensor, n, BLOCK)) / scale
    tl.store(norms + tensor, norm.to(tl.float32))

    group = numbers + PER_STEP + PER_GROUP * tl.load(table + tensor)
    lr, decay, beta1, beta2 = tl.load(group), tl.load(group + 1), tl.load(group + 2), tl.load(group + 3)
    trained = tl.load(grads + tensor) != 0
    step_ptr = tl.load(table + 7 * n + tensor).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=trained, other=0.0) + 1.0
    tl.store(step_ptr, step, mask=trained & (frozen == 0))

    row = coefficients + COEFFICIENTS * tensor
    tl.store(row, tl.where(frozen, 0.0, 1.0))
    tl.store(row + 1, (clip(norm, tl.load(numbers + 4)) / scale).to(tl.float32))
    tl.store(row + 2, (1.0 - lr * decay).to(tl.float32))
    tl.store(row + 3, (lr / correction(step, tl.load(group + 5))).to(tl.float32))
    tl.store(row + 4, (1.0 / tl.sqrt(correction(step, tl.load(group + 6)))).to(tl.float32))
    tl.store(row + 5, (1.0 - beta1).to(tl.float32))
    tl.store(row + 6, beta2.to(tl.float32))
    tl.store(row + 7, (1.0 - beta2).to(tl.float32))
    tl.store(row + 8, tl.load(group + 4).to(tl.float32))
    tl.store(row + 9, momentum.to(tl.float32))
    tl.store(row + 10, (1.0 - momentum).to(tl.float32))


@triton.jit
def _adamw_block(
    p_at, g_at, m_at, v_at, t_at, copy_at, t_copy_at, has, c, valid,
    COPY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    trained, taught, copied, t_copied = has
    factor, decay, step_size, inv_sqrt_correction2, beta1_rest, beta2, beta2_rest, eps, keep, rest = c
    offs = tl.arange(0, BLOCK)
    m_ptr, v_ptr = pointer(m_at, tl.float32, ALIGNED) + offs, pointer(v_at, tl.float32, ALIGNED) + offs
    old = tl.load(pointer(p_at, tl.float32, ALIGNED) + offs, mask=valid, other=0.0)
    g = factor * tl.load(pointer(g_at, tl.float32, ALIGNED) + offs, mask=valid & trained, other=0.0)
    m = tl.load(m_ptr, mask=valid & trained, other=0.0)
    v = tl.load(v_ptr, mask=valid & trained, other=0.0)
    t = tl.load(pointer(t_at, tl.float32, ALIGNED) + offs, mask=valid & taught, other=0.0)
    m += beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * (g * g)
    p = decay * old - step_size * (m / (tl.sqrt(v) * inv_sqrt_correction2 + eps))
    tl.store(m_ptr, m, mask=valid & trained)
    tl.store(v_ptr, v, mask=valid & trained)
    p = tl.where(trained, p, old)
    follow(p_at, p, t_at, t, copy_at, t_copy_at, has, keep, rest, valid, COPY, BLOCK, ALIGNED)


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _adamw_ema_kernel(
    layout,
    table,
    grads,
    coefficients,
    n,
    n_chunks,
    COPY: tl.constexpr,  # 0 without copies, 1 bf16, 2 fp16
    COEFFICIENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Backwards: the gradients read last by the norms are still in the cache.
    i = n_chunks - 1 - tl.program_id(0)
    tensor, start, count = chunk_of(layout, i, n, n_chunks, CHUNK)
    row = coefficients + COEFFICIENTS * tensor
    count = tl.where(tl.load(row) == 0.0, 0, count)
    c = (
        tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5),
        tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9), tl.load(row + 10),
    )  # fmt: skip
    p, m = tl.load(table + n + tensor), tl.load(table + 2 * n + tensor)
    v, t = tl.load(table + 3 * n + tensor), tl.load(table + 4 * n + tensor)
    copy, t_copy = tl.load(table + 5 * n + tensor), tl.load(table + 6 * n + tensor)
    g = tl.load(grads + tensor)
    has = (g != 0, t != 0, copy != 0, t_copy != 0)
    p, g, m, v, t = p + start * 4, g + start * 4, m + start * 4, v + start * 4, t + start * 4
    copy, t_copy = copy + start * 2, t_copy + start * 2
    whole = whole_blocks(p | g | m | v | t | copy | t_copy, count, BLOCK)
    every = tl.full([BLOCK], 1, tl.int1)
    for k in range(0, whole, BLOCK):
        _adamw_block(
            p + k * 4, g + k * 4, m + k * 4, v + k * 4, t + k * 4, copy + k * 2, t_copy + k * 2,
            has, c, every, COPY, BLOCK, True,
        )  # fmt: skip
    for k in range(whole, count, BLOCK):
        valid = tl.arange(0, BLOCK) < count - k
        _adamw_block(
            p + k * 4, g + k * 4, m + k * 4, v + k * 4, t + k * 4, copy + k * 2, t_copy + k * 2,
            has, c, valid, COPY, BLOCK, False,
        )  # fmt: skip


def adam_numbers(group: Any) -> list[float | Tensor]:
    """PER_GROUP numbers of a group with lr, weight_decay, betas and eps."""
    logarithms = [math.log2(beta) if beta > 0 else -math.inf for beta in group.betas]
    return [group.lr, group.weight_decay, *group.betas, group.eps, *logarithms]


def adamw_ema(rows: Sequence[Row], common: Common, max_norm: float) -> tuple[Tensor, Tensor]:
    """A step of AdamW on plain rows whose group has lr, weight_decay, betas and eps.

    Returns norms fp32 [n] and flags bool [2]: a gradient was not finite, nothing was changed."""
    step = Step.of(rows, common, max_norm, COEFFICIENTS, adam_numbers)
    layout = step.layout
    with on_device_of(step.table):
        if common.norms is None:
            sums, partial = layout, sums_of_squares(layout, step.codes, step.grads, step.numbers)
        else:
            sums, partial = given_squares(step, common.norms)
        _adamw_coefficients_kernel[(layout.n,)](
            sums.table, step.table, step.grads, step.numbers, partial, step.norms, step.coefficients,
            step.flags.view(torch.uint8), layout.n, PER_STEP, PER_GROUP, COEFFICIENTS, BLOCK, num_warps=WARPS,
        )  # fmt: skip
        if layout.n_chunks:
            _adamw_ema_kernel[(layout.n_chunks,)](
                layout.table, step.table, step.grads, step.coefficients, layout.n, layout.n_chunks,
                step.copy, COEFFICIENTS, CHUNK, BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return step.norms, step.flags


def launches() -> list[Launch]:
    """ViT-S/16 with its head at K = 65536."""
    elements, n, n_chunks, problem = multi_tensor.MODEL
    table = dict(layout="*i64", table="*i64", grads="*i64")
    first = dict(numbers="*fp64", partial="*fp64", norms="*fp32", coefficients="*fp32", flags="*u8", n="i32")
    second = dict(coefficients="*fp32", n="i32", n_chunks="i32")
    sizes = dict(PER_STEP=PER_STEP, PER_GROUP=PER_GROUP, COEFFICIENTS=COEFFICIENTS, BLOCK=BLOCK)
    result = [
        Launch(
            "adamw_ema: coefficients", _adamw_coefficients_kernel, {**table, **first}, sizes,
            WARPS, 1, problem, n, 8 * n_chunks,
        )
    ]  # fmt: skip
    for copy, traffic, suffix in (
        (0, 36, ""),
        (1, 40, ", bf16 copies of both"),
        (2, 40, ", fp16 copies of both"),
    ):
        constants = dict(COPY=copy, COEFFICIENTS=COEFFICIENTS, CHUNK=CHUNK, BLOCK=BLOCK)
        result.append(
            Launch(
                "adamw_ema", _adamw_ema_kernel, {**table, **second}, constants,
                WARPS, 1, problem + suffix, n_chunks, traffic * elements,
            )
        )  # fmt: skip
    return result
