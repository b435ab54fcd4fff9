"""Fused losses and updates for self-supervised training; needs PyTorch alone, no GPU and no compiler."""

from .adamw_ema import AdamWEMA, StepResult
from .backend import backend, set_backend
from .dino_loss import dino_loss
from .ema import clip_grad_per_tensor_, ema_update_
from .lars import LARS
from .multicrop import multicrop
from .normalize_weight import normalize_weight
from .prototype_loss import prototype_loss
from .reference import DinoLoss, PrototypeLoss

__all__ = [
    "LARS",
    "AdamWEMA",
    "DinoLoss",
    "PrototypeLoss",
    "StepResult",
    "backend",
    "clip_grad_per_tensor_",
    "dino_loss",
    "ema_update_",
    "multicrop",
    "normalize_weight",
    "prototype_loss",
    "set_backend",
]
