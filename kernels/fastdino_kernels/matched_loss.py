"""Cross-entropy of student rows with teacher rows given by index, fused with the prototype layer.

Student rows z [R, D] and weights W [K, D], teacher rows y [T, D] and weights W' [K, D], center c [K]. Row r
of ``match`` [R, G] holds the n_r teacher rows that z_r is compared with (negative: none), w_r is its weight:

    x = W z / s,  p = softmax((W' y - c) / u)
    loss = sum_r w_r ( n_r logsumexp(x_r) - sum_g p_match[r,g] . x_r )
    dx_r = w_r / s ( n_r softmax(x_r) - sum_g p_match[r,g] ),   dz = dx W,   dW = dx^T z
    batch center = W' mean_t(y_t);   kl = loss - sum_r w_r sum_g entropy(p_match[r,g])

This is the dense loss of EsViT (:func:`fastdino_kernels.region_loss`), where every region of a view meets one
region of each teacher view, and iBOT's loss on masked patches (:func:`fastdino_kernels.patch_loss`), where
match is the identity. The teacher's rows are gathered inside the kernels, by index, and never copied; W is
taken in chunks of columns, so that nothing of size [R, K] exists. One GEMM makes a chunk's logits, one pass
over them leaves a record of statistics for each row and BLOCK columns (see csrc/matched_loss.cpp), and the
records are merged at the end. The backward makes the logits again, turns them into dx in place and multiplies
twice. Statistics, dx and the accumulation of dz over chunks are fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import gemm_dtype, resolve
from .dino_loss import temperature
from .native import call, int64, on_huge_pages, pointer
from .operators import operator, register_gradient
from .reference import MatchedLoss
from .validate import check_no_grad, check_temperature, check_tensor

BLOCK = 1024  # columns of a record, as in csrc/matched_loss.cpp; chunks are multiples of it
CHUNK_BYTES = 12 << 20  # of logits, the teacher's weights exp(y) and converted prototypes in a chunk


def column_chunks(k: int, block: int, bytes_per_column: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of the K columns, multiples of ``block`` wide but for the last."""
    size = max(1, chunk_bytes // (bytes_per_column * block)) * block
    return (slice(begin, min(begin + size, k)) for begin in range(0, k, size))


class Chunks:
    """Makes the logits of one chunk of columns after another, in buffers [R, width] and [T, width]."""

    def __init__(
        self,
        student_z: Tensor,
        teacher_z: Tensor,
        k: int,
        dtype: torch.dtype,
        block: int,
        bytes_per_column: int,
        chunk_bytes: int,
    ) -> None:
        self.z, self.y, self.dtype = student_z.to(dtype), teacher_z.to(dtype), dtype
        self.slices = list(column_chunks(k, block, bytes_per_column, chunk_bytes))
        width = -(-self.slices[0].stop // block) * block
        self.x = self.z.new_empty(len(student_z), width)
        self.t = self.z.new_empty(len(teacher_z), width)

    def make(self, student_weight: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Logits x [R, C] and, converted, the student's weights [C, D]; the teacher's logits are in ``t``."""
        weight, columns = student_weight.to(self.dtype), len(student_weight)
        x = self.x[:, :columns]
        torch.mm(self.z, weight.t(), out=x)
        torch.mm(self.y, teacher_weight.to(self.dtype).t(), out=self.t[:, :columns])
        return x, weight


class _HostChunks(Chunks):
    """With the teacher's exp(y) [T, width] in fp32, in place of its logits where they are fp32 themselves."""

    def __init__(self, student_z: Tensor, teacher_z: Tensor, k: int, dtype: torch.dtype) -> None:
        rows, (teacher_rows, d) = len(student_z), teacher_z.shape
        copies = dtype != torch.float32
        per_column = (rows + teacher_rows + d) * dtype.itemsize + copies * teacher_rows * 4
        super().__init__(student_z, teacher_z, k, dtype, BLOCK, per_column, CHUNK_BYTES)
        self.weights = torch.empty_like(self.t, dtype=torch.float32) if copies else self.t

    def arguments(
        self, center: Tensor, match: Tensor, student_temp: Tensor, teacher_temp: Tensor
    ) -> tuple[object, ...]:
        """Those that the C functions of both passes have in common, for the chunk made last."""
        return (
            *map(pointer, (self.x, self.t, center, match)),
            *int64(len(self.x), len(self.t), match.shape[1], len(center), self.x.stride(0), self.t.stride(0)),
            ctypes.c_int(self.dtype == torch.bfloat16),
            ctypes.c_double(student_temp.item()),
            ctypes.c_double(teacher_temp.item()),
            pointer(self.weights),
        )


@operator("fastdino::matched_loss_fwd")
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
    (rows, targets), teacher_rows, k = match.shape, len(teacher_z), len(center)
    if int(match.max()) >= teacher_rows:
        raise ValueError(f"match: expected rows of the teacher, below {teacher_rows}, got {int(match.max())}")
    blocks = -(-k // BLOCK)
    student_parts = center.new_empty(rows, blocks, 2 + targets)
    teacher_parts = center.new_empty(teacher_rows, blocks, 3)
    batch_center = torch.empty_like(center)
    mean_y = teacher_z.mean(0, dtype=torch.float32)
    chunks = _HostChunks(student_z, teacher_z, k, dtype)
    for columns in chunks.slices:
        chunks.make(student_weight[columns], teacher_weight[columns])
        torch.mv(teacher_weight[columns].float(), mean_y, out=batch_center[columns])
        call(
            "fdk_matched_statistics",
            *chunks.arguments(center[columns], match, student_temp, teacher_temp),
            *int64(columns.start // BLOCK, blocks),
            pointer(student_parts),
            pointer(teacher_parts),
        )
    student_stats, teacher_stats = center.new_empty(2, rows), center.new_empty(2, teacher_rows)
    result = (ctypes.c_double * 3)()
    call(
        "fdk_matched_combine",
        *map(pointer, (match, row_weight)),
        *int64(rows, teacher_rows, targets, blocks),
        ctypes.c_double(student_temp.item()),
        ctypes.c_double(teacher_temp.item()),
        *map(pointer, (student_parts, teacher_parts, student_stats, teacher_stats)),
        result,
    )
    loss, kl, entropy = (torch.tensor(value, dtype=torch.float32) for value in result)
    return loss, kl, entropy, batch_center, student_stats, teacher_stats


@operator("fastdino::matched_loss_bwd")
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
    dz = torch.zeros(student_z.shape if needs_z else 0, dtype=torch.float32)
    dw = on_huge_pages(torch.empty_like(student_weight) if needs_weight else student_weight.new_empty(0))
    chunks = _HostChunks(student_z, teacher_z, len(center), dtype)
    with torch.autocast("cpu", enabled=False):
        for columns in chunks.slices:
            dx, weight = chunks.make(student_weight[columns], teacher_weight[columns])
            call(
                "fdk_matched_gradient",
                *chunks.arguments(center[columns], match, student_temp, teacher_temp),
                *map(pointer, (row_weight, student_stats, teacher_stats)),
                ctypes.c_double(grad_loss.item()),
            )
            if needs_z:
                dz += torch.mm(dx, weight)
            if needs_weight and dw.dtype == dtype:
                torch.mm(dx.t(), chunks.z, out=dw[columns])
            elif needs_weight:
                dw[columns] = torch.mm(dx.t(), chunks.z)
    return dz.to(student_z.dtype), dw


def complete(forward: Any, backward: Any) -> None:
    """Fake results and autograd of a pair of operators with the signatures above."""

    def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
        center, match, teacher_z = arguments[4], arguments[5], arguments[2]
        shapes = ((), (), (), center.shape[0], (2, match.shape[0]), (2, teacher_z.shape[0]))
        return tuple(center.new_empty(shape, dtype=torch.float32) for shape in shapes)

    def fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
        z, weight, *_, needs_z, needs_weight = arguments[1:]
        dz = torch.empty_like(z) if needs_z else z.new_empty(0)
        return dz, torch.empty_like(weight) if needs_weight else weight.new_empty(0)

    torch.library.register_fake(forward, fake_forward)
    torch.library.register_fake(backward, fake_backward)
    register_gradient(forward, backward, leaves=2, kept=4, passed=1)


complete(_forward, _backward)


def matched_loss(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    match: Tensor,
    *,
    row_weight: Tensor | None,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> MatchedLoss:
    """The loss of the module's docstring; ``region_loss`` and ``patch_loss`` are its public forms.

    Args:
        student_z: [R, D]; fp32, bf16, fp16 or float64.
        student_weight: effective prototype weights [K, D].
        teacher_z, teacher_weight: [T, D] and [K, D]; must not require grad.
        center: [K], as it was before this step's update.
        match: int64 [R, G], rows of ``teacher_z``; negative for none. A row beyond T raises on a CPU and
            makes the loss NaN on a GPU, which cannot look without waiting.
        row_weight: [R], or None for 1 / (number of entries of ``match`` that are not negative).
        student_temp, teacher_temp: numbers > 0, or 0-dim tensors.
    """
    check_tensor("student_z", student_z, ("R", "D"))
    rows, d = student_z.shape
    check_tensor("student_weight", student_weight, ("K", d), like=student_z)
    k = student_weight.shape[0]
    check_tensor("teacher_z", teacher_z, ("T", d), like=student_z)
    check_tensor("teacher_weight", teacher_weight, (k, d), like=student_z)
    check_tensor("center", center, (k,), like=student_z)
    check_no_grad("teacher_z", teacher_z)
    check_no_grad("teacher_weight", teacher_weight)
    check_temperature("student_temp", student_temp)
    check_temperature("teacher_temp", teacher_temp)
    _check_match(match, student_z)
    for name, x in (("student_z", student_z), ("teacher_z", teacher_z)):
        if x.shape[0] == 0:
            raise ValueError(f"{name}: expected at least one row, got shape {list(x.shape)}")
    if row_weight is None:
        dtype = torch.promote_types(student_z.dtype, torch.float32)
        row_weight = (1 / (match >= 0).sum().clamp(min=1).to(dtype)).expand(rows)
    else:
        check_tensor("row_weight", row_weight, (rows,), like=student_z)
        if row_weight.requires_grad:
            raise ValueError("row_weight: must not require grad; detach it")
    kind = resolve(student_z, student_weight, teacher_z, teacher_weight)
    if kind == "reference":
        return reference.matched_loss(
            student_z,
            student_weight,
            teacher_z,
            teacher_weight,
            center,
            match,
            row_weight=row_weight,
            student_temp=student_temp,
            teacher_temp=teacher_temp,
        )
    arguments = (
        student_z.contiguous(),
        student_weight.contiguous(),
        teacher_z.contiguous(),
        teacher_weight.contiguous(),
        center.float().contiguous(),
        match.contiguous(),
        row_weight.float().contiguous(),
    )
    dtype = gemm_dtype(student_z, student_weight)
    if kind == "triton":
        from .gpu import matched_loss as gpu

        results = gpu.matched_loss(*arguments, student_temp, teacher_temp, dtype)
    else:
        dtype = torch.float32 if dtype == torch.float16 else dtype
        results = _forward(*arguments, temperature(student_temp), temperature(teacher_temp), dtype)
    loss, kl, entropy, batch_center = results[:4]
    return MatchedLoss(loss, batch_center, entropy, kl)


def _check_match(match: Tensor, student_z: Tensor) -> None:
    if not isinstance(match, Tensor) or match.dtype != torch.int64:
        got = match.dtype if isinstance(match, Tensor) else type(match).__name__
        raise TypeError(f"match: expected an int64 tensor, got {got}")
    if match.dim() != 2 or match.shape[0] != student_z.shape[0] or match.shape[1] == 0:
        raise ValueError(
            f"match: expected shape [{student_z.shape[0]}, G] with G >= 1, got {list(match.shape)}"
        )
    if match.device != student_z.device:
        raise ValueError(f"match: expected device {student_z.device}, got {match.device}")
