"""Methods on one step: DINO, its ablations, and those it is compared with."""

from __future__ import annotations

from collections.abc import Callable

from fastdino.config import Config
from fastdino.methods.byol import BYOL
from fastdino.methods.dino import DINO, ContrastDINO, RegressionDINO
from fastdino.methods.esvit import EsViT, esvit
from fastdino.methods.method import LossOutput, Method
from fastdino.methods.mocov2 import MoCoV2
from fastdino.methods.swav import SwAV

__all__ = ["BYOL", "DINO", "METHODS", "EsViT", "LossOutput", "Method", "MoCoV2", "SwAV", "build_method"]

# By --method, and of dino by --loss.
METHODS: dict[tuple[str, str], Callable[[Config], Method]] = {
    ("dino", "ce"): DINO,
    ("dino", "mse"): RegressionDINO,
    ("dino", "infonce"): ContrastDINO,
    ("esvit", "ce"): esvit,
    ("byol", "ce"): BYOL,
    ("mocov2", "ce"): MoCoV2,
    ("swav", "ce"): SwAV,
}


def build_method(config: Config) -> Method:
    """The method of a validated configuration, with fresh weights."""
    return METHODS[config.method.method, config.method.loss](config)
