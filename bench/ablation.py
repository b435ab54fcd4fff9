"""The paper's ablations at a size that a CPU can pay: presets scaled down, figures beside the paper's.

python -m bench.ablation [PRESET ...] [--epochs 10] [--seeds 0 1 2] [--images DIR] [--jobs 2] [--save]

Without names: the nine rows of Table 7 and the four teachers of Figure 6. A run is the demo (a ViT of 0.16 M
parameters on 4,000 pictures of ten kinds of objects, or the images of --images) with what the preset changes
in its base, brought to the demo's size: 10 and 6 local crops become 2 and 1, K, queues and hidden widths
shrink with the demo's own, crop scales stay the demo's. So this tests that every row runs as its row says and
what collapses; it is no measurement of ImageNet, and with so few steps rows that the paper has apart by a
point cannot be told apart.

A row has not learned when its mean k-NN is less than two points above that of the untrained network; whether
it collapsed to one answer can be read from entropy and KL (of distributions; both near 0, or KL near 0 and
entropy near ln K) or spread (of embeddings; 0). The demo's head has batch norm, without which even the full
method stays at the uniform plateau at this size, and which keeps answers apart where the paper's rows fail.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import statistics
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.harness import RESULTS, Transcript, save
from fastdino import presets
from fastdino.config import ConfigError, config_from_flags
from fastdino.data.demo import write_demo

ROWS = [f"table7-{row}" for row in range(1, 10)] + [
    f"fig6-{teacher}" for teacher in ("copy", "prev-iter", "prev-epoch", "momentum")
]
MARGIN = 2.0  # points of k-NN above the untrained network that count as learning
RATES = ("0.03", "0.1", "0.3", "1", "3")  # of the linear probe
# What the demo has instead: flags that are not taken from a preset.
_DEMOS_OWN = {"arch", "epochs", "global_crops_scale", "local_crops_scale", "batch_size", "precision"}
_SIZES = {
    "byol": {"hidden_mlp": 512, "feat_dim": 64, "predictor_hidden_dim": 512},
    "swav": {"hidden_mlp": 512, "feat_dim": 64},
    "mocov2": {"hidden_mlp": 512, "feat_dim": 64, "queue_length": 2048},
    "infonce": {"queue_length": 2048},
    "on": {"predictor_hidden_dim": 512},
}
"""Sizes of what the demo lacks, by --method, --loss or --predictor."""


def delta(name: str) -> dict[str, Any]:
    """What preset ``name`` changes in the run of the paper that it goes back to, at the demo's size."""
    root = presets.PRESETS[name]
    chain = [name]
    while root.base is not None and root.base not in ("paper-300", "paper-100"):
        chain.append(root.base)
        root = presets.PRESETS[root.base]
    changed: dict[str, Any] = {}
    for member in reversed(chain):
        changed |= presets.PRESETS[member].delta
    demo = presets.flags("demo")
    scaled = {key: value for key, value in changed.items() if key not in _DEMOS_OWN}
    if "local_crops_number" in scaled:
        scaled["local_crops_number"] = round(scaled["local_crops_number"] * demo["local_crops_number"] / 10)
    if "out_dim" in scaled:
        scaled["out_dim"] = max(64, scaled["out_dim"] * demo["out_dim"] // 65536)
    if "teacher_temp" in scaled:  # the paper's is 0.07 after the warm-up
        scaled["teacher_temp"] *= demo["teacher_temp"] / 0.07
        scaled["warmup_teacher_temp"] = scaled["teacher_temp"]
        scaled.pop("warmup_teacher_temp_epochs", None)
    return scaled


def paper(name: str) -> dict[str, float]:
    """The paper's figures in the preset's description: k-NN and linear, where it has them."""
    found = re.findall(r"(k-NN|linear) (\d+\.\d)", presets.PRESETS[name].figure)
    return {key: float(value) for key, value in found}


def run(name: str | None, seed: int, images: Path, epochs: int, out: Path) -> dict[str, float]:
    """k-NN (k = 20) and best linear top-1 in percent of one run, and its signs of collapse at the end; with
    no name those of the untrained network."""
    import torch

    from fastdino.engine.trainer import Trainer
    from fastdino.evaluation.__main__ import main as evaluate

    torch.set_num_threads(1)  # as the demo
    changes = {} if name is None else delta(name)
    flags: dict[str, Any] = dict(preset="demo", logger="none", report=False, log_every=20, eval_every=0)
    flags |= dict(data_path=str(images / "train"), epochs=epochs, seed=seed, output_dir=str(out))
    for switch in ("method", "loss", "predictor"):
        flags |= _SIZES.get(changes.get(switch, ""), {})
    if name is None:
        flags |= {"max_steps": 1, "lr": 0.0, "min_lr": 0.0, "momentum_teacher": 1.0}
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(config_from_flags(**flags | changes)).fit()
        common = [
            "--weights",
            str(out),
            "--data_path",
            str(images),
            "--image_size",
            "48",
            "--output_dir",
            str(out),
        ]
        codes = [
            evaluate(["knn", *common, "--nb_knn", "20"]),
            evaluate(["linear", *common, "--features", "cached", "--epochs", "30", "--lr", *RATES]),
        ]
    if any(codes):
        raise RuntimeError(f"{name}: evaluation failed")
    figures = {
        "knn": json.loads((out / "knn.json").read_text())["figures"]["top1_k20"],
        "linear": json.loads((out / "linear.json").read_text())["figures"]["top1"],
    }
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return figures | {key: last[key] for key in ("teacher_entropy", "kl", "spread") if key in last}


def learned(results: list[dict[str, float]], untrained: list[dict[str, float]]) -> bool:
    """Whether the mean k-NN over seeds is more than a margin above the untrained network's."""
    return statistics.mean(r["knn"] for r in results) > MARGIN + statistics.mean(r["knn"] for r in untrained)


def rank_correlation(ours: list[float], theirs: list[float]) -> float:
    """Spearman's, of rows that both have."""
    from scipy.stats import spearmanr

    return float(spearmanr(ours, theirs).statistic)


def picture(
    results: dict[str, list[dict[str, float]]], untrained: list[dict[str, float]], path: Path
) -> None:
    """k-NN of every row, a dot per seed, beside the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(results)
    figure, axes = plt.subplots(
        1, 2, sharey=True, figsize=(10, 1.1 + 0.38 * len(names)), layout="constrained"
    )
    ys = range(len(names))
    ours = [statistics.mean(r["knn"] for r in results[name]) for name in names]
    colors = ["#0072B2" if learned(results[name], untrained) else "#D55E00" for name in names]
    axes[0].barh(ys, [paper(name).get("k-NN", 0) for name in names], color="#999999", height=0.62)
    axes[0].set_title("Paper: ImageNet, ViT-S/16, 300 epochs", fontsize=11)
    axes[1].barh(ys, ours, color=colors, height=0.62)
    for y, name in enumerate(names):
        axes[1].plot([r["knn"] for r in results[name]], [y] * len(results[name]), "o", color="black", ms=3.5)
    level = statistics.mean(r["knn"] for r in untrained)
    axes[1].axvline(level, color="black", ls="--", lw=1)
    axes[1].annotate(" untrained", (level, -0.85), fontsize=9, annotation_clip=False)
    axes[1].set_title("Here: the demo, 0.16 M parameters\n(orange: not above untrained)", fontsize=11, pad=16)
    axes[0].set_yticks(ys, [f"{name}: {title(name)}" for name in names])
    axes[0].invert_yaxis()
    for axis in axes:
        axis.set_xlabel("k-NN top-1, %")
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def title(name: str) -> str:
    """What the row is, from the preset's description."""
    text = presets.PRESETS[name].figure.partition("Paper:")[2] or presets.PRESETS[name].figure
    head = re.split(r",? (?:k-NN|linear) \d", text.strip())[0].strip(" .")
    return head if head and not head.startswith(("k-NN", "linear")) else name.rpartition("-")[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=ROWS, metavar="PRESET", help="train.py --list_presets")
    parser.add_argument("--epochs", type=int, default=10, help="of the demo's 4,000 images (default: 10)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=Path, help="folder with train/ and val/ of class folders")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--runs", type=Path, help="keep the runs here, and go on with those that are complete"
    )
    parser.add_argument("--save", action="store_true", help="write bench/results/, with the picture")
    args = parser.parse_args()
    unknown = [name for name in args.presets if name not in presets.PRESETS]
    if unknown:
        parser.error(f"unknown presets: {', '.join(unknown)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    say = Transcript()
    with tempfile.TemporaryDirectory() as scratch:
        runs = args.runs or Path(scratch) / "runs"
        images = args.images or write_demo(runs.parent / "images")
        rows: list[str | None] = [None, *args.presets]
        jobs = [(name, seed) for seed in args.seeds for name in rows]
        results: dict[str | None, list[dict[str, float]]] = {name: [] for name in rows}
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            # rows of the same flags are one run
            keys = {name: json.dumps(None if name is None else delta(name), sort_keys=True) for name in rows}
            futures: dict[tuple[str, int], Future[dict[str, float]]] = {}
            for name, seed in jobs:
                key = keys[name], seed
                if key not in futures:
                    out = runs / f"{name or 'untrained'}-{seed}"
                    futures[key] = pool.submit(kept, name, seed, images, args.epochs, out)
            for name, seed in jobs:
                results[name].append(futures[keys[name], seed].result())
                print(f"{name or 'untrained'}, seed {seed}: {results[name][-1]}", flush=True)
    untrained = results.pop(None)
    report(say, {name: found for name, found in results.items() if name}, untrained, args)


def kept(name: str | None, seed: int, images: Path, epochs: int, out: Path) -> dict[str, float]:
    """:func:`run`, or its result where it stands in ``out`` already."""
    file = out / "ablation.json"
    if not file.exists():
        try:
            found = run(name, seed, images, epochs, out)
        except ConfigError as error:
            raise ValueError(f"{name}: {error}") from None
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def report(
    say: Transcript,
    results: dict[str, list[dict[str, float]]],
    untrained: list[dict[str, float]],
    args: argparse.Namespace,
) -> None:
    """The table, the ranking, and with --save the files."""
    say(
        f"{args.epochs} epochs of the demo, seeds {' '.join(map(str, args.seeds))}; k = 20; "
        "means, k-NN with range"
    )
    say(
        f"{'row':38} {'k-NN':>6} {'range':>13} {'linear':>7} {'entropy':>8} {'KL':>7} {'spread':>7}"
        "  paper k-NN, linear"
    )

    def line(text: str, found: list[dict[str, float]], figures: dict[str, float]) -> None:
        def mean(key: str) -> float:
            return statistics.mean(r[key] for r in found) if key in found[0] else math.nan

        def shown(value: float, width: int, digits: int) -> str:
            return " " * (width - 1) + "-" if math.isnan(value) else f"{value:{width}.{digits}f}"

        knn = [r["knn"] for r in found]
        theirs = ", ".join(f"{figures[key]:.1f}" if key in figures else "-" for key in ("k-NN", "linear"))
        say(
            f"{text:38} {mean('knn'):6.1f} {min(knn):6.1f}-{max(knn):6.1f} {mean('linear'):7.1f} "
            f"{shown(mean('teacher_entropy'), 8, 3)} {shown(mean('kl'), 7, 3)} {shown(mean('spread'), 7, 3)}"
            f"  {theirs}{'' if not figures or learned(found, untrained) else '  not learned'}"
        )

    line("untrained", untrained, {})
    for name, found in results.items():
        line(f"{name} {title(name)}"[:38], found, paper(name))
    both = [name for name in results if "k-NN" in paper(name)]
    if len(both) > 2:
        ours = [statistics.mean(r["knn"] for r in results[name]) for name in both]
        correlation = rank_correlation(ours, [paper(name)["k-NN"] for name in both])
        say(f"rank correlation with the paper's k-NN over {len(both)} rows: {correlation:.2f}")
    if args.save:
        path = save("ablation", say, {"epochs": args.epochs, "rows": results, "untrained": untrained})
        print(path)
        picture(results, untrained, RESULTS / path.parent.name / "ablation.png")


if __name__ == "__main__":
    main()
