"""A run directory as data, and what it says: scores, findings, durations.

Everything in the directory is optional and may be damaged or half written, because the report is also written
while the run goes on.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastdino import strict_yaml
from fastdino.report import figures

_PHASES = (
    ("data", "waiting for crops"),
    ("forward", "forward: teacher, student, loss"),
    ("backward", "backward"),
    ("update", "update: clip, optimizer, teacher, center"),
)


@dataclass
class Run:
    """The files of a run directory; what is missing is empty."""

    root: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    crops: tuple[str, int, int] | None = None
    problems: list[str] = field(default_factory=list)
    """Sentences about files that could not be read in full."""

    @classmethod
    def read(cls, root: Path) -> Run:
        run = cls(root)
        run.metrics = run._lines("metrics.jsonl", "step")
        run.epochs = run._lines("log.txt", "epoch")
        run.evals = run._lines("eval.jsonl", "step", unique=False)
        run.config = flat(run._mapping("config.yaml", strict_yaml.parse))
        run.environment = run._mapping("environment.json", json.loads)
        if (root / "crops.png").exists():
            try:
                run.crops = figures.picture_file(root / "crops.png")
            except (OSError, SyntaxError, ValueError):
                run.problems.append("crops.png cannot be read.")
        return run

    def _lines(self, name: str, key: str, unique: bool = True) -> list[dict[str, Any]]:
        """Records of a JSON-lines file with a number under ``key``, in its order.

        A run that was resumed may have logged a step twice: of ``unique`` ones the later counts.
        """
        try:
            lines = (self.root / name).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        records, damaged = [], 0
        for line in filter(str.strip, lines):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and math.isfinite(number(record.get(key))):
                records.append(record)
            else:
                damaged += 1
        if damaged:
            self.problems.append(f"{damaged} damaged line{'s' if damaged > 1 else ''} of {name} left out.")
        if unique:
            records = list({record[key]: record for record in records}.values())
        return sorted(records, key=lambda record: record[key])

    def _mapping(self, name: str, parse: Any) -> dict[str, Any]:
        try:
            content = parse((self.root / name).read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            content = None
        if not isinstance(content, dict):
            self.problems.append(f"{name} cannot be read.")
            return {}
        return content

    def column(self, key: str) -> list[float]:
        """One value per record of ``metrics``; NaN where it is missing."""
        return [number(record.get(key)) for record in self.metrics]


def number(value: Any) -> float:
    """The value as a float, NaN if it is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def flat(mapping: dict[str, Any]) -> dict[str, Any]:
    """Nested sections merged into one level."""
    merged: dict[str, Any] = {}
    for key, value in mapping.items():
        merged |= flat(value) if isinstance(value, dict) else {str(key): value}
    return merged


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart; ``value`` in percent."""

    name: str
    value: float
    tone: str


@dataclass(frozen=True)
class Check:
    """A finding: ``state`` is good, note or bad."""

    state: str
    title: str
    text: str


@dataclass
class Scores:
    """k-NN and Jaccard figures of a run, in percent."""

    ks: list[str] = field(default_factory=list)
    main: str = ""
    """The k that headlines use: 20 (the paper's), else the largest."""
    rows: list[tuple[str, str, dict[str, float]]] = field(default_factory=list)
    """Name, tone, and top-1 by k; baselines first."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """Step and top-1 of the teacher at the main k."""
    jaccard: list[Bar] = field(default_factory=list)

    def of(self, tone: str) -> float:
        """Top-1 at the main k of raw, untrained or trained; NaN if absent."""
        return next((scores.get(self.main, math.nan) for _, t, scores in self.rows if t == tone), math.nan)


def read_scores(run: Run) -> Scores:
    """Figures of eval.jsonl: baselines from any record, the trained teacher's from the last after step 0."""
    scores = Scores()
    found: dict[str, dict[str, float]] = {}
    jaccard: dict[str, float] = {}
    by_step: dict[float, dict[str, float]] = {}
    for record in run.evals:
        for key, tone in (("raw_pixels", "raw"), ("untrained", "untrained"), ("knn", "trained")):
            values = record.get(key)
            if isinstance(values, dict):
                top1 = {str(k): number(v) for k, v in values.items() if math.isfinite(number(v))}
                if tone == "trained":
                    by_step[record["step"]] = top1
                if tone != "trained" or record["step"] > 0:
                    found[tone] = top1
        if isinstance(record.get("jaccard"), dict):
            jaccard |= {k: number(v) for k, v in record["jaccard"].items() if math.isfinite(number(v))}
    scores.ks = sorted({k for top1 in found.values() for k in top1}, key=lambda k: (len(k), k))[:8]
    if scores.ks:
        scores.main = "20" if "20" in scores.ks else scores.ks[-1]
    names = {"raw": "Raw pixels", "untrained": "Untrained network", "trained": "Trained teacher"}
    scores.rows = [(names[tone], tone, found[tone]) for tone in names if tone in found]
    scores.curve = [(step, top1[scores.main]) for step, top1 in by_step.items() if scores.main in top1]
    scores.jaccard = [
        Bar(names[tone], jaccard[tone], tone) for tone in ("untrained", "trained") if tone in jaccard
    ]
    return scores


def checks(run: Run, scores: Scores) -> list[Check]:
    """What a careful reader would look at first."""
    found: list[Check] = []
    trained, others = scores.of("trained"), [scores.of("raw"), scores.of("untrained")]
    others = [value for value in others if math.isfinite(value)]
    if math.isfinite(trained) and others:
        gain, untrained = trained - max(others), scores.of("untrained")
        if gain > 0:
            found.append(Check("good", "It learned", f"{gain:.1f} points above the better baseline."))
        elif trained > untrained:
            text = (
                f"{trained - untrained:.1f} points above the untrained network, {-gain:.1f} below raw pixels."
            )
            found.append(Check("note", "Not yet better than raw pixels", text))
        else:
            text = f"{-gain:.1f} points below the better baseline."
            found.append(Check("bad", "Nothing learned yet", text))
    elif run.metrics:
        text = "Losses do not tell. --eval_data_path with labelled held-out images gives k-NN figures."
        found.append(Check("note", "Learning not measured", text))

    entropy, prototypes = last_epoch(run, "teacher_entropy"), prototypes_of(run)
    if math.isfinite(entropy) and prototypes > 1:
        highest = math.log(prototypes)
        share = f"Teacher entropy {entropy:.2f} of at most {highest:.2f}."
        if entropy < 0.01 * highest:
            text = "Every image falls on one prototype. Raise teacher_temp, or lower center_momentum."
            found.append(Check("bad", "Collapsed to one prototype", f"{share} {text}"))
        elif entropy > 0.99 * highest:
            text = "All prototypes are equally likely. Lower teacher_temp, or train longer."
            found.append(Check("bad", "Uniform output", f"{share} {text}"))
        else:
            found.append(Check("good", "No collapse", share))
    spread = last_epoch(run, "spread")
    if math.isfinite(spread):
        text = f"Spread of the embeddings {spread:.2f} of at most 1."
        state, title = ("bad", "Collapsed to one point") if spread < 0.05 else ("good", "No collapse")
        found.append(Check(state, title, text))

    if run.metrics:
        bad = max([value for value in run.column("bad_steps") if math.isfinite(value)], default=0)
        if bad:
            text = f"{bad:g} steps had a NaN or infinite value and were skipped; they changed nothing."
            found.append(Check("note", f"{bad:g} bad step{'s' if bad > 1 else ''}", text))
        else:
            found.append(Check("good", "No bad steps", "Every loss and every gradient was finite."))
    split = time_split(run)
    if split:
        text = f"{split[0].share:.1f} % of each step went by waiting for crops."
        if split[0].share > 15:
            text += " More num_workers or smaller image files would help."
            found.append(Check("note", "Waiting for data", text))
        else:
            found.append(Check("good", "Data keeps up", text))
    return found


def health(found: list[Check]) -> tuple[str, str]:
    """State and words of the worst findings; empty where there is none at all."""
    for state in ("bad", "note"):
        titles = [check.title for check in found if check.state == state]
        if titles:
            return state, "; ".join([titles[0], *(title[0].lower() + title[1:] for title in titles[1:])])
    return ("good", "Healthy") if found else ("", "")


def prototypes_of(run: Run) -> float:
    """K, of which teacher entropies are at most the logarithm."""
    swav = run.config.get("method") == "swav"
    return number(run.config.get("nmb_prototypes" if swav else "out_dim"))


def last_epoch(run: Run, key: str) -> float:
    """Mean of a metric over the newest epoch that has it, from log.txt or else metrics.jsonl."""
    for record in reversed(run.epochs):
        if math.isfinite(number(record.get("train_" + key))):
            return number(record["train_" + key])
    newest = run.metrics[-1].get("epoch") if run.metrics else None
    values = [number(r.get(key)) for r in run.metrics if r.get("epoch") == newest]
    values = [value for value in values if math.isfinite(value)]
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Phase:
    """Part of a step: share in percent of the four phases together, and mean seconds."""

    name: str
    share: float
    seconds: float


def time_split(run: Run) -> list[Phase]:
    """Where a step's time went, over the whole run; empty if not logged."""
    means = []
    for phase, _ in _PHASES:
        values = [value for value in run.column(f"t_{phase}") if math.isfinite(value) and value >= 0]
        means.append(sum(values) / len(values) if values else 0.0)
    total = sum(means)
    if not total > 0:
        return []
    return [Phase(text, 100 * mean / total, mean) for (_, text), mean in zip(_PHASES, means, strict=True)]


def training_seconds(run: Run) -> float:
    """Wall time from the first to the last log line, without pauses between a stop and its continuation."""
    times = [value for value in run.column("time") if math.isfinite(value)]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False) if b >= a]
    if not gaps:
        return math.nan
    longest = 30 * sorted(gaps)[len(gaps) // 2] + 60
    return sum(gap for gap in gaps if gap <= longest)


def duration(seconds: float) -> str:
    """52 s, 8 min 12 s, 3 h 05 min, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def verdict(scores: Scores) -> str:
    """The result in one sentence, or an empty string."""
    trained = scores.of("trained")
    if not math.isfinite(trained):
        return ""
    said = (
        f"{trained:.1f} % of held-out images get the right class from their {scores.main} nearest neighbours"
    )
    against = [
        f"{value:.1f} % {words}"
        for value, words in (
            (scores.of("untrained"), "before training"),
            (scores.of("raw"), "with raw pixels"),
        )
        if math.isfinite(value)
    ]
    return said + (f", against {' and '.join(against)}." if against else ".")
