"""Does a run collapse? Entropy of the teacher's output, and its divergence from the student's (DINO paper,
section 5.3 and figure 7).

H(P_t, P_s) = h(P_t) + KL(P_t | P_s). A KL of zero means that teacher and student give the same output
whatever the image: a collapse, to one prototype where the entropy h goes to 0, to the uniform distribution
where it goes to ln K. Centering prevents the first and favours the second, sharpening does the opposite; both
together prevent both.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdino.evaluation import sheets
from fastdino.report.run import Run, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("centering and sharpening", {}),
    "no_centering": ("no centering", {"center_momentum": 1.0}),
    "no_sharpening": ("no sharpening", {"teacher_temp": 0.1, "warmup_teacher_temp": 0.1}),
    "neither": (
        "neither",
        {"center_momentum": 1.0, "teacher_temp": 0.1, "warmup_teacher_temp": 0.1},
    ),
}
"""Name -> title and flags: without centering the center stays at its initial 0, without sharpening the
teacher's temperature is the student's."""

_BATCH, _EPOCHS = 32, 40

# The demo's network and images, with fewer prototypes and a sharper teacher, so that few steps suffice.
_TOY: dict[str, Any] = {
    "preset": "demo",
    "out_dim": 256,
    "teacher_temp": 0.012,
    "warmup_teacher_temp": 0.012,
    "momentum_teacher": 0.99,
    "precision": "fp32",
    "batch_size_per_gpu": _BATCH,
    "eval_every": 0,
    "log_every": 5,
    "report": False,
    "logger": "none",
    "resume": "none",
    "prescan": "off",
}


@dataclass(frozen=True)
class Curve:
    """What one run logged, in nats."""

    name: str
    xs: list[float]
    entropy: list[float]
    kl: list[float]
    highest: float | None
    """ln K, None where the run does not tell the number of prototypes."""
    unit: str = "step"
    """Of ``xs``: step or epoch."""

    def last(self) -> tuple[float, float]:
        """Entropy and KL, means over the last twentieth of the run."""
        count = max(1, len(self.xs) // 20)
        return float(np.mean(self.entropy[-count:])), float(np.mean(self.kl[-count:]))

    def verdict(self) -> str:
        """What the end of the run says: a KL below 1 % of ln K is a collapse."""
        entropy, kl = self.last()
        highest = self.highest if self.highest is not None else math.inf
        if kl > 0.01 * (self.highest or 1.0):
            return "no collapse"
        if entropy < 0.05 * min(highest, 10.0):
            return "collapse to one prototype"
        return "collapse to the uniform distribution" if entropy > 0.95 * highest else "collapse"


def read_curve(run_dir: Path, name: str | None = None) -> Curve:
    """The curve of a run directory: ``metrics.jsonl``, or ``log.txt`` where there is none.

    Raises FileNotFoundError or ValueError naming the directory if it holds neither entropy nor KL.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"--runs: no such run directory: {run_dir}")
    run = Run.read(run_dir)
    sources = [("step", run.metrics, ""), ("epoch", run.epochs, "train_")]
    prototypes = number(run.config.get("out_dim"))
    for unit, records, prefix in sources:
        rows = [
            [number(row.get(key)) for key in (unit, f"{prefix}teacher_entropy", f"{prefix}kl")]
            for row in records
        ]
        rows = [row for row in rows if all(map(math.isfinite, row))]
        if rows:
            xs, entropy, kl = map(list, zip(*rows, strict=True))
            highest = math.log(prototypes) if prototypes >= 1 else None
            return Curve(name or run_dir.name, xs, entropy, kl, highest, unit)
    raise ValueError(
        f"--runs: {run_dir} has no entropy and KL: expected metrics.jsonl with step, teacher_entropy and kl, "
        "or log.txt with epoch, train_teacher_entropy and train_kl, as a DINO run writes them"
    )


def study(
    output: Path,
    *,
    steps: int,
    seed: int = 0,
    device: str = "auto",
    images: int = 1000,
    say: Callable[[str], None] = print,
) -> list[Curve]:
    """Train the four runs of `STUDY` for ``steps`` steps each on demo images; curves in that order.

    ``output`` gets a run directory for each, and the images. Toy size: a ViT of width 64, crops of 48 pixels
    and K = 256.
    """
    import torch

    from fastdino.config import config_from_flags
    from fastdino.data.demo import write_demo
    from fastdino.engine.trainer import Trainer

    drawn = write_demo(output / "images", n_train=images, n_val=10)
    curves, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # steps this small lose more to waiting for each other than threads gain
    try:
        for name, (title, changes) in STUDY.items():
            flags = _TOY | changes | {"data_path": str(drawn / "train"), "output_dir": str(output / name)}
            flags |= {"seed": seed, "device": device, "max_steps": steps}
            flags["epochs"] = max(_EPOCHS, math.ceil(steps / (images // _BATCH)))
            config = config_from_flags(**flags)
            with contextlib.redirect_stdout(io.StringIO()):  # its warnings of collapse are the purpose here
                Trainer(config).fit()
            curves.append(read_curve(output / name, title))
            say(line(curves[-1]))
    finally:
        torch.set_num_threads(threads)
    return curves


def line(curve: Curve) -> str:
    """How a run ended, in one line."""
    entropy, kl = curve.last()
    top = "" if curve.highest is None else f" of at most {curve.highest:.2f}"
    return f"{curve.name}: KL {kl:.4f}, teacher entropy {entropy:.3f}{top} nats, {curve.verdict()}"


def draw(curves: list[Curve], title: str) -> Figure:
    """Entropy and KL of the runs, with the lines 0 and ln K (figure 7)."""
    figure = sheets.figure(12, 5.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, color=sheets.hexadecimal(sheets.INK))
    left, right = figure.subplots(1, 2)
    unit = curves[0].unit
    sheets.plain(left, "Entropy of the teacher's output, nats", unit)
    sheets.plain(right, "KL divergence from teacher to student, nats", unit)
    for curve, (color, style) in zip(curves, _styles(), strict=False):
        how: dict[str, Any] = {"color": color, "linestyle": style, "linewidth": 2.2}
        left.plot(curve.xs, curve.entropy, label=curve.name, **how)
        right.plot(curve.xs, curve.kl, **how)
    quiet = {"color": sheets.hexadecimal(sheets.FAINT), "linewidth": 1, "zorder": 0}
    for axes in (left, right):
        axes.axhline(0, **quiet)
    for highest in sorted({curve.highest for curve in curves if curve.highest is not None}):
        left.axhline(highest, **quiet)
        text = f"ln K = {highest:.2f}"
        left.annotate(
            text, (0.0, highest), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points"
        )
    highest_kl = max(max(curve.kl[len(curve.kl) // 20 :]) for curve in curves)
    right.set_ylim(-0.03 * highest_kl, 1.05 * highest_kl)
    legend = figure.legend(loc="outside lower left", ncols=min(4, len(curves)), frameon=False, fontsize=12)
    for name in legend.get_texts():
        name.set_parse_math(False)  # a folder may be called anything
    return figure


def _styles() -> Iterator[tuple[str, str]]:
    """Colours and dashes, so that lines are told apart by either."""
    order = (6, 5, 2, 4, 0, 1)
    for i in range(1000):
        style = ("-", "--", "-.", ":")[i % 4]
        yield sheets.hexadecimal(sheets.COLORS[order[i % 6]]), style
