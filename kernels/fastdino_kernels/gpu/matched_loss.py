"""Triton form of :func:`fastdino_kernels.matched_loss.matched_loss`; the mathematics is stated there.

A chunk of columns is one GEMM of cuBLAS for each network and, on its result, one launch for each network
forward and one backward. Gradients of logits are about 1e-7 and would vanish in fp16: dx is kept as
``GRADIENT_SCALE w_r / max|w| (n_r softmax - targets)``, and its products are scaled back in fp32.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..matched_loss import Chunks, complete
from ..operators import operator
from . import matched_kernels as kernels
from .launch import needs_int64, on_device_of, scalar

GRADIENT_SCALE = 1024.0


def _chunks(student_z: Tensor, teacher_z: Tensor, k: int, dtype: torch.dtype) -> Chunks:
    per_column = (len(student_z) + len(teacher_z)) * dtype.itemsize
    return Chunks(student_z, teacher_z, k, dtype, kernels.BLOCK, per_column, kernels.CHUNK_BYTES)


def _grid(rows: int, columns: slice) -> tuple[int, int]:
    return triton.cdiv(rows, kernels.ROWS), triton.cdiv(columns.stop - columns.start, kernels.BLOCK)


@operator("fastdino::matched_loss_triton_fwd", device="default")
def _forward(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    match: Tensor,
    row_weight: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, kl, entropy [], batch center [K], max and sum of student [2, R] and teacher rows [2, T]."""
    (rows, targets), (teacher_rows, d), k = match.shape, teacher_z.shape, len(center)
    blocks = triton.cdiv(k, kernels.BLOCK)
    parts = center.new_empty(blocks, 2 + targets, rows)
    teacher_parts = center.new_empty(blocks, 3, teacher_rows)
    stats, teacher_stats = center.new_empty(2, rows), center.new_empty(2, teacher_rows)
    losses, entropies = center.new_empty(2, rows), center.new_empty(teacher_rows)
    batch_center = torch.empty_like(center)
    with on_device_of(center):
        chunks = _chunks(student_z, teacher_z, k, dtype)
        wide = needs_int64(chunks.x, chunks.t, parts, teacher_parts)
        tile = dict(K=k, ROWS=kernels.ROWS, BLOCK=kernels.BLOCK, INT64=wide, num_warps=kernels.WARPS)
        for columns in chunks.slices:
            chunks.make(student_weight[columns], teacher_weight[columns])
            place = columns.start // kernels.BLOCK, chunks.x.shape[1] // kernels.BLOCK
            kernels.teacher_kernel[_grid(teacher_rows, columns)](
                chunks.t, center, teacher_temp, teacher_parts, teacher_rows, *place, **tile
            )
            kernels.student_kernel[_grid(rows, columns)](
                *(chunks.x, chunks.t, center, match, student_temp, teacher_temp, teacher_parts, parts),
                *(rows, teacher_rows, *place),
                G=targets,
                **tile,
            )
        merge = dict(
            BLOCKS=kernels.MERGE_BLOCKS, ROWS=kernels.MERGE_ROWS, INT64=wide, num_warps=kernels.WARPS
        )
        kernels.merge_teacher_kernel[(triton.cdiv(teacher_rows, kernels.MERGE_ROWS),)](
            teacher_parts, teacher_temp, teacher_stats, entropies, teacher_rows, blocks, **merge
        )
        kernels.merge_student_kernel[(triton.cdiv(rows, kernels.MERGE_ROWS),)](
            *(parts, teacher_parts, match, row_weight, student_temp, teacher_temp, teacher_stats, entropies),
            *(stats, losses, rows, teacher_rows, blocks),
            G=targets,
            **merge,
        )
        kernels.center_kernel[(triton.cdiv(k, kernels.CENTER_ROWS),)](
            *(teacher_weight, teacher_z.mean(0, dtype=torch.float32), batch_center),
            K=k,
            D=d,
            ROWS=kernels.CENTER_ROWS,
            COLUMNS=kernels.center_columns(d),
            INT64=needs_int64(teacher_weight),
            num_warps=kernels.WARPS,
        )
    return losses[0].sum(), losses[1].sum(), entropies.mean(), batch_center, stats, teacher_stats


@operator("fastdino::matched_loss_triton_bwd", device="default")
def _backward(
    grad_loss: Tensor,
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    match: Tensor,
    row_weight: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
    dtype: torch.dtype,
    needs_z: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """-> dz, dW in the dtypes of z and W, [0] where not needed."""
    (rows, targets), teacher_rows, k = match.shape, len(teacher_z), len(center)
    dz = center.new_zeros(student_z.shape if needs_z else 0)
    dw = torch.empty_like(student_weight) if needs_weight else student_weight.new_empty(0)
    largest = row_weight.abs().amax().clamp(min=1e-30)  # all of them may be 0
    factors = row_weight * (GRADIENT_SCALE / largest)
    rest = grad_loss * largest / (GRADIENT_SCALE * student_temp)
    with on_device_of(center), torch.autocast(center.device.type, enabled=False):
        chunks = _chunks(student_z, teacher_z, k, dtype)
        wide = needs_int64(chunks.x, chunks.t)
        for columns in chunks.slices:
            dx, weight = chunks.make(student_weight[columns], teacher_weight[columns])
            kernels.gradient_kernel[_grid(rows, columns)](
                *(chunks.x, chunks.t, center, match, factors, student_temp, teacher_temp),
                *(student_stats, teacher_stats, rows, teacher_rows),
                *(columns.start // kernels.BLOCK, chunks.x.shape[1] // kernels.BLOCK),
                K=k,
                G=targets,
                ROWS=kernels.ROWS,
                BLOCK=kernels.BLOCK,
                INT64=wide,
                num_warps=kernels.WARPS,
            )
            if needs_z:
                dz += _product(dx, weight)
            if needs_weight:
                torch.mul(_product(dx.t(), chunks.z), rest, out=dw[columns])
    return (dz * rest if needs_z else dz).to(student_z.dtype), dw


complete(_forward, _backward)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32, without copies of fp16 or bf16 factors where the device can do that."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def matched_loss(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    match: Tensor,
    row_weight: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Of checked, contiguous arguments: loss, kl, entropy, batch center and statistics."""
    tensors = student_z, student_weight, teacher_z, teacher_weight, center, match, row_weight
    return _forward(*tensors, scalar(student_temp, student_z), scalar(teacher_temp, student_z), dtype)
