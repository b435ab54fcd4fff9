"""Evaluation of any checkpoint: ``python -m fastdino.evaluation PROTOCOL --weights PATH ...``.

Flags carry the names of the official scripts. Protocols are the files of `commands/`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time

from fastdino.evaluation.command import finish, first

PROTOCOLS = (
    "knn",
    "linear",
    "logistic",
    "finetune",
    "attention",
    "jaccard",
    "pca",
    "neighbours",
    "tsne",
    "collapse",
    "throughput",
    "retrieval",
    "copydetection",
    "davis",
    "report",
)

ON_ONE_PROCESS = ("attention", "jaccard", "pca", "collapse", "throughput")
"""Under torchrun the first process does these, the others have nothing to do. The rest share the images."""


def main(arguments: list[str] | None = None) -> int:
    """Run one evaluation; the exit code is 0, or 2 after a one-line message about a flag or a file."""
    words = sys.argv[1:] if arguments is None else arguments
    flags = parser().parse_args(words)
    try:
        run(flags, words)
    except (OSError, ValueError) as error:
        from fastdino.data.remote import without_secrets

        message = f"python -m fastdino.evaluation {flags.protocol}: {error}"
        print(without_secrets(message), file=sys.stderr)
        return 2
    if "WORLD_SIZE" in os.environ:
        from fastdino.engine import parallel

        parallel.after_main()  # which may be drawing still
        parallel.stop()
    return 0


def run(flags: argparse.Namespace, words: list[str]) -> None:
    """Run the protocol that ``words`` name, of which ``flags`` were read, and say what it measured."""
    if flags.protocol in ON_ONE_PROCESS and not first():
        return
    started = time.monotonic()
    result = flags.run(flags)
    if first():
        finish(flags.protocol, result, flags, words[1:], time.monotonic() - started)


def parser() -> argparse.ArgumentParser:
    """Of all protocols."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdino.evaluation",
        description="Evaluate a backbone. Under torchrun the protocols that read many images share the work.",
    )
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    for name in PROTOCOLS:
        command = importlib.import_module(f"fastdino.evaluation.commands.{name}")
        protocol = protocols.add_parser(name, help=command.HELP, description=command.HELP)
        protocol.set_defaults(run=command.run)
        command.add_arguments(protocol)
    return parser


if __name__ == "__main__":
    sys.exit(main())
