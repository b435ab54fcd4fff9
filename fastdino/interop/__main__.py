"""Weights in and out: ``python -m fastdino.interop FORMAT export SOURCE TARGET`` and ``... import ...``.

``export`` writes any source (a run or checkpoint, an official ``.pth``, ``.safetensors``, a folder of timm or
transformers) in a format; ``import`` makes a run directory of one. Formats are modules with ``HELP``,
``add_arguments(parser)`` of the export and ``run(flags)``; only the chosen one is loaded.
"""

from __future__ import annotations

import argparse
import importlib
import sys

FORMATS = {
    "timm": ("timm", "folder for timm, which transformers' AutoModel opens too"),
    "hf": ("hf", "folder for transformers: ViTModel, processor"),
    "safetensors": ("safetensors_file", "one file with official names"),
    "official": ("official", "training files of the official code and EsViT's, which continue either way"),
    "onnx": ("onnx", "one ONNX file for any batch and image size (export only)"),
}


def main(words: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 (official: 1) after one line about a flag or a file."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["official"]:
        from fastdino.interop import official

        return official.main(words[1:])
    flags = parser(words[0] if words else None).parse_args(words)
    try:
        return flags.run(flags)
    except (OSError, ValueError) as error:
        print(f"python -m fastdino.interop {flags.format} {flags.command}: {error}", file=sys.stderr)
        return 2


def parser(chosen: str | None) -> argparse.ArgumentParser:
    """Of all formats; the flags of the ``chosen`` one alone, for they need torch."""
    parser = argparse.ArgumentParser(prog="python -m fastdino.interop", description=__doc__.split("\n")[0])
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, (module, text) in FORMATS.items():
        commands = formats.add_parser(name, help=text).add_subparsers(dest="command", required=True)
        if name == chosen:
            _add(commands, "export", module)
            if name != "onnx":
                _add(commands, "import", "start")
    return parser


def _add(commands: argparse._SubParsersAction[argparse.ArgumentParser], command: str, module: str) -> None:
    code = importlib.import_module(f"fastdino.interop.{module}")
    added = commands.add_parser(command, help=code.HELP, description=code.HELP)
    code.add_arguments(added)
    added.set_defaults(run=code.run)


if __name__ == "__main__":
    sys.exit(main())
