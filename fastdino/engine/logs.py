"""What a run tells: JSON lines for machines, a progress bar or plain lines for people."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    """Append one JSON line; numbers that are not finite, which JSON does not know, become null."""
    with _naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(record), allow_nan=False) + "\n")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A write that fails does not know its file: its error gets the name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    with _naming(path):
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


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes so far: of this process's tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes on Linux


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


class Screen:
    """What people see of a run: a progress bar on a terminal, elsewhere plain lines, few enough for a file.

    Silent unless ``enabled``. The plain lines also go to the file ``log``, to which a continued run appends,
    and with them the warnings of the package's loggers.
    """

    FIRST = 3  # reports shown at once; later ones wait until INTERVAL seconds have passed
    INTERVAL = 10.0

    def __init__(self, total: int, start: int, enabled: bool, log: Path | None = None):
        terminal = sys.stdout.isatty()
        self.console = Console(
            quiet=not enabled, soft_wrap=True, highlight=False, force_terminal=terminal, no_color=not terminal
        )
        self.live = enabled and terminal and not self.console.is_dumb_terminal
        self.total = total
        self.pace: float | None = None  # seconds per step, smoothed; evaluations and start-up do not count
        self.reports, self.reported = 0, -math.inf
        self.ticks: tuple[int, float] | None = None  # the first step that ended and when
        self.ticked = time.monotonic()
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        self.task = self.progress.add_task("train", total=total, completed=start, epoch="-", text="")
        self.log = log if enabled and not _is_standard_output(log) else None
        if self.log is not None and start == 0:
            write_text(self.log, "")
        self.handler = _Told(self._write)
        logging.getLogger("fastdino").addHandler(self.handler)
        if self.live:
            self.progress.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
        self._write(text)

    def show(self, step: int, epoch: int, text: str, seconds_per_step: float) -> None:
        """Report on a step; ``text`` is one line."""
        self.pace = seconds_per_step if self.pace is None else 0.8 * self.pace + 0.2 * seconds_per_step
        text = f"{text} eta {self._eta(step, self.pace)}"
        if self.live:
            self.progress.update(self.task, completed=step, epoch=epoch, text=text)
        now = time.monotonic()
        if self.reports >= self.FIRST and now - self.reported < self.INTERVAL and step < self.total:
            return
        self.reports, self.reported = self.reports + 1, now
        line = f"epoch {epoch} step {step}/{self.total} {text}"
        if not self.live:
            self.console.print(line, markup=False)
            sys.stdout.flush()
        self._write(line)

    def tick(self, step: int) -> None:
        """A step has ended. Where they are slow this says how slow, before :meth:`show` has more to say."""
        now = time.monotonic()
        first, since = self.ticks = self.ticks or (step, now)
        if self.pace is not None or now - self.ticked < self.INTERVAL:
            return
        self.ticked = now
        text = "the first steps"
        if step > first:
            pace = (now - since) / (step - first)
            text = f"{pace:.1f} s per step eta {self._eta(step, pace)}"
        if self.live:
            self.progress.update(self.task, completed=step, text=text)
        else:
            self.console.print(f"step {step}/{self.total} {text}", markup=False)
            sys.stdout.flush()

    def _eta(self, step: int, pace: float) -> str:
        minutes, seconds = divmod(int(pace * (self.total - step)), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    def close(self) -> None:
        logging.getLogger("fastdino").removeHandler(self.handler)
        if self.live:
            self.progress.stop()

    def _write(self, text: str) -> None:
        if self.log is not None:
            with _naming(self.log), open(self.log, "a", encoding="utf-8", errors="replace") as file:
                file.write(text + "\n")


class _Told(logging.Handler):
    """Passes records on as text."""

    def __init__(self, tell: Callable[[str], None]):
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(self.format(record))


def _is_standard_output(path: Path | None) -> bool:
    """Whether a shell has already sent what is printed to the file ``path``."""
    try:
        return path is not None and os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # no such file, or standard output is no file
        return False
