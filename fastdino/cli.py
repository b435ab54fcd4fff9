"""The command line of ``train.py``: tyro over the dataclasses of ``config.py``. Imports no torch."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import signal
import sys
import textwrap
import types
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fastdino.config import Config, ConfigError, config_to_yaml, convert, layered, validate
from fastdino.data.remote import is_url, without_secrets
from fastdino.presets import PRESETS

# Flags of scripts beside main_dino.py, and what does their work here.
_ELSEWHERE = {
    "--pretrained_weights": "python -m fastdino.evaluation PROTOCOL --weights FILE evaluates a network, "
    "python -m fastdino.interop safetensors import FILE RUN begins a run with it",
    **dict.fromkeys(
        ("--ngpus", "--nodes", "--timeout", "--partition", "--use_volta32", "--comment"),
        "torchrun --nproc_per_node=GPUS --nnodes=NODES train.py ..., under SLURM as in fastdino/RECIPES.md",
    ),
}

_DESCRIPTION = """\
Pretrain a vision transformer with DINO on a folder of images.

  python train.py --data_path photos/ --output_dir runs/photos
  torchrun --nproc_per_node=8 train.py --preset paper-100 --data_path imagenet/train --output_dir runs/p

Order: preset, then YAML file, then flags. Booleans take true/false, on/off, 1/0, or nothing for true."""


@dataclass
class Actions:
    """Start here."""

    preset: str | None = None
    """Named set of flags, see --list_presets (or --preset list)."""
    config: str | None = None
    """YAML file of flags, for instance the config.yaml of another run."""
    list_presets: bool = False
    """Print the presets, what they change and the paper's figures, and exit."""
    print_config: bool = False
    """Print all flags as YAML for --config and exit."""
    dry_run: bool = False
    """Check flags and data, print model size, FLOPs, steps and estimated memory, and exit."""
    preview_crops: int = 0
    """Write a contact sheet of the exact crops of this many images and exit."""


@dataclass
class _Line(Config):
    start: Actions = field(default_factory=Actions)


def parse(argv: Sequence[str]) -> tuple[Config, Actions]:
    """The validated configuration and what to do with it.

    ``--help``, ``--list_presets`` and ``--print_config`` print and exit with 0; a bad flag prints one message
    naming it and exits with 2, before any data is touched.
    """
    layers = ArgumentParser(add_help=False, allow_abbrev=False)
    layers.add_argument("--preset", nargs="?")
    layers.add_argument("--config", nargs="?")
    chosen, _ = layers.parse_known_args(argv)
    argv = ["--logger" + word[5:] if word == "--log" or word.startswith("--log=") else word for word in argv]
    for word in argv:
        if word.partition("=")[0] in _ELSEWHERE:
            fail(f"{word}: no flag of train.py; {_ELSEWHERE[word.partition('=')[0]]}")
    if chosen.preset == "list":
        _print_and_stop(presets_table())
    try:
        base = layered(chosen.preset, chosen.config)
        line = tyro.cli(
            _Line,
            prog="train.py",
            description=_DESCRIPTION,
            args=list(argv),
            default=_Line(**_sections(base), start=Actions()),
            use_underscores=True,
            console_outputs=_first_process(),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
            registry=_registry(),
        )
        config = Config(**_sections(line))
        if line.start.list_presets:
            _print_and_stop(presets_table())
        if line.start.preview_crops < 0:
            raise ConfigError("preview_crops", f"expected a number >= 0, got {line.start.preview_crops}")
        validate(config)
    except ConfigError as error:
        fail(str(error))
    if line.start.print_config:
        _print_and_stop(config_to_yaml(config).rstrip())
    return config, line.start


def main(argv: Sequence[str]) -> int:
    """Parse ``argv`` and train, or do what an action flag asks for. Returns the exit code."""
    config, actions = parse(argv)
    _show_log()
    if actions.dry_run or actions.preview_crops:
        return _without_training(config, actions)
    from fastdino.engine import exits, lock, output

    directory = Path(config.run.output_dir)
    try:
        output.check(config)
        if _first_process():
            lock.take(directory)  # before torch is imported: the second of two runs is told at once
    except ValueError as error:
        fail(str(error))
    except lock.OutputError as error:
        fail(str(error), code=exits.OUTPUT)
    from fastdino.data.decoding import TooManyUnreadable
    from fastdino.engine.checkpoint import CheckpointError, NotFiniteError
    from fastdino.engine.repeat import UnequalError
    from fastdino.engine.trainer import Stopped, Trainer

    try:
        trainer = Trainer(config)
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        code = exits.DISK if _is_of(directory, error) else exits.USAGE
        fail(str(error), first_only=False, code=code)
    try:
        trainer.fit()
    except Stopped:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # once more is heard no more: the exit code is decided
        raise
    except OSError as error:
        if not _is_of(directory, error):
            raise
        fail(f"{error}; the same command continues", first_only=False, code=exits.DISK)
    except NotFiniteError as error:
        fail(str(error), first_only=False, code=exits.NOT_FINITE)
    except UnequalError as error:
        fail(str(error), first_only=False, code=exits.UNEQUAL)
    except TooManyUnreadable as error:
        fail(f"{error}\nthe same command continues", first_only=False, code=exits.DATA)
    return exits.DONE


def _is_of(directory: Path, error: Exception) -> bool:
    """Whether ``error`` came from writing a run's directory."""
    if not isinstance(error, OSError):
        return False
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # reading data gives none of these
        return True
    return isinstance(error.filename, str) and Path(error.filename).is_relative_to(directory)


class _Stderr(logging.Handler):
    """Plain lines on what is standard error at that time: progress bars take its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _show_log() -> None:
    """Show what the first process logs, and the warnings of the others unless every process has them."""
    rank = os.environ.get("RANK", "0")
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == "0" else f"process {rank}: %(message)s"))
    log = logging.getLogger("fastdino")
    log.handlers = [handler]
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    for module in ("manifest", "prescan"):  # these every process has
        logging.getLogger(f"fastdino.data.{module}").setLevel(
            logging.NOTSET if rank == "0" else logging.ERROR
        )


def _without_training(config: Config, actions: Actions) -> int:
    from rich.console import Console

    from fastdino.config import launched_processes
    from fastdino.data.manifest import build_manifest
    from fastdino.dryrun import estimate, table

    manifest = None
    # The default of --data_path is a placeholder: without data, a dry run is a question about the model.
    if actions.preview_crops or config.data.data_path != Config().data.data_path:
        try:
            manifest = build_manifest(config.data.data_path)
        except (ValueError, OSError, ImportError) as error:
            fail(str(error))
        held_out = config.eval.eval_data_path
        if held_out is not None and not is_url(held_out) and not os.path.exists(held_out):
            fail(f"--eval_data_path: no such file or folder: {held_out}")
    if actions.dry_run:
        result = estimate(config, None if manifest is None else len(manifest), launched_processes())
        if result.steps_per_epoch == 0:
            fail(f"--data_path {config.data.data_path}: fewer images than a batch of {result.global_batch}")
        Console(width=None if sys.stdout.isatty() else 110).print(table(result, config))
    if manifest is not None and actions.preview_crops:
        path = Path(config.run.output_dir) / "crops.png"
        try:
            from fastdino.data.preview import contact_sheet

            path.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(manifest, config.crops, config.run.seed, actions.preview_crops, path)
        except (ImportError, OSError, RuntimeError) as error:
            fail(str(error))
        print(path)
    return 0


def fail(message: str, *, first_only: bool = True, code: int = 2) -> NoReturn:
    """Print one line and exit with ``code``; ``first_only`` for what is wrong in every process alike."""
    if _first_process() or not first_only:
        print(f"train.py: error: {without_secrets(message)}", file=sys.stderr)
    sys.exit(code)


def presets_table() -> str:
    """Every preset: the paper's figure, the preset it is made of, if any, and the flags it changes there."""
    parts = []
    for name, preset in PRESETS.items():
        base = [] if preset.base is None else [f"--preset {preset.base}"]
        changes = [f"--{flag} {_words(value)}" for flag, value in preset.delta.items()]
        lines = textwrap.wrap(" ".join(base + changes), 96, break_on_hyphens=False)
        parts.append("\n    ".join([name, preset.figure, *lines]))
    return "\n".join(parts)


def _print_and_stop(text: str) -> NoReturn:
    if _first_process():
        print(text)
    sys.exit(0)


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _sections(config: Config) -> dict[str, Any]:
    return {section.name: getattr(config, section.name) for section in dataclasses.fields(Config)}


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_words(word) for word in value)
    return str(value).lower() if isinstance(value, bool) or value is None else f"{value}"


def _registry() -> ConstructorRegistry:
    """Booleans and optional values go through the converter of config.py, as they do in YAML."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kind: Any = info.type
        if kind is bool:
            return PrimitiveConstructorSpec(
                nargs=(0, 1),
                metavar="BOOL",
                instance_from_str=lambda words: convert(words[0], bool) if words else True,
                is_instance=lambda value: isinstance(value, bool),
                str_from_instance=lambda value: [_words(value)],
            )
        if get_origin(kind) in (Union, types.UnionType):
            return PrimitiveConstructorSpec(
                nargs=1,
                metavar=get_args(kind)[0].__name__.upper(),
                instance_from_str=lambda words: convert(words[0], kind),
                is_instance=lambda value: value is None or isinstance(value, get_args(kind)[0]),
                str_from_instance=lambda value: [_words(value)],
            )
        return None

    return registry
