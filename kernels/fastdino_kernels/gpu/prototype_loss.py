"""Which form of the fused prototype loss runs on a GPU: ``flash`` or ``chunked``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import gemm_dtype
from .prototype_chunked import prototype_loss_chunked
from .prototype_flash import prototype_loss_flash, supports

FORM = "auto"  # tests and benchmarks set it: "auto", "flash" or "chunked"


def choose_form(capability: int, d: int, dtype: torch.dtype) -> str:
    """``flash`` or ``chunked`` for GEMMs in ``dtype`` over prototypes of width ``d``.

    Not a measured table yet: flash wherever its kernels are meant to run.
    """
    if FORM != "auto":
        return FORM
    return "flash" if supports(d, dtype, capability) else "chunked"


def _capability(device: torch.device) -> int:
    """80 for compute capability 8.0; 0 for the CPU under Triton's interpreter."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def prototype_loss(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    n_global: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, batch center, teacher entropy, of checked arguments."""
    tensors = (student_z, student_weight, teacher_z, teacher_weight)
    capability = _capability(student_z.device)
    dtype = gemm_dtype(*tensors)
    if dtype == torch.bfloat16 and 0 < capability < 80:  # which has no such products
        dtype = torch.float32
    if choose_form(capability, student_weight.shape[1], dtype) == "chunked":
        return prototype_loss_chunked(*tensors, center, student_temp, teacher_temp, n_global, dtype)
    z, w, y, v = (x.to(dtype) for x in tensors)
    return prototype_loss_flash(z, w, y, v, center, student_temp, teacher_temp, n_global)
