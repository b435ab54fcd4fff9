from __future__ import annotations

from torch import Tensor

from . import reference
from .validate import check_tensor


def normalize_weight(weight_v: Tensor, weight_g: Tensor) -> Tensor:
    """Weight normalisation by rows: ``g_k v_k / |v_k|``; weight_v [K, D], weight_g [K, 1] -> [K, D]."""
    check_tensor("weight_v", weight_v, ("K", "D"))
    check_tensor("weight_g", weight_g, (weight_v.shape[0], 1), like=weight_v)
    return reference.normalize_weight(weight_v, weight_g)
