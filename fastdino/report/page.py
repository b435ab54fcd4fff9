"""The page: a run directory and pictures of held-out images, put into the template.

What is missing becomes a plain sentence. All text goes through jinja2's autoescape, and the page's
Content-Security-Policy forbids scripts and any request.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fastdino.engine.logs import write_text
from fastdino.report import figures
from fastdino.report.details import bad_files, commands, difference, efficiency
from fastdino.report.figures import Level, Series, line_chart, short
from fastdino.report.neighbours import Tile, neighbours
from fastdino.report.run import (
    Bar,
    Run,
    Scores,
    checks,
    duration,
    health,
    last_epoch,
    number,
    prototypes_of,
    read_scores,
    time_split,
    training_seconds,
    verdict,
)

if TYPE_CHECKING:
    import torch

    from fastdino.models import Backbone, VisionTransformer

_MOST_IMAGES = 8
_MOST_ROWS = 300  # of a table


def write_report(
    run_dir: str | os.PathLike[str],
    *,
    backbone: Backbone | None = None,
    image_paths: Sequence[str | os.PathLike[str]] = (),
    mask_paths: Sequence[str | os.PathLike[str]] = (),
    bank_paths: Sequence[str | os.PathLike[str]] = (),
    device: torch.device | str | None = None,
) -> Path:
    """Write ``report.html`` into a run directory, in one step, and return its path.

    ``backbone`` (on ``device``, none: that of its weights) and up to eight held-out ``image_paths`` give the
    attention and feature pictures, if it is a ViT; ``mask_paths``, one object mask per image, adds outlines
    and overlaps, ``bank_paths`` the images among which neighbours are looked for. Raises NotADirectoryError
    if there is no run directory, ValueError if the number of masks differs from that of the images.
    """
    root = Path(run_dir)
    if not root.is_dir():
        raise NotADirectoryError(f"run_dir: no such directory: {root}")
    if mask_paths and len(mask_paths) != len(image_paths):
        raise ValueError(
            f"mask_paths: expected one per image ({len(image_paths)}) or none, got {len(mask_paths)}"
        )
    run = Run.read(root)
    seen, alike = None, []
    if backbone is not None and device is None:
        device = next(backbone.parameters()).device
    vit = _vision_transformer(backbone)
    if vit is not None and image_paths and device is not None:
        seen = figures.strips(
            vit,
            image_paths[:_MOST_IMAGES],
            mask_paths[:_MOST_IMAGES],
            side=_side(run, vit.patch_size),
            device=device,
        )
    if backbone is not None and image_paths and bank_paths and device is not None:
        chosen = number(run.config.get("eval_image_size"))
        side = int(chosen) if chosen >= 1 else _trained_side(run)
        queries = image_paths[:_MOST_IMAGES]
        alike = neighbours(backbone, queries, bank_paths, side=side, device=device)
    page = render(run, seen, alike)
    path = root / "report.html"
    write_text(path, page, errors="replace")
    return path


def _vision_transformer(backbone: Backbone | None) -> VisionTransformer | None:
    """``backbone`` if it has attention maps to show."""
    if backbone is None:
        return None
    from fastdino.models import VisionTransformer

    return backbone if isinstance(backbone, VisionTransformer) else None


def _trained_side(run: Run) -> int:
    """Side of the global crops, which evaluations use too."""
    trained = number(run.config.get("global_crops_size"))
    return int(trained) if trained >= 1 else 224


def _side(run: Run, patch: int) -> int:
    """Image side for attention maps: twice that of training, for finer maps, but not above 480 pixels."""
    trained = _trained_side(run)
    side = trained if trained >= patch else 14 * patch
    return max(patch, min(2 * side, max(side, 480)) // patch * patch)


def render(run: Run, seen: figures.Strips | None = None, alike: Sequence[Sequence[Tile]] = ()) -> str:
    """The whole page as text; ``seen`` are pictures of held-out images, or of training images where there are
    none, and ``alike`` those of their neighbours, if any.
    """
    scores = read_scores(run)
    findings = checks(run, scores)
    template = page_template("page.html")
    return template.render(
        css=Markup(resource("page.css")),
        name=run.root.resolve().name or "run",
        written=time.strftime("%d %B %Y, %H:%M").lstrip("0"),
        facts=_facts(run),
        tiles=_tiles(run, scores),
        health=health(findings),
        verdict=verdict(scores),
        checks=findings,
        scores=scores,
        knn_bars=[
            Bar(name, top1[scores.main], tone) for name, tone, top1 in scores.rows if scores.main in top1
        ],
        charts=_charts(run, scores),
        split=time_split(run),
        seen=seen,
        pictured="Training" if run.config.get("eval_data_path", "") is None else "Held-out",
        alike=alike,
        efficiency=efficiency(run),
        difference=difference(run),
        bad_files=bad_files(run),
        commands=commands(run),
        crops=run.crops,
        crop_text=_crop_text(run),
        config=_table(run.config),
        environment=_table(run.environment),
        epochs=_epoch_table(run),
        problems=run.problems,
    )


def page_template(name: str) -> Template:
    """A page of this folder, with what is common to all."""
    return environment().from_string(resource("head.html") + resource("plot.html") + resource(name))


def environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def resource(name: str) -> str:
    return (resources.files("fastdino.report") / name).read_text(encoding="utf-8")


def _facts(run: Run) -> list[str]:
    """The line under the title."""
    config, environment, facts = run.config, run.environment, []
    if "arch" in config:
        arch = str(config["arch"]).replace("deit_", "vit_").replace("vit_", "ViT-").replace("_", "-")
        facts.append(f"{arch}/{config.get('patch_size', '?')}" if arch.startswith("ViT-") else arch)
    if math.isfinite(number(environment.get("images"))):
        facts.append(f"{environment['images']:,} images")
    if math.isfinite(number(environment.get("global_batch"))):
        facts.append(f"batch {environment['global_batch']:,}")
    if "precision" in environment:
        facts.append(
            {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(environment["precision"]), "")
        )
    if "device" in environment:
        facts.append(str(environment["device"]))
    return [fact for fact in facts if fact]


def _tiles(run: Run, scores: Scores) -> list[tuple[str, str, str]]:
    """Headline numbers: value, unit, what it is."""
    tiles = []
    if math.isfinite(scores.of("trained")):
        tiles.append((f"{scores.of('trained'):.1f}", "%", f"k-NN accuracy, k = {scores.main}"))
    trained = [bar.value for bar in scores.jaccard if bar.tone == "trained"]
    if trained:
        tiles.append((f"{trained[0]:.1f}", "%", "attention-mask overlap"))
    loss = last_epoch(run, "loss")
    if math.isfinite(loss):
        tiles.append((f"{loss:.3f}", "", "loss, last epoch"))
    steps = [int(value) for value in run.column("step")]
    if steps:
        per_epoch, epochs = number(run.environment.get("steps_per_epoch")), number(run.config.get("epochs"))
        text = "optimizer steps"
        if per_epoch > 0:
            done = f"{steps[-1] / per_epoch:.1f}".removesuffix(".0")
            text = f"steps, epoch {done}" + (f" of {epochs:g}" if math.isfinite(epochs) else "")
        tiles.append((f"{steps[-1]:,}", "", text))
    speed = [value for value in run.column("img_s") if math.isfinite(value)]
    if speed:
        tiles.append((f"{sorted(speed)[len(speed) // 2]:,.0f}", "img/s", "median throughput"))
    seconds = training_seconds(run)
    if math.isfinite(seconds):
        tiles.append((duration(seconds), "", "of training"))
    return tiles


def _charts(run: Run, scores: Scores) -> dict[str, figures.Chart | None]:
    """All charts by name. Where metrics.jsonl has no lines, the epochs of log.txt serve."""
    if run.metrics:
        records, x, prefix, x_label = run.metrics, run.column("step"), "", "step"
    else:
        records, x, prefix, x_label = run.epochs, [r["epoch"] + 1 for r in run.epochs], "train_", "epoch"
    epoch_of = {number(r.get("step")): number(r.get("epoch")) for r in run.metrics}

    def heading(value: float) -> str:
        epoch = epoch_of.get(value, math.nan)
        return f"{x_label} {value:,.0f}" + (f", epoch {epoch + 1:.0f}" if math.isfinite(epoch) else "")

    def series(key: str, name: str, color: int = 1, smooth: bool = False) -> Series:
        return Series(name, x, [number(r.get(prefix + key)) for r in records], color, smooth)

    def chart(*lines: Series, **options: Any) -> figures.Chart | None:
        return line_chart(lines, heading=heading, x_label=x_label, **options)

    prototypes = prototypes_of(run)
    limits = [Level(0.0, "0: collapsed to one prototype", "alarm")]
    if prototypes > 1:
        limits.append(
            Level(math.log(prototypes), f"ln K = {math.log(prototypes):.2f}: collapsed to uniform", "alarm")
        )
    baselines = [
        Level(scores.of(tone), f"{words} {scores.of(tone):.1f} %", "quiet")
        for tone, words in (("untrained", "untrained"), ("raw", "raw pixels"))
        if math.isfinite(scores.of(tone))
    ]
    knn = Series(f"teacher, k = {scores.main}", [s for s, _ in scores.curve], [v for _, v in scores.curve])
    bad = series("bad_steps", "bad steps so far", 2)
    return {
        "loss": chart(series("loss", "loss", 1, smooth=True)),
        "entropy": chart(
            series("teacher_entropy", "teacher entropy", 1, smooth=True),
            series("kl", "KL divergence", 2, smooth=True),
            levels=limits,
            from_zero=True,
            margin=0.11,
        ),
        "spread": chart(
            series("spread", "spread of the embeddings", 1, smooth=True),
            series("accuracy", "keys found among the queue", 2, smooth=True),
            levels=[Level(0.0, "0: collapsed to one point", "alarm")],
            from_zero=True,
            margin=0.11,
        ),
        "knn": line_chart([knn], levels=baselines, from_zero=True, heading=heading, unit=" %"),
        "norms": chart(
            series("grad_norm", "gradient", 1, smooth=True),
            series("center_norm", "center", 2, smooth=True),
            from_zero=True,
        ),
        "lr": chart(series("lr", "learning rate", 3), from_zero=True),
        "wd": chart(series("wd", "weight decay", 3)),
        "momentum": chart(series("momentum", "teacher momentum", 3)),
        "temperature": chart(series("teacher_temp", "teacher temperature", 3)),
        "speed": chart(series("img_s", "images per second", 4, smooth=True), from_zero=True),
        "bad": chart(bad, from_zero=True, whole=True) if any(y > 0 for y in bad.ys) else None,
    }


def _crop_text(run: Run) -> str:
    config = run.config
    try:
        low, high = (f"{100 * float(share):g}" for share in config["global_crops_scale"])
        text = (
            f"Two global views of {config['global_crops_size']} pixels, each {low} to {high} % of the image"
        )
        count = int(config["local_crops_number"])
        if count:
            low, high = (f"{100 * float(share):g}" for share in config["local_crops_scale"])
            text += f", and {count} local views of {config['local_crops_size']} pixels, {low} to {high} %"
    except (KeyError, TypeError, ValueError):
        return ""
    return text + "."


def _table(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of key and text, nested ones as ``outer.inner``; long values are cut."""
    rows: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            rows += _table(value, f"{prefix}{key}.")
        else:
            text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            rows.append((f"{prefix}{key}"[:200], text if len(text) <= 500 else text[:500] + " (cut)"))
    return rows[:_MOST_ROWS]


def _epoch_table(run: Run) -> list[list[str]]:
    """Rows of log.txt: epoch, loss, teacher entropy, KL, learning rate, weight decay; thinned if many."""
    keys = ("train_loss", "train_teacher_entropy", "train_kl", "train_lr", "train_wd")
    records = run.epochs
    if len(records) > _MOST_ROWS:
        records = [records[round(i * (len(records) - 1) / (_MOST_ROWS - 1))] for i in range(_MOST_ROWS)]
    return [
        [
            f"{record['epoch'] + 1:g}",
            *(short(v) if math.isfinite(v := number(record.get(key))) else "" for key in keys),
        ]
        for record in records
    ]
