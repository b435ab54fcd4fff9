"""The teacher's targets as a tensor: ``softmax((logits - center) / temp)`` of every row, in fp32.

For interfaces that pass probabilities on; :func:`fastdino_kernels.dino_loss` and its relatives take the
teacher's logits and never write the targets. The kernels are those that write Sinkhorn-Knopp's targets
(sinkhorn.py), whose scaling of the prototypes is a center.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import sinkhorn
from .validate import check_temperature, check_tensor


@torch.no_grad()
def centered_softmax(logits: Tensor, center: Tensor, *, temp: float | Tensor) -> Tensor:
    """``softmax((logits - center) / temp)`` (Caron et al. 2021, equation 1 with the center of section 3.1).

    Args:
        logits: of the teacher [R, K]; fp32, bf16, fp16 or float64.
        center: [K].
        temp: number > 0, or 0-dim tensor.

    Returns:
        [R, K] fp32 (float64 for float64 logits), not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_tensor("logits", logits, ("R", "K"))
    check_tensor("center", center, (logits.shape[1],), like=logits)
    check_temperature("temp", temp, targets=True)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    form, logits, temp = sinkhorn.prepare(logits, temp)
    # To the kernels -inf is a prototype that no sample admits; as a center it is an error, which must show.
    c = (center.double() / temp.double()).masked_fill(center == -torch.inf, torch.nan)
    return form.targets(logits, temp, c, dtype)
