"""Fused losses and updates for self-supervised training; needs PyTorch alone, no GPU and no compiler."""

from .adamw_ema import AdamWEMA, AdamWGroup, AdamWScalars, adamw_ema_step_
from .backend import backend, set_backend
from .centered_softmax import centered_softmax
from .dino_loss import dino_loss
from .ema import clip_grad_per_tensor_, ema_update_, grad_square_sums
from .info_nce import info_nce
from .lamb import LAMB
from .lars import LARS
from .multicrop import multicrop
from .normalize_weight import normalize_weight
from .optimizer import StepResult
from .patch_loss import patch_loss
from .prototype_loss import prototype_loss
from .reference import DinoLoss, InfoNCE, MatchedLoss, PrototypeLoss
from .region_loss import RegionMatch, match_regions, region_loss
from .sinkhorn import sinkhorn_center, sinkhorn_knopp, softmax_over_batch
from .soft_cross_entropy import soft_cross_entropy

__all__ = [
    "LAMB",
    "LARS",
    "AdamWEMA",
    "AdamWGroup",
    "AdamWScalars",
    "DinoLoss",
    "InfoNCE",
    "MatchedLoss",
    "PrototypeLoss",
    "RegionMatch",
    "StepResult",
    "adamw_ema_step_",
    "backend",
    "centered_softmax",
    "clip_grad_per_tensor_",
    "dino_loss",
    "ema_update_",
    "grad_square_sums",
    "info_nce",
    "match_regions",
    "multicrop",
    "normalize_weight",
    "patch_loss",
    "prototype_loss",
    "region_loss",
    "set_backend",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "soft_cross_entropy",
    "softmax_over_batch",
]
