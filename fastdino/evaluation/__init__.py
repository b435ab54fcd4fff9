"""What a backbone has learned: one file per protocol, and one per command line in `commands`.

``python -m fastdino.evaluation --help`` is the command line, :func:`evaluate` the same from Python, on a
network in memory too. The files hold the parts: `features` turns images into feature vectors, `knn`
classifies by nearest neighbours, `linear`, `logistic` and `finetune` train, `retrieval`, `copy_detection` and
`davis` score the benchmarks, `attention`, `jaccard`, `pca`, `neighbours`, `tsne` and `collapse` draw.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import nn

    from fastdino.evaluation.command import Result


def evaluate(protocol: str, network: nn.Module | str | None = None, **flags: Any) -> Result:
    """Run a protocol (knn, linear, ...) on a network, or on the ``--weights`` that a text names.

    ``flags`` are those of the command line with their names, lists for flags of several values:
    ``evaluate("knn", backbone, data_path="imagenet", nb_knn=[10, 20]).figures["top1_k20"]``. A network maps
    images [B, 3, H, W] to features [B, D]; it is copied, never changed. Pictures go to ``output_dir``, but no
    ``<protocol>.json`` is written. Raises ValueError or OSError, naming the flag or the file.
    """
    from fastdino.evaluation.__main__ import PROTOCOLS

    known = [name for name in PROTOCOLS if name != "report"]
    if protocol not in known:
        raise ValueError(f"protocol: expected one of {', '.join(known)}, got {protocol!r}")
    command = importlib.import_module(f"fastdino.evaluation.commands.{protocol}")
    parser = _Parser(prog=protocol, add_help=False)
    command.add_arguments(parser)
    read = parser.parse_args([word for flag in flags.items() for word in _words(parser, *flag)])
    read.protocol = protocol
    if network is not None:
        read.weights = network if isinstance(network, str) else copy.deepcopy(network)
    return command.run(read)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


def _words(parser: argparse.ArgumentParser, name: str, value: Any) -> list[str]:
    """The words of a flag on a command line."""
    action = parser._option_string_actions.get(f"--{name}")
    if action is None:
        raise ValueError(f"{parser.prog}: no flag --{name}")
    if action.nargs == 0 or value is None:  # a flag without value, or one that is left at its default
        return [f"--{name}"] if value else []
    return [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
