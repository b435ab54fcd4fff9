"""Tables and plots of `bench.kernels`, from its saved results alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import RESULTS
from bench.kernel_cases import OURS

README = Path(__file__).parents[1] / "kernels" / "README.md"
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"
OPERATIONS = (
    "dino_loss",
    "prototype_loss",
    "patch_loss",
    "region_loss",
    "info_nce",
    "sinkhorn_knopp",
    "soft_cross_entropy",
    "centered_softmax",
    "normalize_weight",
    "AdamWEMA",
    "LARS",
    "LAMB",
    "ema_update_",
    "clip_grad_per_tensor_",
)
SIZES = ("K", "queue", "B", "V", "patches", "regions", "parameters", "dtype")
SWEPT = ("dino_loss", "prototype_loss")  # over K and B
Row = dict[str, Any]


def size_text(row: Row) -> str:
    return ", ".join(str(row[key]) if key == "dtype" else f"{key} {row[key]}" for key in SIZES if key in row)


def problems(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of one problem each, in the order of the run."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["op"], size_text(row)), []).append(row)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------ table


def _newest(folder: Path) -> tuple[dict[str, list[Row]], dict[str, Any], list[Path]]:
    """Rows by operation from the newest file that has it (a partial run counts as later on the same day)."""
    rows: dict[str, list[Row]] = {}
    files: dict[str, Path] = {}
    machine: dict[str, Any] = {}
    paths = folder.glob("????-??-??-kernels*.json")
    for path in sorted(paths, key=lambda p: (p.name[:10], len(p.name), p.name)):
        record = json.loads(path.read_text())
        machine = record["machine"]
        for op in {row["op"] for row in record["rows"]}:
            rows[op] = [row for row in record["rows"] if row["op"] == op]
            files[op] = path
    return rows, machine, sorted(set(files.values()))


def _line(rows: Sequence[Row]) -> str:
    """One problem: the baseline, the fastest rival, ours."""
    baseline = rows[0]
    rivals = [row for row in rows if not row["provider"].startswith(OURS)]
    best = min(rivals, key=lambda row: row["median_s"])
    ours = next(row for row in rows if row["provider"] == OURS)
    cells = [
        f"`{ours['op']}`",
        size_text(ours),
        f"{baseline['provider']}: {baseline['median_s'] * 1e3:.3g}",
        f"{best['provider']}: {best['median_s'] * 1e3:.3g}",
        f"**{ours['median_s'] * 1e3:.3g}**",
        f"{ours['speedup']:.2f}x ({ours['speedup_min']:.2f}-{ours['speedup_max']:.2f})",
        f"{best['median_s'] / ours['median_s']:.2f}x",
        f"{ours['roofline']:.0%}",
        f"{baseline['extra_bytes'] / 2**20:.1f} -> {ours['extra_bytes'] / 2**20:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "operation",
    "problem",
    "baseline, ms",
    "fastest rival, ms",
    "ours, ms",
    "speed-up over the baseline (range)",
    "over the rival",
    "of the roofline",
    "extra MiB, baseline -> ours",
)


def markdown(results: Path, relative_to: Path) -> str:
    """A section for the CPU and for each GPU; what no file holds is called not measured."""
    folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    measured = {path.name: _newest(path) for path in folders}
    gpus = [name for name, (rows, _, _) in measured.items() if rows and name != "cpu"]
    parts = []
    for name in ["cpu", *gpus]:
        rows, machine, paths = measured.get(name, ({}, {}, []))
        if not rows:
            parts.append(f"**{name.upper()}**: not measured.")
            continue
        links = ", ".join(f"[{p.name}]({_relative(p, relative_to)})" for p in paths)
        lines = [
            f"**{machine['device']}**, {machine['threads']} threads, torch {machine['packages']['torch']}, "
            f"commit {machine['commit']}: {links}",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
        ]
        for op in OPERATIONS:
            if op not in rows:
                lines.append(f"| `{op}` | not measured |" + " |" * (len(COLUMNS) - 2))
                continue
            seen = set()
            for problem in problems(rows[op]):
                dtype = problem[0]["dtype"]  # the first problem of each dtype has the paper's sizes
                if dtype not in seen:
                    lines.append(_line(problem))
                seen.add(dtype)
        pictures = [p.with_name(f"{p.stem}-{op}.png") for p in paths for op in SWEPT]
        lines += ["", *(f"![{p.stem}]({_relative(p, relative_to)})" for p in pictures if p.exists())]
        parts.append("\n".join(lines).rstrip())
    if not gpus:
        parts.append("**GPU**: not measured.")
    return "\n\n".join(parts)


def _relative(path: Path, folder: Path) -> str:
    return Path("..", path.relative_to(folder.parent)).as_posix()


def write_readme(results: Path = RESULTS, readme: Path = README) -> Path:
    """Rewrite the measured part of the kernels' README."""
    before, _, rest = readme.read_text().partition(START)
    after = rest.partition(END)[2]
    if not after:
        raise SystemExit(f"{readme}: expected the marks {START} and {END}")
    text = markdown(results.resolve(), readme.resolve().parent)
    readme.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")
    return readme


# ------------------------------------------------------------------------------------------------------ plots


def plot(path: Path, rows: Sequence[Row]) -> list[Path]:
    """Time and extra memory over K and over the batch, for the operations measured at several sizes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for op in SWEPT:
        chosen = [row for row in rows if row["op"] == op]
        if not chosen:
            continue
        head, dtype = chosen[0], chosen[0]["dtype"]
        chosen = [row for row in chosen if row["dtype"] == dtype]
        figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
        for column, (key, other, label) in enumerate((("K", "B", "prototypes K"), ("B", "K", "images B"))):
            line = [row for row in chosen if row[other] == head[other]]
            for provider in dict.fromkeys(row["provider"] for row in line):
                points = sorted((row for row in line if row["provider"] == provider), key=lambda r: r[key])
                xs = [row[key] for row in points]
                style = dict(marker="o", linewidth=2.5 if provider == OURS else 1.2, label=provider)
                low, high = ([row[f"{end}_s"] * 1e3 for row in points] for end in ("min", "max"))
                axes[0, column].plot(xs, [row["median_s"] * 1e3 for row in points], **style)
                axes[0, column].fill_between(xs, low, high, alpha=0.15)
                axes[1, column].plot(xs, [max(row["extra_bytes"], 1024) / 2**20 for row in points], **style)
            for axis, unit in zip(axes[:, column], ("ms, forward and backward", "extra MiB"), strict=True):
                axis.set(xscale="log", yscale="log", xlabel=f"{label} ({other} = {head[other]})", ylabel=unit)
                axis.grid(True, which="both", alpha=0.3)
        axes[0, 0].legend(fontsize=8)
        figure.suptitle(f"{op}, V = {head['V']}, {dtype}")
        target = path.with_name(f"{path.stem}-{op}.png")
        figure.savefig(target, dpi=110)
        plt.close(figure)
        written.append(target)
    return written
