"""Cross-entropy of student rows with teacher rows given by index, fused with the prototype layer.

Student rows z [R, D] and weights W [K, D], teacher rows y [T, D] and weights W' [K, D], center c [K]. Row r
of ``match`` [R, G] holds the n_r teacher rows that z_r is compared with (negative: none), w_r is its weight:

    x = W z / s,  p = softmax((W' y - c) / u)
    loss = sum_r w_r ( n_r logsumexp(x_r) - sum_g p_match[r,g] . x_r )
    dx_r = w_r / s ( n_r softmax(x_r) - sum_g p_match[r,g] ),   dz = dx W,   dW = dx^T z
    batch center = W' mean_t(y_t);   kl = loss - sum_r w_r sum_g entropy(p_match[r,g])

This is the dense loss of EsViT (:func:`fastdino_kernels.region_loss`), where every region of a view meets one
region of each teacher view, and iBOT's loss on masked patches (:func:`fastdino_kernels.patch_loss`), where
match is the identity. The teacher's rows are gathered inside the kernels, by index, and never copied.

On a CPU nothing of size [R, K] exists because rows are taken group by group: some student rows and all
teacher rows that they meet (of EsViT: those of some images). A GEMM makes the logits of a chunk of columns,
one pass over them while they are in the cache leaves exp(x) in their place and a record of statistics for
each row and BLOCK columns (see csrc/matched_loss.cpp). When all columns have been seen, the records are
merged, a second pass turns the exponentials into dx in place, and two GEMMs add the chunk's part to dz and
dW. So no product and no exponential is computed twice, and the backward of autograd multiplies dz and dW by
a number. Statistics, and the sums over chunks and groups, are fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import gemm_dtype, resolve
from .dino_loss import temperature
from .native import call, empty, int64, on_huge_pages, pointer, tensor, zeros
from .operators import operator
from .reference import MatchedLoss
from .validate import check_no_grad, check_prototypes, check_temperature, check_tensor

BLOCK = 1024  # columns of a record, as in csrc/matched_loss.cpp; chunks are multiples of it
# Half or twice as much of either makes no difference that could be measured.
CHUNK_BYTES = 8 << 20  # of a group's logits and the teacher's weights exp(y) in a chunk of columns
GROUP_BYTES = 256 << 20  # of the same in all columns
_ROUNDS = 16  # of looking for rows that belong together


class Group(NamedTuple):
    """Student rows [n], the teacher rows [m] that they meet, and ``match`` [n, G] in terms of the latter."""

    rows: Tensor
    teachers: Tensor
    match: Tensor


def groups(match: Tensor, teacher_rows: int, row_bytes: int, teacher_bytes: int) -> Iterator[Group]:
    """All student rows that have a target and all teacher rows, in groups of about GROUP_BYTES at most.

    Rows that meet the same teacher rows stay together where they fit, so that few of those are in two groups.
    Teacher rows that nobody meets come last, without student rows.
    """
    valid = match >= 0
    met = match[valid]
    # of each teacher row: the first one that it is connected with
    label = torch.arange(teacher_rows, device="cpu")
    for _ in range(_ROUNDS):
        of_row = label[match.clamp(min=0)].where(valid, teacher_rows).amin(1)
        previous, label = label, label.scatter_reduce(0, met, of_row[:, None].expand_as(match)[valid], "amin")
        if torch.equal(previous, label):
            break
    order = of_row.argsort(stable=True)[: int(valid.any(1).sum())]
    used = zeros(teacher_rows, dtype=torch.bool).index_fill_(0, met, True)
    students = torch.bincount(of_row[order], minlength=teacher_rows)
    costs = students * row_bytes + torch.bincount(label[used], minlength=teacher_rows) * teacher_bytes
    for rows in _cut(order, students, costs, row_bytes + match.shape[1] * teacher_bytes):
        found = valid[rows]
        teachers, places = torch.unique(match[rows][found], return_inverse=True)
        yield Group(rows, teachers, torch.full_like(match[rows], -1).masked_scatter_(found, places))
    alone = (~used).nonzero()[:, 0]
    for teachers in alone.split(max(1, GROUP_BYTES // teacher_bytes)) if len(alone) else ():
        yield Group(match.new_empty(0), teachers, match.new_empty(0, match.shape[1]))


def _cut(order: Tensor, students: Tensor, costs: Tensor, row_cost: int) -> Iterator[Tensor]:
    """Runs of ``order``; ``students[i]`` rows that cost ``costs[i]`` bytes together stay so if that fits."""
    present = students.nonzero()[:, 0]
    begin = end = cost = 0
    for count, more in zip(students[present].tolist(), costs[present].tolist(), strict=True):
        if end > begin and cost + more > GROUP_BYTES:
            yield order[begin:end]
            begin, cost = end, 0
        end, cost = end + count, cost + more
        if cost > GROUP_BYTES:  # one set alone; in the worst case its rows share no teacher row
            yield from order[begin:end].split(max(1, GROUP_BYTES // row_cost))
            begin, cost = end, 0
    if end > begin:
        yield order[begin:end]


class _Buffers:
    """Logits x and the teacher's weights exp(y) of one group after another, chunk by chunk of columns."""

    def __init__(self, parts: list[Group], k: int, dtype: torch.dtype) -> None:
        self.k, self.dtype = k, dtype
        rows, teachers = max(len(g.rows) for g in parts), max(len(g.teachers) for g in parts)
        self.x = on_huge_pages(empty(rows * k, dtype=dtype))
        self.weights = on_huge_pages(empty(teachers * k))
        # The teacher's logits lie where its weights will, unless they are of another type.
        self.t = None if dtype == torch.float32 else empty(0, dtype=dtype)

    def chunks(self, group: Group) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Columns; x [n, C], t [m, C] and weights [m, C], each dense."""
        n, m = len(group.rows), len(group.teachers)
        per_column = n * self.dtype.itemsize + m * (4 if self.t is None else 6)
        width = max(1, CHUNK_BYTES // (per_column * BLOCK)) * BLOCK
        for begin in range(0, self.k, width):
            end = min(begin + width, self.k)
            x, weights = (
                self.x[n * begin : n * end].view(n, end - begin),
                self.weights[m * begin : m * end].view(m, end - begin),
            )
            t = weights if self.t is None else self.t.resize_(m, end - begin)
            yield slice(begin, end), x, t, weights


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a b, in fp32 but for the product of 16-bit factors."""
    if a.dtype == into.dtype:
        into.addmm_(a, b)
    else:
        into += torch.mm(a, b)


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
    needs_z: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, kl, entropy [], batch center [K], dz [R, D] and dW [K, D], [0] where not needed; all fp32."""
    targets, teacher_rows, k = match.shape[1], len(teacher_z), len(center)
    if int(match.max()) >= teacher_rows:
        raise ValueError(f"match: expected rows of the teacher, below {teacher_rows}, got {int(match.max())}")
    mean_y = teacher_z.mean(0, dtype=torch.float32)
    batch_center = torch.cat([torch.mv(part.float(), mean_y) for part in teacher_weight.split(4 * BLOCK)])
    z, w, y, v = (x.to(dtype) for x in (student_z, student_weight, teacher_z, teacher_weight))
    dz = zeros(z.shape if needs_z else 0)
    dw = on_huge_pages(empty(w.shape if needs_weight else 0)).zero_()
    entropies = empty(teacher_rows, dtype=torch.float64)
    loss = kl = 0.0  # nats

    blocks = -(-k // BLOCK)
    temperatures = ctypes.c_double(student_temp.item()), ctypes.c_double(teacher_temp.item())
    parts = list(groups(match, teacher_rows, k * dtype.itemsize, k * 4))
    buffers = _Buffers(parts, k, dtype)
    for group in parts:
        n, m = len(group.rows), len(group.teachers)
        group_z, group_y, group_weight = z[group.rows], y[group.teachers], row_weight[group.rows]
        records = empty(n, blocks, 2 + targets), empty(m, blocks, 3)
        for columns, x, t, weights in buffers.chunks(group):
            torch.mm(group_z, w[columns].t(), out=x)
            torch.mm(group_y, v[columns].t(), out=t)
            call(
                "fdk_matched_statistics",
                *map(pointer, (x, t, center[columns], group.match)),
                *int64(n, m, targets, x.shape[1]),
                ctypes.c_int(dtype == torch.bfloat16),
                *temperatures,
                pointer(weights),
                *int64(columns.start // BLOCK, blocks),
                *map(pointer, records),
            )
        statistics = empty(2, n), empty(2, m)
        of_teachers = empty(m, dtype=torch.float64)
        result = (ctypes.c_double * 2)()
        call(
            "fdk_matched_combine",
            *map(pointer, (group.match, group_weight)),
            *int64(n, m, targets, blocks),
            *temperatures,
            *map(pointer, (*records, *statistics, of_teachers)),
            result,
        )
        loss, kl = loss + result[0], kl + result[1]
        entropies[group.teachers] = of_teachers
        if n == 0 or not (needs_z or needs_weight):
            continue
        group_dz = zeros(n, z.shape[1])
        for columns, dx, _, weights in buffers.chunks(group):
            call(
                "fdk_matched_gradient",
                *map(pointer, (dx, weights, group.match, group_weight)),
                *int64(n, m, targets, dx.shape[1]),
                ctypes.c_int(dtype == torch.bfloat16),
                *temperatures,
                *int64(columns.start // BLOCK, blocks),
                *map(pointer, (*records, *statistics)),
            )
            if needs_z:
                _add_product(group_dz, dx, w[columns])
            if needs_weight:
                _add_product(dw[columns], dx.t(), group_z)
        if needs_z:
            dz[group.rows] = group_dz
    entropy = entropies.mean().float()
    return tensor(loss), tensor(kl), entropy, batch_center, dz, dw


@torch.library.register_fake(_forward)
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    z, weight, center, needs = arguments[0], arguments[1], arguments[4], arguments[-2:]
    shapes = (x.shape if need else (0,) for x, need in zip((z, weight), needs, strict=True))
    return tuple(
        center.new_empty(shape, dtype=torch.float32) for shape in ((), (), (), center.shape, *shapes)
    )


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.arguments, ctx.dtypes = len(inputs), (inputs[0].dtype, inputs[1].dtype)
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Any, *_: Any) -> tuple[Any, ...]:
    found: list[Any] = [None] * ctx.arguments
    if grad is not None:
        for i, (unit, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            found[i] = (grad * unit).to(dtype) if ctx.needs_input_grad[i] else None
    return tuple(found)


torch.library.register_autograd(_forward, _gradients, setup_context=_keep)


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
    check_prototypes("student_weight", k)
    check_tensor("teacher_z", teacher_z, ("T", d), like=student_z)
    check_tensor("teacher_weight", teacher_weight, (k, d), like=student_z)
    check_tensor("center", center, (k,), like=student_z)
    check_no_grad("center", center)
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
        needs = (torch.is_grad_enabled() and x.requires_grad for x in (student_z, student_weight))
        results = _forward(*arguments, temperature(student_temp), temperature(teacher_temp), dtype, *needs)
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
