"""Up to five training runs on one page: figures, curves over each other, and the flags that differ."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import Markup

from fastdino.engine.logs import write_text
from fastdino.report.details import configuration, efficiency, text
from fastdino.report.figures import Chart, Series, line_chart
from fastdino.report.page import page_template, resource
from fastdino.report.run import (
    Run,
    Scores,
    checks,
    duration,
    health,
    last_epoch,
    number,
    read_scores,
    training_seconds,
)

MOST = 5
# Of the machine and the place, not of what was trained.
_WHERE = {"output_dir", "resume", "overwrite", "logger", "dist_url", "local_rank"}
_CURVES = (
    ("loss", "Loss", "Comparable only between runs of equal temperatures and prototypes."),
    ("teacher_entropy", "Teacher entropy", "Near 0 or ln K the teacher has collapsed."),
    ("kl", "KL divergence", "What the student still has to learn of the teacher."),
    ("img_s", "Throughput", "Training images per second, all processes together."),
)


def write_runs(run_dirs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Write the page of two to five run directories to ``path``, in one step.

    Raises ValueError for another number of runs, NotADirectoryError for one that is not there.
    """
    if not 2 <= len(run_dirs) <= MOST:
        raise ValueError(f"run_dirs: expected 2 to {MOST} runs, got {len(run_dirs)}")
    roots, path = [Path(root) for root in run_dirs], Path(path)
    for root in roots:
        if not root.is_dir():
            raise NotADirectoryError(f"run_dirs: no such directory: {root}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render([Run.read(root) for root in roots]), errors="replace")
    return path


def render(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    names = _names([run.root for run in runs])
    scores = [read_scores(run) for run in runs]
    return page_template("runs.html").render(
        css=Markup(resource("page.css") + resource("comparison.css") + resource("runs.css")),
        names=names,
        rows=_rows(runs, scores),
        charts=_charts(runs, scores, names),
        flags=_flags(runs),
        problems=[f"{name}: {line}" for name, run in zip(names, runs, strict=True) for line in run.problems],
        written=time.strftime("%d %B %Y, %H:%M").lstrip("0"),
    )


def _names(roots: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [root.resolve().parts for root in roots]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{names[i]} ({i + 1})" for i in range(len(names))]


def _rows(runs: Sequence[Run], scores: Sequence[Scores]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Label, then text and whether it is the best, per run; rows that no run fills are left out."""
    ks = {score.main for score in scores if score.main}
    k = f", k = {ks.pop()}" if len(ks) == 1 else ""
    jaccard = [{bar.tone: bar.value for bar in score.jaccard}.get("trained", math.nan) for score in scores]
    rows = [
        ("State", [(health(checks(run, score))[1], False) for run, score in zip(runs, scores, strict=True)]),
        _numbers(f"k-NN of the teacher{k}, %", [score.of("trained") for score in scores], "{:.1f}", True),
        _numbers(f"k-NN of the untrained network{k}, %", [score.of("untrained") for score in scores]),
        _numbers("Attention-mask overlap, %", jaccard, "{:.1f}", True),
        _numbers("Loss, last epoch", [last_epoch(run, "loss") for run in runs], "{:.3f}"),
        _numbers("Steps", [max(run.column("step"), default=math.nan) for run in runs], "{:,.0f}"),
        ("Training time", [(_time(run), False) for run in runs]),
    ]
    used = [dict(efficiency(run)) for run in runs]
    rows += [
        (name, [(one.get(name, ""), False) for one in used])
        for name in dict.fromkeys(n for one in used for n in one)
    ]
    for key, label in (("images", "Images"), ("global_batch", "Global batch"), ("processes", "Processes")):
        rows.append(_numbers(label, [number(run.environment.get(key)) for run in runs], "{:,.0f}"))
    for key, label in (
        ("device", "Device"),
        ("precision", "Precision"),
        ("fastdino", "Version"),
        ("commit", "Commit"),
    ):
        rows.append((label, [(str(run.environment.get(key) or ""), False) for run in runs]))
    return [row for row in rows if any(cell for cell, _ in row[1])]


def _numbers(
    label: str, values: Sequence[float], form: str = "{:.1f}", highest: bool = False
) -> tuple[str, list[tuple[str, bool]]]:
    finite = [value for value in values if math.isfinite(value)]
    best = max(finite) if highest and len(finite) > 1 else math.nan
    return label, [(form.format(v) if math.isfinite(v) else "", v == best) for v in values]


def _time(run: Run) -> str:
    seconds = training_seconds(run)
    return duration(seconds) if math.isfinite(seconds) else ""


def _charts(
    runs: Sequence[Run], scores: Sequence[Scores], names: Sequence[str]
) -> list[tuple[Chart, str, str]]:
    """k-NN, then what is logged in steps, over epochs where every run knows how long one is."""
    lengths = [number(run.environment.get("steps_per_epoch")) for run in runs]
    in_epochs = all(length > 0 for length in lengths)
    per = lengths if in_epochs else [1.0] * len(runs)
    label = "epoch" if in_epochs else "step"

    def chart(
        points: Callable[[int], tuple[list[float], list[float]]], smooth: bool, unit: str = ""
    ) -> Chart | None:
        lines = []
        for i, name in enumerate(names):
            xs, ys = points(i)
            lines.append(Series(name, [x / per[i] for x in xs], ys, i + 1, smooth))
        return line_chart(
            lines, x_label=label, unit=unit, heading=lambda x: f"{label} {x:,.1f}".removesuffix(".0")
        )

    def of_knn(i: int) -> tuple[list[float], list[float]]:
        curve = scores[i].curve
        return [step for step, _ in curve], [top1 for _, top1 in curve]

    def logged(key: str) -> Callable[[int], tuple[list[float], list[float]]]:
        return lambda i: (runs[i].column("step"), runs[i].column(key))

    knn = chart(of_knn, False, " %") if any(len(score.curve) > 1 for score in scores) else None
    found = [(knn, "k-NN accuracy", "Of the teacher, each time it was evaluated, in percent.")]
    found += [(chart(logged(key), True), title, why) for key, title, why in _CURVES]
    return [(one, title, why) for one, title, why in found if one is not None]


def _flags(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Flags with more than one value among the runs."""
    configs = [configuration(run) for run in runs]
    if any(config is None for config in configs):
        flat = [run.config for run in runs]
    else:
        from fastdino.config import as_flags

        flat = [as_flags(config) for config in configs if config is not None]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [text(config.get(key)) for config in flat]) for key in keys if key not in _WHERE]
    return [(key, values) for key, values in rows if len(set(values)) > 1][:200]
