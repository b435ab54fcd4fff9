"""The dense loss of EsViT: regions of a student view meet the most similar regions of each teacher view.

Views v = 0 .. V-1 of B images have N_v regions each; the teacher sees the first G. Rows are ordered by view,
then by image, then by region: row ``B (N_0 + .. + N_{v-1}) + b N_v + i``. With f the backbone's features of
the regions (not the bottleneck's), P the pairs (v, g) with g != v, and p, x as in matched_loss.py:

    j*(v, g, b, i) = argmax_j cos(f_vbi, f'_gbj)
    loss = 1 / |P| sum_(v,g) 1 / (B N_v) sum_(b,i) - sum_k p_{g b j*, k} log softmax(x_vbi)_k

(Li et al. 2022, "Efficient Self-supervised Vision Transformers", eq. 2; the mean over pairs and images as in
the official code.) All pairs of a student region share its weight 1 / (|P| B N_v), so that the loss is a
single pass over the student's rows, each with up to G targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .matched_loss import matched_loss
from .reference import MatchedLoss
from .validate import check_tensor


class RegionMatch(NamedTuple):
    """Which teacher rows each student row is compared with, and how much that counts."""

    match: Tensor  # [R, G] int64, rows of the teacher; -1 where the teacher's view is the student's own
    row_weight: Tensor  # [R] fp32


@torch.no_grad()
def match_regions(
    student_features: Tensor, teacher_features: Tensor, regions: Sequence[int], *, n_global: int = 2
) -> RegionMatch:
    """For each region of the student its most similar region in every other view of the teacher.

    Args:
        student_features: backbone features [R, C] of all views, R = B (N_0 + .. + N_{V-1}), in the order of
            the module's docstring (the official code's concatenation of the views).
        teacher_features: [T, C] of the first ``n_global`` views, T = B (N_0 + .. + N_{n_global-1}).
        regions: N_v of each view, e.g. ``[49, 49] + 8 * [9]``.

    Returns:
        RegionMatch with ``n_global`` columns, for :func:`fastdino_kernels.region_loss`; no gradient flows
        through it. Similarities are computed in fp32 (fp64 for float64 features), whatever autocast says.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_tensor("student_features", student_features, ("R", "C"))
    width = student_features.shape[1]
    check_tensor("teacher_features", teacher_features, ("T", width), like=student_features)
    images = _images(student_features.shape[0], teacher_features.shape[0], list(regions), n_global)
    dtype = torch.promote_types(student_features.dtype, torch.float32)
    rows = [images * n for n in regions]
    with torch.autocast(student_features.device.type, enabled=False):
        # The length of a student's feature scales all its similarities and changes no argmax.
        students = student_features.to(dtype).split(rows)
        teachers = F.normalize(teacher_features.to(dtype), dim=1).split(rows[:n_global])
        found = []  # per run of views with equally many regions: [views * B * N, G]
        for first, last in _runs(regions):
            views, n = last - first, regions[first]
            # One batch entry per image: [B, views * N, C]
            s = torch.stack(students[first:last]).view(views, images, n, width).transpose(0, 1)
            s = s.reshape(images, views * n, width)
            columns = [
                _nearest(s, teacher.view(images, -1, width), sum(rows[:g])).view(images, views, n)
                for g, teacher in enumerate(teachers)
            ]
            match = torch.stack(columns, -1).transpose(0, 1).contiguous()  # [views, B, N, G]
            for v in range(first, min(last, n_global)):
                match[v - first, :, :, v] = -1
            found.append(match.view(-1, n_global))
    pairs = n_global * (len(regions) - 1)
    weights = [found[0].new_full((n,), 1 / (pairs * n), dtype=torch.float32) for n in rows]
    return RegionMatch(torch.cat(found), torch.cat(weights))


def _runs(regions: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal ranges of consecutive views with equally many regions."""
    starts = [v for v, n in enumerate(regions) if v == 0 or n != regions[v - 1]]
    return list(zip(starts, [*starts[1:], len(regions)], strict=True))


def _nearest(student: Tensor, teacher: Tensor, offset: int) -> Tensor:
    """Teacher rows [B, M] for student [B, M, C] and the teacher's view [B, N, C] from row ``offset`` on."""
    images, n, _ = teacher.shape
    nearest = torch.bmm(student, teacher.transpose(1, 2)).argmax(-1)  # [B, M]
    return nearest + torch.arange(offset, offset + images * n, n, device=student.device)[:, None]


def _images(student_rows: int, teacher_rows: int, regions: list[int], n_global: int) -> int:
    if not 1 <= n_global <= len(regions) or len(regions) < 2:
        raise ValueError(
            f"regions: expected one number for each of V >= max(2, n_global = {n_global}) views and "
            f"n_global >= 1, got {regions}"
        )
    if min(regions) < 1:
        raise ValueError(f"regions: expected at least 1 region in each view, got {regions}")
    per_image = sum(regions[:n_global])
    if teacher_rows == 0 or teacher_rows % per_image:
        raise ValueError(
            f"teacher_features: expected B * {per_image} rows (regions {regions[:n_global]}), "
            f"got {teacher_rows}"
        )
    images = teacher_rows // per_image
    if student_rows != images * sum(regions):
        raise ValueError(
            f"student_features: expected {images} * {sum(regions)} rows (regions {regions}), "
            f"got {student_rows}"
        )
    return images


def region_loss(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    match: RegionMatch,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> MatchedLoss:
    """EsViT's loss between matched regions, from the bottlenecks of the dense heads (Li et al. 2022, eq. 2).

    Args:
        student_z: bottleneck features of all regions [R, D], rows as in :func:`match_regions`; fp32, bf16,
            fp16 or float64.
        student_weight: effective prototype weights [K, D].
        teacher_z, teacher_weight: [T, D] of the first views' regions, and [K, D]; must not require grad.
        center: [K] of the dense head, as it was before this step's update.
        match: result of :func:`match_regions`, or any ``RegionMatch``: rows of ``teacher_z`` (negative: none)
            and weights.
        student_temp, teacher_temp: numbers > 0, or 0-dim tensors.

    Returns:
        MatchedLoss of fp32 tensors (float64 for float64 features and weights); ``loss`` is differentiable in
        ``student_z`` and ``student_weight``. The mean over the pairs of views, for each over images and
        regions; EsViT adds it to the loss on whole views with weights 1/2 and 1/2.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. A row of ``match`` beyond
            T raises on a CPU and makes the loss NaN on a GPU, which cannot look without waiting.
    """
    if not isinstance(match, tuple) or len(match) != 2:
        raise TypeError(f"match: expected a RegionMatch, got {type(match).__name__}")
    return matched_loss(
        student_z,
        student_weight,
        teacher_z,
        teacher_weight,
        center,
        match[0],
        row_weight=match[1],
        student_temp=student_temp,
        teacher_temp=teacher_temp,
    )
