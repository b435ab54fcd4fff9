"""fastdino: fast DINO pretraining (self-distillation with no labels) on the hardware you have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from os import PathLike

__version__ = "0.1.0"


def train(
    out: str | PathLike[str], data: str | PathLike[str], model: str | None = None, **flags: Any
) -> Path:
    """Pretrain ``model`` on the images of ``data``, write everything to ``out`` and return that directory.

    ``model`` is the flag ``arch`` (``"vit_small"``), and ``flags`` are the others of ``train.py``
    (``epochs=100``, ``preset="paper-100"``, ``config="run.yaml"``, ...). Called again, it goes on where the
    run in ``out`` ended. Raises ``fastdino.config.ConfigError`` naming a bad flag before any data is touched.
    """
    from fastdino.config import config_from_flags

    flags |= {} if model is None else {"arch": model}
    config = config_from_flags(data_path=data, output_dir=out, **flags)
    from fastdino.engine.trainer import Trainer

    return Trainer(config).fit()


__all__ = ["__version__", "train"]
