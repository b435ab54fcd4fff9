"""What the evaluation commands share: flags of the backbone, progress, results on screen and on disk.

A command is a file in `commands/`: ``HELP`` (one line), ``add_arguments(parser)`` and ``run(flags) ->
Result``. Nothing heavy is imported before the flags are understood, so imports of torch stand in ``run``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastdino.engine.parallel import World
    from fastdino.models import Backbone, VisionTransformer

T = TypeVar("T")


@dataclass
class Result:
    """What one protocol measured on one network."""

    figures: dict[str, float]
    """Name -> value, accuracies and overlaps in percent. Names are stable: reports find them by name."""
    lines: list[str]
    """What is printed."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the figures depend on besides weights and data: image size, threshold, ..."""
    pictures: dict[str, str] = field(default_factory=dict)
    """File below the output folder -> caption."""
    details: dict[str, Any] = field(default_factory=dict)
    """More of it, as JSON: figures per class or sequence, curves."""


def finish(
    protocol: str, result: Result, flags: argparse.Namespace, words: list[str], seconds: float
) -> None:
    """Print a result and, where there is an output folder, write it to ``<protocol>.json`` there, or, of a
    named data set, to ``<protocol>.<dataset>.json``.
    """
    for line in result.lines:
        print(line)
    output = getattr(flags, "output_dir", None)
    if output is None:
        return
    from fastdino.engine.logs import environment

    record = {
        "protocol": protocol,
        **{key: value for key, value in asdict(result).items() if key != "lines"},
        "network": getattr(flags, "network", None),
        "weights": getattr(flags, "weights", None),
        "data_path": getattr(flags, "data_path", None),
        "command": written_as([protocol, *words]),
        "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
        "environment": environment(int(os.environ.get("WORLD_SIZE", "1")), device(flags)),
    }
    dataset = result.settings.get("dataset")
    write_json(Path(output) / f"{protocol}{f'.{dataset}' if dataset else ''}.json", record)


def written_as(words: list[str]) -> str:
    """The command line of a protocol and its flags."""
    from fastdino.data.remote import scrubbed

    return shlex.join(["python", "-m", "fastdino.evaluation", *scrubbed(words)])


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all, and the folders above it."""
    from fastdino.data.remote import scrubbed
    from fastdino.engine.logs import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(scrubbed(content), indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------ flags


def backbone_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The flags that choose a network, or ``several``, and where it runs; `backbone` reads them."""
    group = parser.add_argument_group("backbone")
    group.add_argument(
        "--weights",
        "--pretrained_weights",
        metavar="PATH",
        nargs="+" if several else None,
        help="run or checkpoint directory, official .pth, .safetensors, or a folder of timm or transformers; "
        "'random' is untrained",
    )
    group.add_argument("--arch", help="architecture, where the file does not say it (vit_small, ...)")
    group.add_argument(
        "--patch_size", type=positive, help="patch side in pixels, where the file does not say it"
    )
    group.add_argument(
        "--checkpoint_key",
        default="auto",
        help="teacher or student; default auto: the teacher, the student of BYOL, MoCo-v2 and SwAV",
    )
    device_argument(group)
    for ignored in ("--dist_url", "--local_rank", "--local-rank"):
        group.add_argument(ignored, help=argparse.SUPPRESS)


def device_argument(parser: Any) -> None:
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: CUDA where there is"
    )


def cuda_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """The official --use_cuda: where to do ``what`` is done with the features."""
    parser.add_argument(
        "--use_cuda",
        type=boolean,
        default=True,
        help=f"{what} on the GPU where there is one (default: true)",
    )


def output_argument(parser: argparse.ArgumentParser, default: str | None = None, keeps: str = "") -> None:
    """--output_dir: where `finish` writes the result and the command its pictures, and what it ``keeps``."""
    where = "the result is not written" if default is None else default
    parser.add_argument(
        "--output_dir", metavar="DIR", default=default, help=f"{keeps and f'keeps {keeps}; '}default: {where}"
    )


def loading_arguments(parser: argparse.ArgumentParser, batch_size: int = 128) -> None:
    """Flags of commands that extract features."""
    parser.add_argument(
        "--batch_size_per_gpu", type=positive, default=batch_size, help=f"default: {batch_size} images"
    )
    parser.add_argument("--num_workers", type=int, default=0, help="decoding threads (default: one per core)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="of the backbone; auto is the fastest 16-bit type that the hardware has",
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text}")
    return value


def boolean(text: str) -> bool:
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text}")


# ----------------------------------------------------------------------------------------------- what it uses


def world(flags: argparse.Namespace) -> World:
    """This process among those that torchrun started, or the only one."""
    from fastdino.engine import parallel

    return parallel.start(flags.device)


def device(flags: argparse.Namespace) -> torch.device:
    from fastdino.engine import parallel

    return parallel.device_of(flags.device)


def precision(flags: argparse.Namespace) -> torch.dtype:
    """The type of --precision."""
    from fastdino.engine.build import hardware_dtype

    return hardware_dtype(flags.precision, device(flags))


def precision_name(flags: argparse.Namespace) -> str:
    """The same in words, for settings."""
    return str(precision(flags)).removeprefix("torch.")


def backbone(flags: argparse.Namespace) -> Backbone:
    """The network of --weights, in evaluation mode on its device."""
    if flags.weights is None or isinstance(flags.weights, str) and not flags.weights:
        raise ValueError(
            "--weights is required (run directory, checkpoint directory, official .pth file, or 'random')"
        )
    import torch

    network: Any
    if isinstance(flags.weights, torch.nn.Module):  # see `fastdino.evaluation.evaluate`
        network = flags.weights
    elif flags.weights == "random":
        from fastdino.config import ModelConfig
        from fastdino.models import build_backbone

        torch.manual_seed(0)
        network = build_backbone(
            ModelConfig(arch=flags.arch or "vit_small", patch_size=flags.patch_size or 16)
        )
    else:
        from fastdino.engine.checkpoint import CheckpointError
        from fastdino.interop.weights import load_backbone

        try:
            network = load_backbone(
                flags.weights, arch=flags.arch, patch_size=flags.patch_size, key=flags.checkpoint_key
            )
        except CheckpointError as error:
            raise ValueError(f"--weights: {error}") from error
    flags.network = {
        "name": network_name(network),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    return network.to(device(flags)).eval()


def vision_transformer(flags: argparse.Namespace, of_which: str) -> VisionTransformer:
    """The network of --weights; ValueError unless it has a [CLS] token and patch tokens, ``of_which`` this
    protocol needs something.
    """
    from fastdino.models import VisionTransformer

    network = backbone(flags)
    if not isinstance(network, VisionTransformer):
        raise ValueError(f"--weights: expected a vision transformer, {of_which}, got {network_name(network)}")
    return network


def network_name(network: nn.Module) -> str:
    """What the network is called in tables: vit_small/16, resnet50, ..., or its class for one of no name."""
    from fastdino.config import ARCHITECTURES

    if getattr(network, "name", None):
        return str(network.name)
    shape = tuple(getattr(network, side, None) for side in ("embed_dim", "depth", "num_heads"))
    if None in shape:
        return type(network).__name__
    named = [name for name, known in ARCHITECTURES.items() if tuple(known) == shape]
    patch = getattr(network, "patch_size", None)
    name = named[0] if named else f"ViT {shape[0]}x{shape[1]}"
    return f"{name}/{patch}" if patch else name


def extract(
    flags: argparse.Namespace, network: nn.Module, paths: Sequence[str], text: str, **more: Any
) -> torch.Tensor:
    """Features [len(paths), D] as the flags of `loading_arguments` and --image_size say, under a bar that
    shows ``text``; ``more`` goes to `extract_features`.
    """
    from fastdino.evaluation.features import extract_features

    with progress(text) as bar:
        return extract_features(
            network,
            paths,
            image_size=flags.image_size,
            device=device(flags),
            batch_size=flags.batch_size_per_gpu,
            num_threads=flags.num_workers,
            dtype=precision(flags),
            progress=bar,
            **more,
        )


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items at equal distances, or all of fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal of the first process; elsewhere nothing. Call it with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (console.is_terminal and first())) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
