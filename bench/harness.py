"""What all benchmarks share: providers timed in turns in one run, medians with spread, machine and commit in
the output.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastdino.engine.logs import environment

RESULTS = Path(__file__).parent / "results"


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    providers: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    seconds: float = math.inf,
    turn: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, list[float]]:
    """Seconds per call of each provider; the providers take turns, so that a slow moment of the machine hits
    all of them, and each round begins with another one, so that none always follows the same.

    ``turn(name)`` surrounds a call and is not timed. A round that would end more than ``seconds`` after the
    first one began is not begun; one always is.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    began = time.perf_counter()
    for r in range(-warmup, rounds):
        if r == 0:
            began = time.perf_counter()
        elif r > 0 and (time.perf_counter() - began) * (r + 1) / r > seconds:
            break
        first = r % len(names)
        for name in names[first:] + names[:first]:
            with turn(name):
                start = time.perf_counter()
                providers[name]()
                synchronize()
                taken = time.perf_counter() - start
            if r >= 0:
                times[name].append(taken)
    return times


def summarise(times: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median, minimum, maximum (seconds), and the speed-up over ``baseline`` as the median of the rounds'
    ratios.
    """
    rows = {}
    for name, values in times.items():
        ratios = [b / v for b, v in zip(times[baseline], values, strict=True)]
        rows[name] = {
            "median_s": statistics.median(values),
            "min_s": min(values),
            "max_s": max(values),
            "speedup": statistics.median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
        }
    return rows


class Transcript:
    """Prints lines and remembers them, so that a saved result shows what the run showed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        self.lines += text.splitlines()


def save(claim: str, transcript: Transcript, results: Mapping[str, Any]) -> Path:
    """``<device>/<date>-<claim>.json`` with machine, versions and commit, in bench/results or the folder that
    FASTDINO_RESULTS names. FASTDINO_COMMIT is the commit of a copy without its git history.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name().split()[-1].lower() if device.type == "cuda" else "cpu"
    folder = Path(os.environ.get("FASTDINO_RESULTS") or RESULTS)
    path = folder / name / f"{datetime.date.today()}-{claim}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = environment(1, device)
    machine["commit"] = machine["commit"] or os.environ.get("FASTDINO_COMMIT")
    record = {"claim": claim, "machine": machine, "transcript": transcript.lines, **results}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def table(rows: Mapping[str, Mapping[str, float]], unit: Mapping[str, float] | None = None) -> str:
    """Plain text: provider, median with range, speed-up with range; ``unit`` adds items per second (items per
    call).
    """
    lines = [f"{'provider':28} {'median s':>9} {'min-max':>17} {'speed-up':>9} {'min-max':>13}"]
    for name, row in rows.items():
        text = (
            f"{name:28} {row['median_s']:9.3f} {row['min_s']:8.3f}-{row['max_s']:8.3f} "
            f"{row['speedup']:8.2f}x {row['speedup_min']:6.2f}-{row['speedup_max']:.2f}"
        )
        if unit and name in unit:
            text += f"  {unit[name] / row['median_s']:8.1f} img/s"
        lines.append(text)
    return "\n".join(lines)
