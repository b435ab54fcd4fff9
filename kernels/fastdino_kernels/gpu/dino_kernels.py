"""Triton kernels of the DINO loss on any set of columns of the logits, and their launchers.

Statistics of a row are relative to its maximum and in base 2: with ``y = (x - max) log2(e) / temp`` they are
max, sum = sum 2^y, a teacher's energy = sum 2^y y, and of a pair (g, v) cross = sum 2^y_g y_v. Then

    entropy_g = ln 2 (log2 sum_g - energy_g / sum_g),   H(g, v) = ln 2 (log2 sum_v - cross_gv / sum_g):

the maxima cancel, and nothing large is subtracted from something large. The forward reads each logit once:
one warp for an image and a block of columns keeps the teachers' exponentials in registers while the student's
rows stream by. It leaves a record of ``2V + 3G + VG`` numbers; a second kernel merges the records of a row, a
third adds up the rows, both in a fixed order. The backward reads each logit and writes each gradient once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LOG2E, Launch, needs_int64, on_device_of

BLOCK = 1024  # columns per record; the last record of a row may hold fewer
STATISTICS_WARPS, STAGES = 1, 3  # one warp: no reduction crosses a warp; rows prefetched from sm_80 on
GRADIENT_WARPS = 4
_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(1 / LOG2E)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # as maximum, so that -inf - max is no NaN


@triton.jit
def _load(row_ptr, offsets, columns, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(row_ptr + offsets).to(tl.float32)
    return tl.load(row_ptr + offsets, mask=offsets < columns, other=-float("inf")).to(tl.float32)


@triton.jit
def _load_center(center_ptr, offsets, columns, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(center_ptr + offsets)
    return tl.load(center_ptr + offsets, mask=offsets < columns, other=0.0)


@triton.jit(do_not_specialize=["images", "views", "blocks", "first", "splits"])
def _statistics_kernel(
    records_ptr,  # [images, 2V + 3G + VG, splits]
    student_ptr,  # [V*B, columns]
    teacher_ptr,  # [G*B, columns]
    center_ptr,  # [columns]
    student_temp_ptr,
    teacher_temp_ptr,
    images,
    views,
    columns,
    blocks,
    first,
    splits,
    student_stride,
    teacher_stride,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    INT64: tl.constexpr,
    STAGES: tl.constexpr,
):
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if INT64:
        image = image.to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    student_scale = _LOG2E / tl.load(student_temp_ptr)
    teacher_scale = _LOG2E / tl.load(teacher_temp_ptr)
    record = records_ptr + image * ((2 + G) * views + 3 * G) * splits + first + block
    teacher_record = record + 2 * views * splits
    cross = teacher_record + 3 * G * splits
    c = _load_center(center_ptr, offsets, columns, EVEN)
    weights = ()
    for g in tl.static_range(G):
        t = _load(teacher_ptr + (g * images + image) * teacher_stride, offsets, columns, EVEN) - c
        top = tl.maximum(tl.max(t, 0), _LOWEST)
        y = (t - top) * teacher_scale
        w = tl.exp2(y)
        tl.store(teacher_record + g * splits, top)
        tl.store(teacher_record + (G + g) * splits, tl.sum(w, 0))
        # A weight of 0 contributes nothing, as the limit of w log w does, even where y is -infinite.
        tl.store(teacher_record + (2 * G + g) * splits, tl.sum(tl.where(w == 0.0, 0.0, w * y), 0))
        weights = weights + (w,)  # type: ignore[assignment]
    for v in tl.range(0, views, num_stages=STAGES):
        x = _load(student_ptr + (v * images + image) * student_stride, offsets, columns, EVEN)
        top = tl.maximum(tl.max(x, 0), _LOWEST)
        y = (x - top) * student_scale
        tl.store(record + v * splits, top)
        tl.store(record + (views + v) * splits, tl.sum(tl.exp2(y), 0))
        if not EVEN:
            y = tl.where(offsets < columns, y, 0.0)
        for g in tl.static_range(G):
            tl.store(cross + (g * views + v) * splits, tl.sum(weights[g] * y, 0))


@triton.jit(do_not_specialize=["images", "views", "splits"])
def _merge_kernel(
    records_ptr,  # [images, 2V + 3G + VG, splits]
    student_temp_ptr,
    teacher_temp_ptr,
    state_ptr,  # [2, (V+G)*B] maxima and 1 / sums of all rows
    row_loss_ptr,  # [V*B]
    row_entropy_ptr,  # [G*B]
    images,
    views,
    splits,
    G: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    v, image = row // images, row % images
    rows = (views + G) * images
    offsets = tl.arange(0, SPLITS)
    mask = offsets < splits
    student_scale = _LOG2E / tl.load(student_temp_ptr)
    teacher_scale = _LOG2E / tl.load(teacher_temp_ptr)
    record = records_ptr + image * ((2 + G) * views + 3 * G) * splits + offsets
    teacher_record = record + 2 * views * splits
    cross_record = teacher_record + 3 * G * splits + v * splits

    tops = tl.load(record + v * splits, mask=mask, other=_LOWEST)
    top = tl.max(tops, 0)
    shift = (tops - top) * student_scale  # of each record's y, to the common maximum
    total = tl.sum(tl.exp2(shift) * tl.load(record + (views + v) * splits, mask=mask, other=0.0), 0)
    tl.store(state_ptr + row, top)
    tl.store(state_ptr + rows + row, 1.0 / total)
    loss = 0.0
    for g in tl.static_range(G):
        teacher_tops = tl.load(teacher_record + g * splits, mask=mask, other=_LOWEST)
        sums = tl.load(teacher_record + (G + g) * splits, mask=mask, other=0.0)
        teacher_top = tl.max(teacher_tops, 0)
        teacher_shift = (teacher_tops - teacher_top) * teacher_scale
        factor = tl.exp2(teacher_shift)
        teacher_total = tl.sum(factor * sums, 0)
        # Where factor * sums is 0 there is no moment to move, whatever the shift: keeps 0 * infinity out.
        empty = factor * sums == 0.0
        cross = tl.load(cross_record + g * views * splits, mask=mask, other=0.0)
        cross = tl.sum(tl.where(empty, 0.0, factor * (cross + shift * sums)), 0)
        if v == g:
            energy = tl.load(teacher_record + (2 * G + g) * splits, mask=mask, other=0.0)
            energy = tl.sum(tl.where(empty, 0.0, factor * (energy + teacher_shift * sums)), 0)
            tl.store(row_entropy_ptr + row, (tl.log2(teacher_total) - energy / teacher_total) * _LN2)
            tl.store(state_ptr + views * images + row, teacher_top)
            tl.store(state_ptr + rows + views * images + row, 1.0 / teacher_total)
        else:
            loss += tl.log2(total) - cross / teacher_total
    tl.store(row_loss_ptr + row, loss * _LN2)


@triton.jit(do_not_specialize=["rows", "teacher_rows"])
def _mean_kernel(
    row_loss_ptr,  # [V*B]
    row_entropy_ptr,  # [G*B]
    loss_ptr,
    entropy_ptr,
    rows,
    teacher_rows,
    weight,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, rows, BLOCK):
        total += tl.load(row_loss_ptr + begin + offsets, mask=begin + offsets < rows, other=0.0)
    tl.store(loss_ptr, tl.sum(total, 0) * weight)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, teacher_rows, BLOCK):
        total += tl.load(row_entropy_ptr + begin + offsets, mask=begin + offsets < teacher_rows, other=0.0)
    tl.store(entropy_ptr, tl.sum(total, 0) / teacher_rows)


@triton.jit(do_not_specialize=["rows"])
def _column_mean_kernel(
    x_ptr,  # [rows, columns]
    out_ptr,  # [columns]
    rows,
    columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    INT64: tl.constexpr,
):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS)
    if INT64:
        r = r.to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, rows, ROWS):
        mask = (begin + r < rows)[:, None]
        if not EVEN:
            mask = mask & (c < columns)[None, :]
        total += tl.load(x_ptr + (begin + r)[:, None] * stride + c[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    mean = tl.sum(total, 0) / rows
    if EVEN:
        tl.store(out_ptr + c, mean)
    else:
        tl.store(out_ptr + c, mean, mask=c < columns)


@triton.jit(do_not_specialize=["images", "views", "blocks"])
def _gradient_kernel(
    out_ptr,  # [V*B, columns]
    state_ptr,  # [2, (V+G)*B]
    grad_loss_ptr,
    student_ptr,  # [V*B, columns]
    teacher_ptr,  # [G*B, columns]
    center_ptr,  # [columns]
    student_temp_ptr,
    teacher_temp_ptr,
    weight,
    images,
    views,
    columns,
    blocks,
    out_stride,
    student_stride,
    teacher_stride,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    INT64: tl.constexpr,
):
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if INT64:
        image = image.to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    temp = tl.load(student_temp_ptr)
    coefficient = tl.load(grad_loss_ptr) * weight / temp
    student_scale = _LOG2E / temp
    teacher_scale = _LOG2E / tl.load(teacher_temp_ptr)
    inverse_ptr = state_ptr + (views + G) * images
    c = _load_center(center_ptr, offsets, columns, EVEN)
    targets = ()
    for g in tl.static_range(G):
        row = (views + g) * images + image
        t = _load(teacher_ptr + (g * images + image) * teacher_stride, offsets, columns, EVEN) - c
        w = tl.exp2((t - tl.load(state_ptr + row)) * teacher_scale)
        w = w * (coefficient * tl.load(inverse_ptr + row))
        targets = targets + (w,)  # type: ignore[assignment]
    for v in range(0, views):
        row = v * images + image
        x = _load(student_ptr + row * student_stride, offsets, columns, EVEN)
        target = tl.zeros([BLOCK], tl.float32)
        for g in tl.static_range(G):
            target += tl.where(v != g, targets[g], 0.0)
        pairs = tl.where(v < G, G - 1, G).to(tl.float32)
        w = tl.exp2((x - tl.load(state_ptr + row)) * student_scale)
        grad = w * (coefficient * pairs * tl.load(inverse_ptr + row)) - target
        if EVEN:
            tl.store(out_ptr + row * out_stride + offsets, grad.to(out_ptr.dtype.element_ty))
        else:
            tl.store(
                out_ptr + row * out_stride + offsets,
                grad.to(out_ptr.dtype.element_ty),
                mask=offsets < columns,
            )


def new_records(student: Tensor, shape: tuple[int, int, int], columns: int) -> Tensor:
    """Statistics to be filled for ``columns`` columns in all: fp32 [images, 2V + 3G + VG, splits]."""
    images, views, g = shape
    size = 2 * views + 3 * g + views * g
    return student.new_empty((images, size, -(-columns // block_size(g))), dtype=torch.float32)


def block_size(n_global: int) -> int:
    """Columns per record: the teachers' exponentials of a block stay in the registers of one warp."""
    return max(BLOCK // 8, min(BLOCK, 2 * BLOCK // triton.next_power_of_2(n_global)))


def add_statistics(
    records: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    temps: tuple[Tensor, Tensor],
    shape: tuple[int, int, int],
    begin: int = 0,
) -> None:
    """Write the records of some columns: student [V*B, C], teacher [G*B, C], center [C] fp32.

    ``begin``, the first of them, is a multiple of the block size. Rows may have any stride."""
    images, views, g = shape
    block, columns = block_size(g), student.shape[1]
    blocks = triton.cdiv(columns, block)
    with on_device_of(student):
        _statistics_kernel[(images * blocks,)](
            records, student, teacher, center, *temps,
            images, views, columns, blocks, begin // block, records.shape[2],
            student.stride(0), teacher.stride(0),
            G=g, BLOCK=block, EVEN=columns % block == 0, INT64=needs_int64(student, teacher, records),
            STAGES=STAGES, num_warps=STATISTICS_WARPS,
        )  # fmt: skip


def result(
    records: Tensor, temps: tuple[Tensor, Tensor], shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss [], mean teacher entropy [], state fp32 [2, (V+G)*B] for the gradient, of complete records."""
    images, views, g = shape
    splits = records.shape[2]
    state = records.new_empty(2, (views + g) * images)
    row_loss, row_entropy = records.new_empty(views * images), records.new_empty(g * images)
    loss, entropy = records.new_empty(()), records.new_empty(())
    with on_device_of(records):
        _merge_kernel[(views * images,)](
            records, *temps, state, row_loss, row_entropy, images, views, splits,
            G=g, SPLITS=triton.next_power_of_2(splits), num_warps=1 if splits <= 512 else 4,
        )  # fmt: skip
        _mean_kernel[(1,)](
            row_loss, row_entropy, loss, entropy, views * images, g * images, _weight(shape),
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return loss, entropy, state


def column_mean(x: Tensor, out: Tensor) -> None:
    """``out`` [C] fp32 <- mean over the rows of x [R, C].

    A kernel of its own: partial sums in the statistics' programs, one per image, would write and read more
    than it does, and run before them it leaves the teacher's logits in the cache.
    """
    rows, columns = x.shape
    with on_device_of(x):
        _column_mean_kernel[(triton.cdiv(columns, 128),)](
            x, out, rows, columns, x.stride(0),
            ROWS=32, COLUMNS=128, EVEN=columns % 128 == 0, INT64=needs_int64(x), num_warps=4,
        )  # fmt: skip


def write_gradient(
    out: Tensor,
    state: Tensor,
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    temps: tuple[Tensor, Tensor],
    shape: tuple[int, int, int],
) -> None:
    """``out`` [V*B, C] <- grad_loss * d loss / d student for these columns; may be ``student`` itself."""
    images, views, g = shape
    block, columns = block_size(g), student.shape[1]
    blocks = triton.cdiv(columns, block)
    with on_device_of(student):
        _gradient_kernel[(images * blocks,)](
            out, state, grad_loss, student, teacher, center, *temps, _weight(shape),
            images, views, columns, blocks, out.stride(0), student.stride(0), teacher.stride(0),
            G=g, BLOCK=block, EVEN=columns % block == 0, INT64=needs_int64(out, student, teacher),
            num_warps=GRADIENT_WARPS,
        )  # fmt: skip


def _weight(shape: tuple[int, int, int]) -> float:
    images, views, g = shape
    return 1 / (g * (views - 1) * images)


def shape_of(student: Tensor, teacher: Tensor, n_global: int) -> tuple[int, int, int]:
    """Images, student views, teacher views."""
    images = teacher.shape[0] // n_global
    return images, student.shape[0] // images, n_global


def rows_of(x: Tensor) -> Tensor:
    """The kernels take rows of any stride, but their elements must be neighbours."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def launches() -> list[Launch]:
    """ViT-S/16: 64 images, 2 + 10 views, 65536 prototypes."""
    images, views, g, k = 64, 12, 2, 65536
    block, record = block_size(g), 2 * views + 3 * g + views * g
    rows, problem = images * (views + g), "V=12 G=2 B=64 K=65536"
    strides = {"student_stride": k, "teacher_stride": k}
    found = []
    for name, size in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        capabilities = (80, 90) if name == "bf16" else (70, 80, 90)
        logits = {"student_ptr": f"*{name}", "teacher_ptr": f"*{name}"}
        scalars = {"center_ptr": "*fp32", "student_temp_ptr": "*fp32", "teacher_temp_ptr": "*fp32"}
        sizes = dict.fromkeys(("images", "views", "columns", "blocks"), "i32")
        constants = {**strides, "G": g, "BLOCK": block, "EVEN": True, "INT64": False}
        found += [
            Launch(
                f"dino_loss_statistics_{name}", _statistics_kernel,
                {"records_ptr": "*fp32", **logits, **scalars, **sizes, "first": "i32", "splits": "i32"},
                {**constants, "STAGES": STAGES}, STATISTICS_WARPS, 3,
                problem, images * k // block, rows * k * size, 0, capabilities,
            ),
            Launch(
                f"dino_loss_gradient_{name}", _gradient_kernel,
                {"out_ptr": f"*{name}", "state_ptr": "*fp32", "grad_loss_ptr": "*fp32", "weight": "fp32"}
                | logits | scalars | sizes,
                {**constants, "out_stride": k}, GRADIENT_WARPS, 3,
                problem, images * k // block, (rows + images * views) * k * size, 0, capabilities,
            ),
            Launch(
                f"dino_loss_column_mean_{name}", _column_mean_kernel,
                {"x_ptr": f"*{name}", "out_ptr": "*fp32", "rows": "i32", "columns": "i32"},
                {"stride": k, "ROWS": 32, "COLUMNS": 128, "EVEN": True, "INT64": False}, 4, 3,
                "128 rows, K=65536", k // 128, images * g * k * size + k * 4, 0, capabilities,
            ),
        ]  # fmt: skip
    pointers = [f"{name}_ptr" for name in ("records", "student_temp", "teacher_temp", "state")]
    pointers += ["row_loss_ptr", "row_entropy_ptr"]
    splits = k // block
    found.append(
        Launch(
            "dino_loss_merge", _merge_kernel,
            dict.fromkeys(pointers, "*fp32") | dict.fromkeys(("images", "views", "splits"), "i32"),
            {"G": g, "SPLITS": splits}, 1, 3, problem, images * views, images * record * splits * 4,
        )
    )  # fmt: skip
    pointers = ["row_loss_ptr", "row_entropy_ptr", "loss_ptr", "entropy_ptr"]
    found.append(
        Launch(
            "dino_loss_mean", _mean_kernel,
            dict.fromkeys(pointers, "*fp32") | {"rows": "i32", "teacher_rows": "i32", "weight": "fp32"},
            {"BLOCK": 1024}, 4, 3, problem, 1, rows * 4,
        )
    )  # fmt: skip
    return found
