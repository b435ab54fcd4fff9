"""fastdino: fast DINO pretraining (self-distillation with no labels) on the hardware you have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__version__ = "0.1.0"


def train(data: str, out: str, **flags: Any) -> Path:
    """Pretrain on the images of ``data``, write everything to ``out`` and return that directory.

    ``flags`` are those of ``train.py`` (``arch="vit_small"``, ``epochs=100``, ``preset="paper-100"``, ...).
    Raises ``fastdino.config.ConfigError`` naming a bad flag before any data is touched.
    """
    from fastdino.config import config_from_flags

    config = config_from_flags(data_path=data, output_dir=out, **flags)
    from fastdino.engine.trainer import Trainer

    return Trainer(config).fit()


__all__ = ["__version__", "train"]
