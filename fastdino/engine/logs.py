"""What a run tells: JSON lines for machines, a progress bar or plain lines for people, TensorBoard or W&B
curves.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

import fastdino

_PACKAGES = (
    "torch",
    "triton",
    "xformers",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numpy",
    "safetensors",
)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the JSON lines that are not ``wanted``, and a last one that a crash cut short."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if wanted(json.loads(line)):
                lines.append(line + "\n")
        except ValueError:
            continue
    write_text(path, "".join(lines))


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Replace a file in one step, so that a reader or a crash never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", errors=errors)
    os.replace(temporary, path)


def environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the report. Holds no environment variables and no command line: those may
    carry secrets.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "fastdino": fastdino.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": name,
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def _cpu_name() -> str:
    """With family and model: two generations may share a name, and differ by a factor in 16 bits."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        kind = f"family {facts['cpu family']}, model {facts['model']}"
        return f"{facts['model name']} ({kind}), {os.cpu_count()} cores"
    except (OSError, KeyError):
        pass  # not Linux on x86: the generic name below
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Curves:
    """Scalars for TensorBoard or Weights & Biases; ``none`` writes nothing."""

    def __init__(self, kind: str, directory: Path, config: Mapping[str, Any], purge_step: int):
        self.kind = kind
        self.writer: Any = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(directory / "tb"), purge_step=purge_step)
        elif kind == "wandb":
            import wandb

            self.writer = wandb.init(
                project="fastdino", dir=str(directory), config=dict(config), resume="allow"
            )

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        if self.kind == "tensorboard":
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        elif self.kind == "wandb":
            self.writer.log(dict(scalars), step=step)

    def close(self) -> None:
        if self.kind == "tensorboard":
            self.writer.close()
        elif self.kind == "wandb":
            self.writer.finish()


class Screen:
    """A progress bar on a terminal, one plain line per report elsewhere; silent unless ``enabled``."""

    def __init__(self, total: int, start: int, enabled: bool):
        self.console = Console(quiet=not enabled, soft_wrap=True, highlight=False)
        self.live = self.console.is_terminal and enabled
        self.total = total
        self.pace: float | None = None  # seconds per step, smoothed; evaluations and start-up do not count
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        self.task = self.progress.add_task("train", total=total, completed=start, epoch="-", text="")
        if self.live:
            self.progress.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def show(self, step: int, epoch: int, text: str, seconds_per_step: float) -> None:
        self.pace = seconds_per_step if self.pace is None else 0.8 * self.pace + 0.2 * seconds_per_step
        minutes, seconds = divmod(int(self.pace * (self.total - step)), 60)
        text = f"{text} eta {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        if self.live:
            self.progress.update(self.task, completed=step, epoch=epoch, text=text)
            return
        self.say(f"epoch {epoch} step {step}/{self.total} {text}")
        sys.stdout.flush()

    def close(self) -> None:
        if self.live:
            self.progress.stop()
