"""Triton form of :func:`fastdino_kernels.matched_loss.matched_loss`; the mathematics is stated there.

All rows are taken together, W in chunks of columns, so that nothing of size [R, K] exists: one GEMM of cuBLAS
for each network and, on its result, one launch for each. The backward makes the logits again, turns them into
dx in place and multiplies twice. Gradients of logits are about 1e-7 and would vanish in fp16: dx is kept as
``GRADIENT_SCALE w_r / max|w| (n_r softmax - targets)``, and its products are scaled back in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..operators import operator, register_gradient
from . import matched_kernels as kernels
from .launch import needs_int64, on_device_of, scalar

GRADIENT_SCALE = 1024.0


class Chunks:
    """Makes the logits of one chunk of columns after another, in buffers [R, width] and [T, width]."""

    def __init__(self, student_z: Tensor, teacher_z: Tensor, k: int, dtype: torch.dtype) -> None:
        self.z, self.y, self.dtype = student_z.to(dtype), teacher_z.to(dtype), dtype
        per_column = (len(student_z) + len(teacher_z)) * dtype.itemsize
        self.slices = list(kernels.column_chunks(k, per_column))
        width = -(-self.slices[0].stop // kernels.BLOCK) * kernels.BLOCK
        self.x = self.z.new_empty(len(student_z), width)
        self.t = self.z.new_empty(len(teacher_z), width)

    def make(self, student_weight: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Logits x [R, C] and, converted, the student's weights [C, D]; the teacher's logits are in ``t``."""
        weight, columns = student_weight.to(self.dtype), len(student_weight)
        x = self.x[:, :columns]
        torch.mm(self.z, weight.t(), out=x)
        torch.mm(self.y, teacher_weight.to(self.dtype).t(), out=self.t[:, :columns])
        return x, weight


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
        chunks = Chunks(student_z, teacher_z, k, dtype)
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
        chunks = Chunks(student_z, teacher_z, k, dtype)
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


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    teacher_z, center, match = arguments[2], arguments[4], arguments[5]
    shapes = ((), (), (), center.shape[0], (2, match.shape[0]), (2, teacher_z.shape[0]))
    return tuple(center.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    z, weight, *_, needs_z, needs_weight = arguments[1:]
    dz = torch.empty_like(z) if needs_z else z.new_empty(0)
    return dz, torch.empty_like(weight) if needs_weight else weight.new_empty(0)


torch.library.register_fake(_forward, _fake_forward)
torch.library.register_fake(_backward, _fake_backward)
register_gradient(_forward, _backward, leaves=2, kept=4, passed=1)


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
