"""The loss of iBOT and DINOv2 on masked patches: each student patch meets the same patch of the teacher.

    loss = sum_r w_r ( - sum_k p_rk log softmax(x_r)_k ),   p, x as in matched_loss.py

over the R masked patches of a batch, already selected from both networks' outputs, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matched_loss import matched_loss
from .reference import MatchedLoss
from .validate import check_tensor


def patch_loss(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    *,
    row_weight: Tensor | None = None,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> MatchedLoss:
    """Cross-entropy of row ``r`` of the teacher with row ``r`` of the student (Zhou et al. 2022, eq. 2).

    Args:
        student_z: bottleneck features of the masked patches [R, D], R >= 1; fp32, bf16, fp16 or float64.
        student_weight: effective prototype weights [K, D].
        teacher_z, teacher_weight: [R, D] of the same patches, and [K, D]; must not require grad.
        center: [K] of the patches, as it was before this step's update.
        row_weight: [R], or None for 1 / R each. iBOT and DINOv2 take the mean over a view's masked patches,
            then over all views that were masked or might have been, G * B of them:
            1 / (G * B * number of masked patches of the view that r belongs to).
        student_temp, teacher_temp: numbers > 0, or 0-dim tensors.

    Returns:
        MatchedLoss of fp32 tensors (float64 for float64 features and weights); ``loss`` is differentiable in
        ``student_z`` and ``student_weight``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_tensor("student_z", student_z, ("R", "D"))
    check_tensor("teacher_z", teacher_z, tuple(student_z.shape), like=student_z)
    return matched_loss(
        student_z,
        student_weight,
        teacher_z,
        teacher_weight,
        center,
        torch.arange(student_z.shape[0], device=student_z.device)[:, None],
        row_weight=row_weight,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
    )
