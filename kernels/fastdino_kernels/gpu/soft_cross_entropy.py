"""Triton form of :func:`fastdino_kernels.soft_cross_entropy.soft_cross_entropy`.

In base 2, ``y = x log2(e) / s``. Each program runs over a part of a row with the online maximum and leaves
four numbers: m = max y, l = sum 2^(y - m), d = sum t (y - m) over t != 0, n = sum t. A second kernel merges a
row's parts, ``loss = ln 2 (n log2 l - d)``. The backward needs m, log2 l and n only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import operator, register_gradient
from .launch import LOG2E, Launch, needs_int64, on_device_of, scalar

FORWARD_BLOCK, FORWARD_WARPS = 2048, 4
BACKWARD_BLOCK, BACKWARD_WARPS = 2048, 4
MAX_PARTS = 32  # of a row
PROGRAMS = 2048  # wanted at least, several for each multiprocessor


@triton.jit(do_not_specialize=["blocks_per_part"])
def _parts_kernel(
    x_ptr,  # [R, K]
    t_ptr,  # [R, K]
    temp_ptr,  # []
    part_ptr,  # [R, parts, 4] fp32
    blocks_per_part,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG2E: tl.constexpr,
    INT64: tl.constexpr,
):
    row = tl.program_id(0)
    begin = row.to(tl.int64) * K if INT64 else row * K
    scale = LOG2E / tl.load(temp_ptr)
    m = -float("inf")
    sums = tl.zeros([BLOCK], tl.float32)
    dots = tl.zeros([BLOCK], tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * blocks_per_part
    for block in range(first, min(first + blocks_per_part, tl.cdiv(K, BLOCK))):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        mask = offs < K
        y = tl.load(x_ptr + begin + offs, mask, -float("inf")).to(tl.float32) * scale
        t = tl.load(t_ptr + begin + offs, mask, 0.0).to(tl.float32)
        m_new = tl.maximum(m, tl.max(y, 0))
        safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        moved = tl.where(m == -float("inf"), 0.0, m - safe)
        y -= safe
        dots += totals * moved + t * tl.where(t == 0, 0.0, y)
        sums = sums * tl.exp2(m - safe) + tl.exp2(y)
        totals += t
        m = m_new
    out = part_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 4
    tl.store(out, m)
    tl.store(out + 1, tl.sum(sums, 0))
    tl.store(out + 2, tl.sum(dots, 0))
    tl.store(out + 3, tl.sum(totals, 0))


@triton.jit(do_not_specialize=["parts", "rows"])
def _merge_kernel(
    part_ptr,  # [R, parts, 4]
    loss_ptr,  # [R]
    stats_ptr,  # [3, R]: m, log2 l, n
    parts,
    rows,
    MAX_PARTS: tl.constexpr,
    LN2: tl.constexpr,
):
    row = tl.program_id(0)
    offs = tl.arange(0, MAX_PARTS)
    mask = offs < parts
    part = part_ptr + (row * parts + offs) * 4
    m = tl.load(part, mask, -float("inf"))
    n = tl.load(part + 3, mask, 0.0)
    top = tl.max(m, 0)
    safe = tl.where(top == -float("inf"), 0.0, top)
    log_sum = tl.log2(tl.sum(tl.load(part + 1, mask, 0.0) * tl.exp2(m - safe), 0))
    dot = tl.sum(tl.load(part + 2, mask, 0.0) + n * tl.where(n == 0, 0.0, m - safe), 0)
    total = tl.sum(n, 0)
    tl.store(loss_ptr + row, LN2 * (total * log_sum - dot))
    tl.store(stats_ptr + row, safe)
    tl.store(stats_ptr + rows + row, log_sum)
    tl.store(stats_ptr + 2 * rows + row, total)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_ptr,  # [R]
    x_ptr,  # [R, K]
    t_ptr,  # [R, K]
    temp_ptr,  # []
    stats_ptr,  # [3, R]
    out_ptr,  # [R, K]
    rows,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG2E: tl.constexpr,
    INT64: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(K, BLOCK)
    row = tl.program_id(0) // blocks
    offs = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    begin = row.to(tl.int64) * K if INT64 else row * K
    temp = tl.load(temp_ptr)
    grad = tl.load(grad_ptr + row) / temp
    m = tl.load(stats_ptr + row)
    log_sum = tl.load(stats_ptr + rows + row)
    total = tl.load(stats_ptr + 2 * rows + row)
    x = tl.load(x_ptr + begin + offs, mask, 0.0).to(tl.float32)
    t = tl.load(t_ptr + begin + offs, mask, 0.0).to(tl.float32)
    p = tl.exp2((x * (LOG2E / temp) - m) - log_sum)
    tl.store(out_ptr + begin + offs, (grad * (total * p - t)).to(out_ptr.dtype.element_ty), mask)


def _parts(rows: int, k: int) -> tuple[int, int]:
    """Programs for each row, and blocks for each of them."""
    blocks = triton.cdiv(k, FORWARD_BLOCK)
    wanted = max(1, min(MAX_PARTS, blocks, PROGRAMS // max(1, rows)))
    per_part = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, per_part), per_part


@operator("fastdino::soft_cross_entropy_triton_fwd", device="default")
def _forward(x: Tensor, t: Tensor, temp: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous x, t [R, K], temp [] fp32 -> loss [R], statistics [3, R]."""
    rows, k = x.shape
    parts, per_part = _parts(rows, k)
    part = torch.empty(rows, parts, 4, dtype=torch.float32, device=x.device)
    loss = torch.empty(rows, dtype=torch.float32, device=x.device)
    stats = torch.empty(3, rows, dtype=torch.float32, device=x.device)
    if rows:
        with on_device_of(x):
            _parts_kernel[(rows, parts)](
                x,
                t,
                temp,
                part,
                per_part,
                K=k,
                BLOCK=FORWARD_BLOCK,
                LOG2E=LOG2E,
                INT64=needs_int64(x, t),
                num_warps=FORWARD_WARPS,
            )
            _merge_kernel[(rows,)](
                part, loss, stats, parts, rows, MAX_PARTS=MAX_PARTS, LN2=1 / LOG2E, num_warps=1
            )
    return loss, stats


@torch.library.register_fake(_forward)
def _(x: Tensor, t: Tensor, temp: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(3, rows, dtype=torch.float32)


@operator("fastdino::soft_cross_entropy_triton_bwd", device="default")
def _backward(grad: Tensor, x: Tensor, t: Tensor, temp: Tensor, stats: Tensor) -> Tensor:
    """grad [R] fp32 -> [R, K] in the dtype of x."""
    rows, k = x.shape
    out = torch.empty_like(x)
    if rows:
        with on_device_of(x):
            _backward_kernel[(rows * triton.cdiv(k, BACKWARD_BLOCK),)](
                grad,
                x,
                t,
                temp,
                stats,
                out,
                rows,
                K=k,
                BLOCK=BACKWARD_BLOCK,
                LOG2E=LOG2E,
                INT64=needs_int64(x, t),
                num_warps=BACKWARD_WARPS,
            )
    return out


@torch.library.register_fake(_backward)
def _(grad: Tensor, x: Tensor, t: Tensor, temp: Tensor, stats: Tensor) -> Tensor:
    return torch.empty_like(x)


register_gradient(_forward, _backward, leaves=1, kept=1, passed=0)


def soft_cross_entropy(logits: Tensor, target: Tensor, temp: float | Tensor) -> Tensor:
    """The operation on checked arguments."""
    return _forward(logits.contiguous(), target.contiguous(), scalar(temp, logits))[0]


def launches() -> list[Launch]:
    rows, k = 64, 65536  # one view of 64 images
    _, per_part = _parts(rows, k)
    parts = triton.cdiv(k, FORWARD_BLOCK * per_part)
    constants = dict(K=k, LOG2E=LOG2E, INT64=False)
    found = []
    for dtype, size, capabilities in (
        ("fp32", 4, (70, 80, 90)),
        ("fp16", 2, (70, 80, 90)),
        ("bf16", 2, (80, 90)),
    ):
        x, problem = f"*{dtype}", f"{rows} x {k}, {dtype} logits, fp32 target"
        found += [
            Launch(
                f"soft_cross_entropy_parts_{dtype}",
                _parts_kernel,
                dict(x_ptr=x, t_ptr="*fp32", temp_ptr="*fp32", part_ptr="*fp32", blocks_per_part="i32"),
                dict(constants, BLOCK=FORWARD_BLOCK),
                num_warps=FORWARD_WARPS,
                num_stages=3,
                problem=problem,
                grid=rows * parts,
                bytes=rows * k * (size + 4),
                capabilities=capabilities,
            ),
            Launch(
                f"soft_cross_entropy_bwd_{dtype}",
                _backward_kernel,
                dict(
                    dict.fromkeys(("grad_ptr", "t_ptr", "temp_ptr", "stats_ptr"), "*fp32"),
                    x_ptr=x,
                    out_ptr=x,
                    rows="i32",
                ),
                dict(constants, BLOCK=BACKWARD_BLOCK),
                num_warps=BACKWARD_WARPS,
                num_stages=3,
                problem=problem,
                grid=rows * triton.cdiv(k, BACKWARD_BLOCK),
                bytes=rows * k * (2 * size + 4),
                capabilities=capabilities,
            ),
        ]
    merge = Launch(
        "soft_cross_entropy_merge",
        _merge_kernel,
        dict(part_ptr="*fp32", loss_ptr="*fp32", stats_ptr="*fp32", parts="i32", rows="i32"),
        dict(MAX_PARTS=MAX_PARTS, LN2=1 / LOG2E),
        num_warps=1,
        num_stages=3,
        problem=f"{rows} rows, {parts} parts",
        grid=rows,
        bytes=rows * (parts * 4 + 4) * 4,
    )
    return [*found, merge]
