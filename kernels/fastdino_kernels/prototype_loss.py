"""The DINO loss fused with the prototype layer: attention over the prototypes.

Student rows z [V*B, D] and weights W [K, D], teacher rows y [G*B, D] and weights W' [K, D], center c [K]:

    x = W z / s,  p = softmax((W' y - c) / u);   loss, entropy and KL of x and p as in dino_loss.py
    dz = sum_k dx_k W_k,   dW = dx^T z,   with dx = w / s (n softmax(x) - sum of the targets), formed in fp32

`chunked`, the form for CPUs: W is taken in blocks of columns; one GEMM makes the block's logits, one pass
over them (csrc/dino_loss.cpp) adds up the statistics. The backward makes the logits again, turns them into dx
while they are in the cache, and multiplies twice. Extra memory is one block, not [rows, K]; small problems,
whose logits fit KEEP_BYTES, keep them from the forward and save a third of the work. GEMMs run in bf16 under
autocast or for bf16 weights, else in fp32; statistics, dx and the accumulation of dz over blocks are fp32.

On a GPU, gpu/prototype_loss.py chooses between this form and `flash`, which never writes logits at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .backend import resolve
from .dino_loss import add_statistics, new_state, result, state_size, temperature, write_gradient
from .native import empty, on_huge_pages, zeros
from .operators import operator, register_gradient
from .reference import PrototypeLoss
from .validate import check_no_grad, check_prototypes, check_temperature, check_tensor, check_views

BLOCK = 4096  # columns per work item of the kernels; chunks are multiples of it
CHUNK_BYTES = 12 << 20  # allocated per chunk; each chunk costs some 10 barriers of torch's threads
KEEP_BYTES = 32 << 20  # logits up to this size are kept for the backward


def _chunks(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    dtype: torch.dtype,
    keeps: bool,
) -> Iterator[slice]:
    """Slices of the K columns, by what each allocates: logits (dx if those are kept), converted weights."""
    k, d = student_weight.shape
    rows = len(student_z) + (0 if keeps else len(teacher_z))
    converted = (student_weight.dtype != dtype) + (teacher_weight.dtype != dtype)
    size = max(1, CHUNK_BYTES // ((rows + converted * d) * dtype.itemsize * BLOCK)) * BLOCK
    return (slice(begin, min(begin + size, k)) for begin in range(0, k, size))


def _keeps(k: int, rows: int, dtype: torch.dtype) -> bool:
    return rows * k * dtype.itemsize <= KEEP_BYTES


@operator("fastdino::prototype_loss_fwd")
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
    """-> loss [], entropy [], batch center [K], state, logits kept for the backward (by blocks, or [0])."""
    rows, teacher_rows, k = len(student_z), len(teacher_z), len(center)
    images = teacher_rows // n_global
    shape, temps = (images, rows // images, n_global), (student_temp.item(), teacher_temp.item())
    z, y = student_z.to(dtype), teacher_z.to(dtype)
    keeps = needs_grad and _keeps(k, rows + teacher_rows, dtype)
    kept = on_huge_pages(empty((rows + teacher_rows) * k if keeps else 0, dtype=dtype))
    batch_center = empty(k)
    state = new_state(*shape)
    buffer = kept
    for columns in _chunks(student_z, student_weight, teacher_z, teacher_weight, dtype, keeps):
        if keeps:
            buffer = kept[(rows + teacher_rows) * columns.start :]
        elif columns.start == 0:
            buffer = empty((rows + teacher_rows) * columns.stop, dtype=dtype)
        x, t = _views(buffer, rows, teacher_rows, columns)
        torch.mm(z, student_weight[columns].to(dtype).t(), out=x)
        torch.mm(y, teacher_weight[columns].to(dtype).t(), out=t)
        add_statistics(state, x, t, center[columns], shape, temps)
        torch.mean(t, 0, dtype=torch.float32, out=batch_center[columns])
    return *result(state, shape), batch_center, state, kept


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
    rows, teacher_rows, k = student_z.shape[0], teacher_z.shape[0], center.shape[0]
    images = teacher_rows // n_global
    kept = (rows + teacher_rows) * k if needs_grad and _keeps(k, rows + teacher_rows, dtype) else 0
    return (
        center.new_empty((), dtype=torch.float32),
        center.new_empty((), dtype=torch.float32),
        center.new_empty(k, dtype=torch.float32),
        center.new_empty(images * state_size(rows // images, n_global), dtype=torch.float64),
        center.new_empty(kept, dtype=dtype),
    )


@operator("fastdino::prototype_loss_bwd")
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
    rows, teacher_rows = len(student_z), len(teacher_z)
    images = teacher_rows // n_global
    shape, temps = (images, rows // images, n_global), (student_temp.item(), teacher_temp.item())
    z, y, scale = student_z.to(dtype), teacher_z.to(dtype), grad_loss.item()
    dz = zeros(student_z.shape if needs_z else 0)
    dw = on_huge_pages(torch.empty_like(student_weight) if needs_weight else student_weight.new_empty(0))
    direct = dw.dtype == dtype
    keeps = len(kept) > 0
    chunk = empty(0, dtype=dtype)
    for columns in _chunks(student_z, student_weight, teacher_z, teacher_weight, dtype, keeps):
        weight = student_weight[columns].to(dtype)
        if len(chunk) == 0:
            chunk = empty((rows + (0 if keeps else teacher_rows)) * columns.stop, dtype=dtype)
        if keeps:
            x, t = _views(kept[(rows + teacher_rows) * columns.start :], rows, teacher_rows, columns)
            dx = chunk[: x.numel()].view_as(x)
        else:
            x, t = _views(chunk, rows, teacher_rows, columns)
            dx = x  # logits made again are overwritten by their gradient
            torch.mm(z, weight.t(), out=x)
            torch.mm(y, teacher_weight[columns].to(dtype).t(), out=t)
        write_gradient(dx, state, scale, x, t, center[columns], shape, temps)
        if needs_z:
            dz += torch.mm(dx, weight)
        if needs_weight and direct:
            torch.mm(dx.t(), z, out=dw[columns])
        elif needs_weight:
            dw[columns] = torch.mm(dx.t(), z)
    return dz.to(student_z.dtype), dw


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
    dz = torch.empty_like(student_z) if needs_z else student_z.new_empty(0)
    return dz, torch.empty_like(student_weight) if needs_weight else student_weight.new_empty(0)


register_gradient(_forward, _backward, leaves=2, kept=3, passed=2)


def _views(buffer: Tensor, rows: int, teacher_rows: int, columns: slice) -> tuple[Tensor, Tensor]:
    """The student's [rows, C] and the teacher's [teacher_rows, C] block at the start of a flat buffer."""
    c = columns.stop - columns.start
    return buffer[: rows * c].view(rows, c), buffer[rows * c : (rows + teacher_rows) * c].view(
        teacher_rows, c
    )


def _gemm_dtype(z: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return torch.bfloat16
    return torch.bfloat16 if weight.dtype == torch.bfloat16 and z.dtype == torch.bfloat16 else torch.float32


def prototype_loss(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    n_global: int = 2,
) -> PrototypeLoss:
    """:func:`dino_loss` of the logits ``z @ weight.T``, which are not stored (Caron et al. 2021, eq. 1-4).

    Args:
        student_z: bottleneck features [V*B, D], view-major: row ``v * B + b``; fp32, bf16, fp16 or float64.
        student_weight: effective prototype weights [K, D].
        teacher_z, teacher_weight: [n_global*B, D] of the first ``n_global`` views, and [K, D]; must not
            require grad.
        center: [K], as it was before this step's update.
        student_temp, teacher_temp: numbers > 0, or 0-dim tensors.

    Returns:
        PrototypeLoss of fp32 tensors (float64 for float64 features and weights); ``loss`` is differentiable
        in ``student_z`` and ``student_weight``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_tensor("student_z", student_z, ("V*B", "D"))
    d = student_z.shape[1]
    check_tensor("student_weight", student_weight, ("K", d), like=student_z)
    k = student_weight.shape[0]
    check_tensor("teacher_z", teacher_z, ("G*B", d), like=student_z)
    check_tensor("teacher_weight", teacher_weight, (k, d), like=student_z)
    check_tensor("center", center, (k,), like=student_z)
    check_no_grad("center", center)
    check_prototypes("student_weight", k)
    check_no_grad("teacher_z", teacher_z)
    check_no_grad("teacher_weight", teacher_weight)
    check_temperature("student_temp", student_temp)
    check_temperature("teacher_temp", teacher_temp)
    check_views("student_z", student_z.shape[0], "teacher_z", teacher_z.shape[0], n_global)
    chosen = resolve(student_z, student_weight, teacher_z, teacher_weight)
    if chosen == "triton":
        from .gpu.prototype_loss import prototype_loss as on_gpu

        loss, batch_center, entropy = on_gpu(
            student_z, student_weight, teacher_z, teacher_weight, center, student_temp, teacher_temp, n_global
        )
        return PrototypeLoss(loss, batch_center, entropy, loss.detach() - entropy)
    if chosen == "reference":
        return reference.prototype_loss(
            student_z,
            student_weight,
            teacher_z,
            teacher_weight,
            center,
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            n_global=n_global,
        )
    loss, entropy, batch_center, _, _ = _forward(
        student_z.contiguous(),
        student_weight.contiguous(),
        teacher_z.contiguous(),
        teacher_weight.contiguous(),
        center.float().contiguous(),
        temperature(student_temp),
        temperature(teacher_temp),
        n_global,
        _gemm_dtype(student_z, student_weight),
        torch.is_grad_enabled() and (student_z.requires_grad or student_weight.requires_grad),
    )
    return PrototypeLoss(loss, batch_center, entropy, loss.detach() - entropy)
