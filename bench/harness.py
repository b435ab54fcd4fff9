"""What all benchmarks share: providers timed in turns in one run, medians with spread, machine and commit in
the output.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastdino.engine.logs import environment

RESULTS = Path(__file__).parent / "results"


def interleave(
    providers: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of each provider; the providers take turns, so that a slow moment of the machine hits
    all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    for r in range(-warmup, rounds):
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if r >= 0:
                times[name].append(time.perf_counter() - start)
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
        print(text)
        self.lines += text.splitlines()


def save(claim: str, transcript: Transcript, results: Mapping[str, Any]) -> Path:
    """``bench/results/<device>/<date>-<claim>.json`` with machine, versions and commit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name().split()[-1].lower() if device.type == "cuda" else "cpu"
    path = RESULTS / name / f"{datetime.date.today()}-{claim}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = environment(1, device)
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
