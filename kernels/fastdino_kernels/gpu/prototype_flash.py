"""The prototype loss as attention over the prototypes: logits stay in registers. For sm_80 and later.

With the names of prototype_loss.py, p_t the target of teacher row t, n_r the number of teacher rows paired
with student row r, and (M U)_r the sum of their U_t:

    U_t = p_t W = softmax((W' y_t - c) / u) W                   query y_t, keys W', bias -c, values W
    O_r = softmax(W z_r / s) W,  l_r = logsumexp(W z_r / s)     query z_r, keys = values = W
    loss = w sum_r (n_r l_r - z_r . (M U)_r / s),  dz_r = (w / s) (n_r O_r - (M U)_r)
    dW = (w / s) sum_r (n_r softmax(W z_r / s) - sum of the paired p_t)^T z_r

Forward: one kernel for both attentions, with the online maximum; K is split over as many programs as the GPU
runs at once, and a second kernel merges a row's parts (m, sum, O), fp32. It leaves dz and a number for each
row. Backward: a program owns some rows of dW; it makes its tiles of both logits again, subtracts the
probabilities in fp32 and multiplies by z. No atomics: every sum has one order. dz subtracts two fp32 sums of
probabilities rounded to the operands' dtype: at the usual temperatures no worse than eager code, which
rounds the logits; worse only where both are so flat and so alike that this rounding exceeds the difference.

Work in units of 2 rows K D operations: forward 2 for student rows (logits, O) and 2 for teacher rows (logits,
U), backward 2 (logits, dW) and 1 (logits): 4 V + 3 G per image, against 3 V + G where the logits are stored.
Making dz in the backward instead would take 5 V + 4 G, as dz and dW want different loop orders. Without a
gradient for z there is no O: V less. Extra memory: the parts, one fp32 tile for each program that runs at
once: 17 MB on an H200, where 64 images with V = 12 and K = 65536 have 217 MB of bf16 logits and gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..backend import interpreted
from ..operators import operator, register_gradient
from .launch import LOG2E, Launch, needs_int64, on_device_of, scalar
from .prototype_flash_kernels import (
    attend_kernel,
    merge_student_kernel,
    merge_teacher_kernel,
    weight_grad_kernel,
)

HEADROOM = {torch.float16: 15}  # of p in base 2, which fp16 would otherwise lose below 2^-24
GAIN = {torch.float16: 12}  # of the logits' gradient, for the same reason
MAX_SPLITS = 512  # parts of a row
MERGE_PARTS, MERGE_WARPS = 16, 4


class Blocks(NamedTuple):
    """A program's tiles: rows of what it keeps, of what it streams, columns of both; warps, stages."""

    kept: int
    streamed: int
    depth: int
    warps: int
    stages: int
    resident: int = 1  # programs of a multiprocessor at once


# By the first capability with these matrix instructions (mma.sync, wgmma); for D up to 256, 384, 512. The
# former fit the 99 KiB of sm_86 and sm_89 as well, and serve sm_100, whose own instructions these kernels do
# not use well: wgmma's sizes exceed its tensor memory, as do even the former beyond D = 384.
STUDENT = {
    80: (Blocks(64, 16, 64, 4, 3, 2), Blocks(64, 32, 128, 8, 2), Blocks(64, 16, 128, 8, 2)),
    90: (Blocks(128, 64, 256, 8, 3), Blocks(128, 64, 128, 8, 2), Blocks(64, 64, 128, 8, 2)),
}
TEACHER = {
    80: (Blocks(64, 16, 64, 4, 3, 2), Blocks(64, 16, 128, 8, 2), Blocks(64, 16, 128, 8, 2)),
    90: (Blocks(128, 64, 256, 8, 2), Blocks(128, 32, 128, 8, 2), Blocks(64, 32, 128, 8, 2)),
}
GRADIENT = {
    80: (Blocks(64, 16, 64, 4, 3, 2), Blocks(64, 32, 128, 8, 2), Blocks(64, 16, 128, 8, 2)),
    90: (Blocks(128, 32, 256, 8, 3), Blocks(128, 16, 128, 8, 2), Blocks(64, 32, 512, 8, 2)),
}
FP32 = Blocks(32, 32, 64, 4, 1)  # exact products, for tests


def supports(d: int, dtype: torch.dtype, capability: int) -> bool:
    """Whether these kernels are meant for D columns in ``dtype`` on a GPU of this compute capability."""
    widest = 384 if 100 <= capability < 120 else 512
    return capability >= 80 and d <= widest and dtype in (torch.float16, torch.bfloat16)


def blocks(table: Mapping[int, tuple[Blocks, ...]], d: int, dtype: torch.dtype, capability: int) -> Blocks:
    family = 90 if 90 <= capability < 100 else 80
    chosen = FP32 if dtype == torch.float32 else table[family][(d > 256) + (d > 384)]
    return chosen._replace(depth=max(16, min(chosen.depth, triton.next_power_of_2(d))))


class Device(NamedTuple):
    capability: int
    processors: int


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(90, 8)
    found = torch.cuda.get_device_properties(device)
    return Device(10 * found.major + found.minor, found.multi_processor_count)


@functools.cache
def split(row_blocks: int, k_blocks: int, programs: int) -> tuple[int, int]:
    """Parts of the prototypes, and blocks in each: the least time on ``programs`` at once, then memory."""

    def time(parts: int) -> tuple[int, int]:
        return triton.cdiv(row_blocks * parts, programs) * triton.cdiv(k_blocks, parts), parts

    most = max(1, min(k_blocks, 2 * programs // row_blocks, MAX_SPLITS))
    size = triton.cdiv(k_blocks, min(range(1, most + 1), key=time))
    return triton.cdiv(k_blocks, size), size


def _attend_constants(
    b: Blocks, d: int, dtype: torch.dtype, teacher: bool, needs_o: bool, even: bool, int64: bool
) -> dict[str, object]:
    return dict(
        D=d,
        TEACHER=teacher,
        NEEDS_O=needs_o,
        HEADROOM=HEADROOM.get(dtype, 0),
        LOG2E=LOG2E,
        EVEN=even,
        INT64=int64,
        WIDEN=interpreted() and dtype == torch.bfloat16,
        BLOCK_R=b.kept,
        BLOCK_K=b.streamed,
        BLOCK_D=b.depth,
        STAGES=b.stages,
    )


def _merge_constants(d: int, dtype: torch.dtype, int64: bool) -> dict[str, object]:
    return dict(
        D=d,
        GAIN=GAIN.get(dtype, 0),
        LN2=1 / LOG2E,
        INT64=int64,
        BLOCK_D=triton.next_power_of_2(d),
        MAX_SPLITS=MAX_SPLITS,
        PARTS=MERGE_PARTS,
    )


def _gradient_constants(
    b: Blocks, d: int, dtype: torch.dtype, n_global: int, images: int, k: int, int64: bool
) -> dict[str, object]:
    most = b.streamed if n_global < 3 else 16  # a tile for each teacher view stays in registers
    block_b = min(most, max(16, triton.next_power_of_2(images)))
    return dict(
        D=d,
        G=n_global,
        LOG2E=LOG2E,
        EVEN_K=k % b.kept == 0,
        EVEN_B=images % block_b == 0,
        INT64=int64,
        WIDEN=interpreted() and dtype == torch.bfloat16,
        BLOCK_K=b.kept,
        BLOCK_B=block_b,
        BLOCK_D=b.depth,
        BLOCK_T=min(b.depth, 64 if d <= 256 else 32),
        STAGES=b.stages,
    )


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, center: Tensor, temp: Tensor, teacher: bool, needs_o: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> O of the parts [splits, R, D] (or [0]), statistics [splits, 3, R], column sums [row blocks, K]."""
    (rows, d), k = q.shape, len(keys)
    device = _device(q.device)
    b = blocks(TEACHER if teacher else STUDENT, d, q.dtype, device.capability)
    row_blocks = triton.cdiv(rows, b.kept)
    splits, size = split(row_blocks, triton.cdiv(k, b.streamed), device.processors * b.resident)
    out = center.new_empty((splits, rows, d) if needs_o else 0)
    stats = center.new_empty(splits, 3, rows)
    sums = center.new_empty((row_blocks, k) if teacher else 0)
    int64 = needs_int64(q, keys, out)
    attend_kernel[(row_blocks, splits)](
        q,
        keys,
        values,
        center,
        temp,
        out,
        stats,
        sums,
        rows,
        k,
        size,
        **_attend_constants(b, d, q.dtype, teacher, needs_o, k % b.streamed == 0, int64),
        num_warps=b.warps,
        num_stages=b.stages,
    )
    return out, stats, sums


@operator("fastdino::prototype_flash_fwd", device="default")
def _forward(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    n_global: int,
    needs_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contiguous z, W, y, W' of one dtype; c, s, u fp32.

    -> loss [], batch center [K], entropy [], dz [V*B, D] fp32 (or [0]) for a loss gradient of 1, and base-2
    log-sum-exp of the student's and of the teacher's rows, as the merge kernels leave it.
    """
    (rows, d), teacher_rows = student_z.shape, len(teacher_z)
    images = teacher_rows // n_global
    with on_device_of(student_z):
        out, stats, sums = _attend(
            teacher_z, teacher_weight, student_weight, center, teacher_temp, True, True
        )
        u, teacher_lse = center.new_empty(teacher_rows, d), center.new_empty(teacher_rows)
        entropies = torch.empty_like(teacher_lse)
        merge_teacher_kernel[(teacher_rows,)](
            out,
            stats,
            u,
            teacher_lse,
            entropies,
            teacher_rows,
            len(stats),
            **_merge_constants(d, student_z.dtype, needs_int64(out)),
            num_warps=MERGE_WARPS,
        )
        batch_center = sums.sum(0) / teacher_rows
        del out, sums  # the student's parts may take their place
        out, stats, _ = _attend(
            student_z, student_weight, student_weight, center, student_temp, False, needs_z
        )
        student_lse, losses = center.new_empty(rows), center.new_empty(rows)
        dz = center.new_empty((rows, d) if needs_z else 0)
        merge_student_kernel[(rows,)](
            out,
            stats,
            u,
            student_z,
            student_temp,
            student_lse,
            losses,
            dz,
            rows,
            len(stats),
            images,
            _weight(rows, images, n_global),
            G=n_global,
            NEEDS_O=needs_z,
            **_merge_constants(d, student_z.dtype, needs_int64(out, student_z)),
            num_warps=MERGE_WARPS,
        )
    return losses.sum(), batch_center, entropies.mean(), dz, student_lse, teacher_lse


def _weight(rows: int, images: int, n_global: int) -> float:
    """1 / number of pairs of a student's and a teacher's row."""
    return 1.0 / (n_global * (rows - images))


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
    needs_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, d = student_z.shape
    return (
        center.new_empty(()),
        torch.empty_like(center),
        center.new_empty(()),
        center.new_empty((rows, d) if needs_z else 0),
        center.new_empty(rows),
        center.new_empty(teacher_z.shape[0]),
    )


@operator("fastdino::prototype_flash_bwd", device="default")
def _backward(
    grad_loss: Tensor,
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    dz: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    n_global: int,
    needs_z: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """-> dz, dW in the dtypes of z and W, [0] where not needed."""
    (rows, d), k = student_z.shape, len(student_weight)
    grad_z = (dz * grad_loss).to(student_z.dtype) if needs_z else student_z.new_empty(0)
    out = student_weight.new_empty((k, d) if needs_weight else 0)
    if needs_weight:
        images = len(teacher_z) // n_global
        b = blocks(GRADIENT, d, student_z.dtype, _device(student_z.device).capability)
        int64 = needs_int64(student_z, student_weight)
        with on_device_of(student_z):
            weight_grad_kernel[(triton.cdiv(k, b.kept),)](
                student_z,
                student_weight,
                teacher_z,
                teacher_weight,
                center,
                student_lse,
                teacher_lse,
                student_temp,
                teacher_temp,
                grad_loss,
                out,
                images,
                k,
                rows // images,
                _weight(rows, images, n_global) * 2.0 ** -GAIN.get(student_z.dtype, 0),
                **_gradient_constants(b, d, student_z.dtype, n_global, images, k, int64),
                num_warps=b.warps,
                num_stages=b.stages,
            )
    return grad_z, out


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
    dz: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    n_global: int,
    needs_z: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_z = torch.empty_like(student_z) if needs_z else student_z.new_empty(0)
    return grad_z, torch.empty_like(student_weight) if needs_weight else student_weight.new_empty(0)


register_gradient(_forward, _backward, leaves=2, kept=3, passed=1)


def prototype_loss_flash(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    n_global: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, batch center, teacher entropy, of checked arguments; z, W, y and W' have one dtype."""
    loss, batch_center, entropy, *_ = _forward(
        student_z.contiguous(),
        student_weight.contiguous(),
        teacher_z.contiguous(),
        teacher_weight.contiguous(),
        center.float().contiguous(),
        scalar(student_temp, student_z),
        scalar(teacher_temp, student_z),
        n_global,
        torch.is_grad_enabled() and student_z.requires_grad,
    )
    return loss, batch_center, entropy


def launches() -> list[Launch]:
    """ViT-S/16: 64 images, 2 + 10 views; the official head, more prototypes, wider bottlenecks."""
    bf16, fp16 = torch.bfloat16, torch.float16
    heads = [(bf16, 65536, 256), (fp16, 65536, 256), (bf16, 262144, 256)]
    heads += [(bf16, 131072, 384), (bf16, 65536, 512)]
    return [
        launch
        for capability, processors in ((80, 108), (90, 132))
        for head in heads
        for launch in _launches(capability, processors, *head)
    ]


def _launches(capability: int, processors: int, dtype: torch.dtype, k: int, d: int) -> Iterator[Launch]:
    images, views, g = 64, 12, 2
    rows, teacher_rows = views * images, g * images
    x = "bf16" if dtype == torch.bfloat16 else "fp16"
    name, problem = f"{x}_k{k}_d{d}", f"V={views} G={g} B={images} K={k} D={d}, {x}"
    only = (capability,)

    def types(kernel: Any, narrow: str) -> dict[str, str]:
        pointers = [n for n in kernel.arg_names if n.endswith("_ptr")]
        sizes = {"rows", "K", "blocks_per_split", "splits", "images", "views"} & {*kernel.arg_names}
        found = {n: f"*{x}" if n[:-4] in narrow.split() else "*fp32" for n in pointers}
        return (
            found | dict.fromkeys(sizes, "i32") | ({"weight": "fp32"} if "weight" in kernel.arg_names else {})
        )

    merges = {True: merge_teacher_kernel, False: merge_student_kernel}
    for teacher, n in ((True, teacher_rows), (False, rows)):
        who, table = ("teacher", TEACHER) if teacher else ("student", STUDENT)
        b = blocks(table, d, dtype, capability)
        row_blocks = triton.cdiv(n, b.kept)
        splits, _ = split(row_blocks, triton.cdiv(k, b.streamed), processors * b.resident)
        yield Launch(
            f"prototype_flash_{who}_{name}", attend_kernel, types(attend_kernel, "q key value"),
            _attend_constants(b, d, dtype, teacher, True, True, False), b.warps, b.stages,
            problem, row_blocks * splits, 2 * (n + (1 + teacher) * k) * d + 4 * n * d, 4 * n * k * d, only,
        )  # fmt: skip
        yield Launch(
            f"prototype_flash_merge_{who}_{name}", merges[teacher], types(merges[teacher], "z"),
            _merge_constants(d, dtype, False) | ({} if teacher else dict(G=g, NEEDS_O=True)), MERGE_WARPS, 3,
            f"{problem}, {splits} parts", n, 4 * n * d * (splits + 1), 0, only,
        )  # fmt: skip
    b = blocks(GRADIENT, d, dtype, capability)
    yield Launch(
        f"prototype_flash_weight_grad_{name}", weight_grad_kernel,
        types(weight_grad_kernel, "z weight y teacher_weight out"),
        _gradient_constants(b, d, dtype, g, images, k, False), b.warps, b.stages,
        problem, triton.cdiv(k, b.kept), 2 * (3 * k + rows + teacher_rows) * d,
        2 * (2 * rows + teacher_rows) * k * d, only,
    )  # fmt: skip
