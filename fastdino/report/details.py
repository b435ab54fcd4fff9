"""What a run was, in figures and commands: its preset, how well it used its machine, files it left out, how
to go on with it.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastdino.config import Config, ConfigError, as_flags, config_to_dict, preset, with_flags
from fastdino.dryrun import flops_per_image
from fastdino.presets import PRESETS
from fastdino.report.run import Run, number

# Flags that say what is trained and how; the others say where.
_SECTIONS = ("model", "loss", "method", "optim", "crops")
_MOST_FILES = 200
# Dense 16-bit operations per second of the data sheets, by a part of the device's name.
_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "V100": 125e12,
}


@dataclass(frozen=True)
class Difference:
    """The preset ("" for the defaults) that has most flags in common with a run, and for each other flag its
    name, the run's value and the preset's.
    """

    name: str
    figure: str
    flags: list[tuple[str, str, str]]


def configuration(run: Run) -> Config | None:
    """Of the run's file, without flags that this release does not know; None if it is no configuration."""
    known = {name: value for name, value in run.config.items() if name in as_flags(Config())}
    try:
        return with_flags(Config(), known) if known else None
    except ConfigError:
        return None


def difference(run: Run) -> Difference | None:
    """None without a configuration."""
    config = configuration(run)
    if config is None:
        return None
    ours = _training_flags(config)
    name, theirs = min(_candidates(), key=lambda one: sum(ours[flag] != one[1][flag] for flag in ours))
    changed = [(flag, text(ours[flag]), text(theirs[flag])) for flag in ours if ours[flag] != theirs[flag]]
    return Difference(name, PRESETS[name].figure if name in PRESETS else "", changed)


@cache
def _candidates() -> list[tuple[str, dict[str, Any]]]:
    """The defaults, then every preset."""
    presets = [(name, with_flags(Config(), preset(name))) for name in PRESETS]
    return [(name, _training_flags(config)) for name, config in [("", Config()), *presets]]


def _training_flags(config: Config) -> dict[str, Any]:
    sections = config_to_dict(config)
    return {name: value for section in _SECTIONS for name, value in sections[section].items()}


def text(value: Any) -> str:
    """A flag's value as it stands on a command line."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(text, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def efficiency(run: Run) -> list[tuple[str, str]]:
    """What and how much: speed, arithmetic per second and its share of the device's peak, peak memory."""
    rows = []
    speeds = sorted(value for value in run.column("img_s") if math.isfinite(value))
    if speeds:
        speed = speeds[len(speeds) // 2]
        rows.append(("Images per second, median", f"{speed:,.0f}"))
        flops = _work(run) * speed
        if math.isfinite(flops):
            rows.append(("Matrix products per second", _flops(flops)))
            peak = peak_flops(run) * max(1.0, number(run.environment.get("processes")))
            if math.isfinite(peak):
                share = f"{100 * flops / peak:.1f} % of {_flops(peak)}"
                rows.append(("Model FLOPs utilisation (MFU)", share))
    memory = [value for value in run.column("memory") if math.isfinite(value)]
    if memory:
        rows.append(("Peak memory of the first process", f"{max(memory) / 1e9:.2f} GB"))
    return rows


def _work(run: Run) -> float:
    """FLOPs of one image's training step; NaN without a configuration that can be trained."""
    config = configuration(run)
    try:
        return math.nan if config is None else flops_per_image(config)
    except (ValueError, ArithmeticError, TypeError):
        return math.nan


def peak_flops(run: Run) -> float:
    """Of one device in 16 bits; NaN if it is not known, or the run computed in fp32."""
    device = str(run.environment.get("device", ""))
    if str(run.environment.get("precision")) not in ("bfloat16", "float16"):
        return math.nan
    return next((peak for name, peak in _PEAKS.items() if all(w in device for w in name.split())), math.nan)


def _flops(value: float) -> str:
    return f"{value / 1e12:,.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:,.1f} GFLOP/s"


def bad_files(run: Run) -> tuple[list[str], int]:
    """The first lines of bad_files.txt and the number of all."""
    try:
        lines = (run.root / "bad_files.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [], 0
    lines = [line for line in lines if line.strip()]
    return [line[:300] for line in lines[:_MOST_FILES]], len(lines)


def commands(run: Run) -> list[tuple[str, str]]:
    """Purpose and command line."""
    root = shlex.quote(str(run.root))
    processes = number(run.environment.get("processes"))
    launch = f"torchrun --nproc_per_node={processes:.0f}" if processes > 1 else "python"
    data = shlex.quote(_labelled(run.config) or "DIR")
    side = number(run.config.get("eval_image_size") or run.config.get("global_crops_size"))
    size = f" --image_size {side:.0f}" if math.isfinite(side) else ""  # that of the run's own figures
    again = f"{launch} train.py --config {root}/config.yaml --output_dir {root} --resume auto"
    found = [("Go on with this run, in the folder it was started from", again)]
    protocols = {
        "k-NN": f"knn --weights {root} --data_path {data}{size}",
        "Linear probe": f"linear --weights {root} --data_path {data}{size} --output_dir {root}/evaluation",
        "Everything the data allow, on one page": f"report --weights {root} --data_path {data}",
    }
    found += [(name, f"python -m fastdino.evaluation {words}") for name, words in protocols.items()]
    targets = {"official": "checkpoint.pth", "hf": "hf/", "timm": "timm/", "onnx": "model.onnx"}
    exports = [f"python -m fastdino.interop {kind} export {root} {to}" for kind, to in targets.items()]
    found.append(("Take the network elsewhere", "\n".join(exports)))
    found.append(("Beside other runs", f"python -m fastdino.report {root} OTHER_RUN"))
    return found


def _labelled(config: dict[str, Any]) -> str | None:
    """The folder with train/ and val/ (or test/) that the run evaluated on, if the configuration tells."""
    held_out, training = config.get("eval_data_path"), config.get("data_path")
    if not isinstance(held_out, str) or not isinstance(training, str):
        return None
    parent = Path(held_out).parent
    if Path(held_out).name in ("val", "test") and parent / "train" == Path(training):
        return str(parent)
    return held_out if Path(held_out, "train").is_dir() else None
