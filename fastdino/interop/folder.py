"""Folders of weights, settings and a model card, whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdino.engine.checkpoint import Disk
from fastdino.interop import card, source
from fastdino.interop.files import WeightsError, write_safetensors


def arguments(parser: argparse.ArgumentParser) -> None:
    source.arguments(parser)
    source.image_size_argument(parser)
    card.arguments(parser)


def run(flags: argparse.Namespace, export: Callable[..., None], opened_by: str) -> int:
    """Load and write with ``export``; prints one line, in which ``opened_by`` has PATH for the folder. Raises
    OSError or ValueError naming what is wrong.
    """
    target = Path(flags.target)
    check_target(target)
    export(source.open_source(flags), target, license=flags.license, results=flags.results)
    print(f"{flags.source} -> {flags.target}: {opened_by.replace('PATH', flags.target)}")
    return 0


def check_target(folder: Path) -> None:
    """Raises WeightsError unless ``folder`` can become one: it is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: expected a new or empty folder to write to")


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    card: str,
) -> None:
    """``model.safetensors``, the JSON files ``settings`` by their names, and README.md. Raises OSError or
    WeightsError, and then leaves nothing behind.
    """
    check_target(folder)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        write_safetensors(temporary / "model.safetensors", tensors, metadata)
        for name, content in settings.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        (temporary / "README.md").write_text(card, "utf-8")
        Disk().sync_directory(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    Disk().sync_directory(folder.absolute().parent)
