from __future__ import annotations

from torch import Tensor

from . import reference
from .reference import PrototypeLoss
from .validate import check_no_grad, check_temperature, check_tensor, check_views


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
    """The DINO loss of bottleneck features and prototype weights; see :func:`fastdino_kernels.reference.prototype_loss`."""
    check_tensor("student_z", student_z, ("V*B", "D"))
    d = student_z.shape[1]
    check_tensor("student_weight", student_weight, ("K", d), like=student_z)
    k = student_weight.shape[0]
    check_tensor("teacher_z", teacher_z, ("G*B", d), like=student_z)
    check_tensor("teacher_weight", teacher_weight, (k, d), like=student_z)
    check_tensor("center", center, (k,), like=student_z)
    check_no_grad("teacher_z", teacher_z)
    check_no_grad("teacher_weight", teacher_weight)
    check_temperature("student_temp", student_temp)
    check_temperature("teacher_temp", teacher_temp)
    check_views("student_z", student_z.shape[0], "teacher_z", teacher_z.shape[0], n_global)
    return reference.prototype_loss(
        student_z, student_weight, teacher_z, teacher_weight, center,
        student_temp=student_temp, teacher_temp=teacher_temp, n_global=n_global,
    )  # fmt: skip
