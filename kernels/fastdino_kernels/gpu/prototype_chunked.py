"""The prototype loss by chunks of columns: cuBLAS makes a chunk's logits, the DINO loss's kernels read them.

For GPUs without a tensor-core ``tl.dot`` (V100), for fp32, and wherever it wins over prototype_flash.py. The
forward leaves the records of dino_kernels.py for each chunk and merges them once at the end. The backward
makes the logits again, overwrites them with their gradient dx, and multiplies twice: dz += dx W, dW = dx^T z.
Extra memory is one chunk; where all logits fit one, they are kept from the forward. Statistics, dx as it is
formed and the accumulation of dz over chunks are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..operators import operator, register_gradient
from .dino_kernels import BLOCK, add_statistics, column_mean, new_records, result, shape_of, write_gradient
from .launch import scalar

CHUNK_BYTES = 24 << 20  # of logits: stay in the second-level cache from sm_80 on


def _chunks(k: int, rows: int, dtype: torch.dtype) -> tuple[int, Iterator[slice]]:
    """Columns of the buffer, and the slices of the K columns, equal but for the last."""
    count = max(1, -(-rows * k * dtype.itemsize // CHUNK_BYTES))
    size = -(-k // (count * BLOCK)) * BLOCK
    return min(size, k), (slice(begin, min(begin + size, k)) for begin in range(0, k, size))


def _keeps(k: int, width: int) -> bool:
    """Whether the logits, all in one chunk, are kept from the forward."""
    return width >= k


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32, of operands in the GEMM's dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    return torch.mm(a.float(), b.float(), out=out)  # with out=, autocast leaves it alone


@operator("fastdino::prototype_loss_chunked_fwd", device="default")
def _forward(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    n_global: int,
    dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [], entropy [], batch center [K], state, logits kept for the backward (or [0, 0])."""
    shape, temps = shape_of(student_z, teacher_z, n_global), (student_temp, teacher_temp)
    rows, k = len(student_z), len(center)
    z, y = student_z.to(dtype), teacher_z.to(dtype)
    width, chunks = _chunks(k, rows + len(y), dtype)
    logits = z.new_empty(rows + len(y), width)
    batch_center = torch.empty_like(center)
    records = new_records(center, shape, k)
    for columns in chunks:
        x, t = _views(logits, rows, columns)
        torch.mm(z, student_weight[columns].to(dtype).t(), out=x)
        torch.mm(y, teacher_weight[columns].to(dtype).t(), out=t)
        column_mean(t, batch_center[columns])
        add_statistics(records, x, t, center[columns], temps, shape, columns.start)
    loss, entropy, state = result(records, temps, shape)
    kept = logits if needs_grad and _keeps(k, width) else z.new_empty(0, 0)
    return loss, entropy, batch_center, state, kept


@torch.library.register_fake(_forward)
def _(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    n_global: int,
    dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, k = student_z.shape[0] + teacher_z.shape[0], center.shape[0]
    width, _ = _chunks(k, rows, dtype)
    kept = (rows, width) if needs_grad and _keeps(k, width) else (0, 0)
    scalars = center.new_empty(()), center.new_empty(())
    state = center.new_empty(2, rows)
    return *scalars, torch.empty_like(center), state, center.new_empty(kept, dtype=dtype)


@operator("fastdino::prototype_loss_chunked_bwd", device="default")
def _backward(
    grad_loss: Tensor,
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    state: Tensor,
    kept: Tensor,
    n_global: int,
    dtype: torch.dtype,
    needs_z: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """-> dz, dW in the dtypes of z and W, [0] where not needed."""
    shape, temps = shape_of(student_z, teacher_z, n_global), (student_temp, teacher_temp)
    rows, k = len(student_z), len(center)
    z, y = student_z.to(dtype), teacher_z.to(dtype)
    dz = torch.zeros(z.shape if needs_z else 0, dtype=torch.float32, device=z.device)
    dw = torch.empty_like(student_weight, memory_format=torch.contiguous_format) if needs_weight else None
    unit = None
    if dtype == torch.float16:
        # Its range cannot hold dx, some 1e-7: made up to 2^14 large, and scaled after the products, in fp32.
        images, views, _ = shape
        factor = 2.0**14 / n_global * (n_global * (views - 1) * images)
        unit, grad_loss = grad_loss / (student_temp * factor), student_temp * factor
    width, chunks = _chunks(k, rows + len(y), dtype)
    logits = kept if len(kept) else z.new_empty(rows + len(y), width)
    for columns in chunks:
        x, t = _views(logits, rows, columns)
        weight = student_weight[columns].to(dtype)
        dx = torch.empty_like(logits[:rows])[:, : x.shape[1]] if len(kept) else x
        if not len(kept):
            torch.mm(z, weight.t(), out=x)
            torch.mm(y, teacher_weight[columns].to(dtype).t(), out=t)
        write_gradient(dx, state, grad_loss, x, t, center[columns], temps, shape)
        if needs_z:
            dz += _product(dx, weight)
        if dw is not None:
            _weight_gradient(dw[columns], dx, z, unit)
    if unit is not None:
        dz *= unit
    return dz.to(student_z.dtype), student_weight.new_empty(0) if dw is None else dw


def _weight_gradient(out: Tensor, dx: Tensor, z: Tensor, unit: Tensor | None) -> None:
    """``out`` [C, D] <- unit * dx^T z."""
    if unit is not None:
        torch.mul(_product(dx.t(), z), unit, out=out)
    elif out.dtype == dx.dtype:
        torch.mm(dx.t(), z, out=out)
    elif out.dtype == torch.float32 and out.is_cuda:
        torch.mm(dx.t(), z, out_dtype=torch.float32, out=out)
    else:
        out.copy_(_product(dx.t(), z))


@torch.library.register_fake(_backward)
def _(
    grad_loss: Tensor,
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    state: Tensor,
    kept: Tensor,
    n_global: int,
    dtype: torch.dtype,
    needs_z: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    dz, dw = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for x, needed in ((student_z, needs_z), (student_weight, needs_weight))
    )
    return dz, dw


register_gradient(_forward, _backward, leaves=2, kept=3, passed=2)


def _views(logits: Tensor, rows: int, columns: slice) -> tuple[Tensor, Tensor]:
    """The student's [rows, C] and the teacher's [G*B, C] part of a chunk."""
    c = columns.stop - columns.start
    return logits[:rows, :c], logits[rows:, :c]


def prototype_loss_chunked(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    n_global: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, batch center, teacher entropy, of checked arguments; ``dtype`` is the GEMMs'."""
    loss, entropy, batch_center, _, _ = _forward(
        student_z,
        student_weight,
        teacher_z,
        teacher_weight,
        center.float().contiguous(),
        scalar(student_temp, student_z),
        scalar(teacher_temp, student_z),
        n_global,
        dtype,
        torch.is_grad_enabled() and (student_z.requires_grad or student_weight.requires_grad),
    )
    return loss, batch_center, entropy
