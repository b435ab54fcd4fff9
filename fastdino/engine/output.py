"""What may be in an output directory when a run begins. Imports no torch: a mistake is told at once."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastdino.config import Config, ConfigError

# What a run and what is made of it write there, besides hidden files.
_OURS = frozenset(
    "config.yaml environment.json log.txt metrics.jsonl eval.jsonl train.log crops.png report.html "
    "images.json prescan.npz bad_files.txt checkpoints held_out evaluation export tb wandb tracker_id".split()
)
# Where launchers put what the command prints.
_PRINTED = re.compile(r"slurm-.*|nohup\.out|.*\.(out|err|log)")
_SHOWN = 3  # names in a message


def check(config: Config) -> None:
    """Raise ConfigError unless the output directory is new, holds the run that is to be continued, or
    --overwrite is given. Never looks into files.
    """
    run, output = config.run, Path(config.run.output_dir)
    if run.overwrite or not output.is_dir():
        return
    if holds_run(output):
        # Workers that torchrun starts again find what their own run has written.
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if run.resume == "none" and not restarted:
            raise ConfigError(
                "output_dir",
                f"{output} holds a run; --resume auto continues it, --overwrite sets its checkpoints aside "
                "and replaces its logs, or choose another folder",
            )
        return
    official = output / "checkpoint.pth"
    if official.is_file():
        raise ConfigError(
            "output_dir",
            f"expected a new folder or that of a run, {output} is one of the official code; "
            f"python -m fastdino.interop official import {official} NEW_RUN makes a run that goes on there",
        )
    strange = foreign(output, [config.data.data_path, config.eval.eval_data_path])
    if strange:
        names = ", ".join(strange[:_SHOWN]) + (", ..." if len(strange) > _SHOWN else "")
        raise ConfigError(
            "output_dir",
            f"expected a new folder or that of a run, {output} holds {names}; choose another folder (that of "
            "a run, to --resume it), or --overwrite to write into this one",
        )


def holds_run(output: Path) -> bool:
    """Whether a run has got as far as its first step there."""
    begun = (output / "config.yaml").is_file() and (output / "environment.json").is_file()
    return begun or any((output / "checkpoints").glob("step-*"))


def foreign(output: Path, data: list[str | None]) -> list[str]:
    """Names in a directory that no run writes; folders in which ``data`` lies do not count."""
    inside = output.resolve()
    homes = {
        path.relative_to(inside).parts[0]
        for path in (Path(text).resolve() for text in data if text)
        if path != inside and path.is_relative_to(inside)
    }
    return sorted(
        name
        for name in os.listdir(output)
        if not (name.startswith(".") or name in _OURS | homes or _PRINTED.fullmatch(name))
    )
