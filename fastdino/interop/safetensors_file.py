"""A backbone as one safetensors file with official names, and where it comes from as metadata: ``format``
(pt) and, as far as known, ``fastdino.version``, ``.config`` (JSON), ``.commit``, ``.step``, ``.images_seen``,
``.images``, ``.image_list`` and ``.source``. Readers do without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Write one safetensors file with official names."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastdino.interop import source

    source.arguments(parser)
    source.image_size_argument(parser)


def run(flags: argparse.Namespace) -> int:
    """Load and write; prints one line. Raises OSError or ValueError naming what is wrong."""
    from fastdino.interop.files import WeightsError, write_safetensors
    from fastdino.interop.source import open_source

    target = Path(flags.target)
    if target.is_dir():
        raise WeightsError(f"{target}: expected a file to write, *.safetensors, got a folder")
    source = open_source(flags)
    write_safetensors(target, source.tensors(), source.facts)
    print(f"{flags.source} -> {target}: {source.name}, {target.stat().st_size / 1e6:.1f} MB")
    return 0
