"""``python -m fastdino.demo``: draw a data set, pretrain a small ViT on it with DINO, and show what it
learned.

Nothing is downloaded and no label is used for training; labels and object masks only measure the result on
held-out images."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fastdino.config import Config, config_from_flags

MASSES = (0.6, 0.8)
"""Shares of a head's attention that a mask holds: figure 4 of the paper says 0.6, its appendix D 0.8."""


def _baseline_backbone(config: Config) -> Any:
    """The network before training: same seed, same weights."""
    import torch

    from fastdino.methods.dino import DINO

    torch.manual_seed(config.run.seed)
    return DINO(config).teacher.backbone


def run(out: Path, *, n_train: int = 4000, n_val: int = 1000, **flags: Any) -> dict[str, Any]:
    """Draw the images (once), train, measure and report in ``out``; returns the figures of the closing table.

    ``n_train`` and ``n_val`` are numbers of images; ``flags`` override the preset ``demo``. Figures are
    percentages on the held-out images: ``knn`` maps raw pixels, untrained and trained to top-1 by number of
    neighbours, ``jaccard`` untrained and trained to the overlap of the best head's attention mask with the
    object."""
    import torch

    from fastdino.data.demo import write_demo

    started = time.monotonic()
    torch.set_num_threads(1)  # steps this small lose more to waiting for each other than threads gain
    images = write_demo(out / "images", n_train=n_train, n_val=n_val)
    config = config_from_flags(
        preset="demo",
        data_path=str(images / "train"),
        eval_data_path=str(images / "val"),
        output_dir=str(out),
        **flags,
    )

    from fastdino.engine.logs import append_line, keep_lines
    from fastdino.engine.trainer import Trainer
    from fastdino.evaluation.jaccard import jaccard, pair_masks
    from fastdino.report import write_report
    from fastdino.report.neighbours import MOST, spread

    trainer = Trainer(config)
    trainer.fit()
    paths, masks = pair_masks(images / "val", images / "masks" / "val")
    size = config.crops.global_crops_size
    trained, device = trainer.engine.evaluated_backbone(), trainer.world.device
    assert trained is not None
    networks = {"untrained": _baseline_backbone(config).to(device), "trained": trained}
    scores = {
        mass: {
            name: jaccard(backbone, paths, masks, image_size=size, threshold=mass, device=device).mean
            for name, backbone in networks.items()
        }
        for mass in MASSES
    }
    log = out / "eval.jsonl"
    keep_lines(log, lambda record: "jaccard" not in record)
    append_line(
        log,
        {
            "step": trainer.step,
            "epoch": trainer.step // trainer.steps_per_epoch,
            "jaccard": scores[MASSES[0]],
        },
    )
    shown = range(0, len(paths), max(1, len(paths) // 8))
    report = write_report(
        out,
        backbone=trained,
        image_paths=[paths[i] for i in shown][:8],
        mask_paths=[masks[i] for i in shown][:8],
        bank_paths=spread(trainer.manifest.paths, MOST),
        device=device,
    )
    return {
        "knn": _knn_figures(log),
        "jaccard": scores,
        "report": report,
        "seconds": time.monotonic() - started,
        "images": len(trainer.manifest),
        "steps": trainer.step,
    }


def _knn_figures(log: Path) -> dict[str, dict[str, float]]:
    import json

    records = [json.loads(line) for line in log.read_text().splitlines()]
    knn = [record for record in records if "knn" in record]
    return {"raw_pixels": knn[0]["raw_pixels"], "untrained": knn[0]["untrained"], "trained": knn[-1]["knn"]}


def show(figures: dict[str, Any]) -> None:
    """The closing table."""
    from rich.console import Console
    from rich.table import Table

    ks = list(figures["knn"]["trained"])
    table = Table(title="What the network learned without labels (held-out images)", title_justify="left")
    table.add_column("features")
    for k in ks:
        table.add_column(f"k-NN top-1, k={k}", justify="right")
    for mass in figures["jaccard"]:
        table.add_column(f"Jaccard of attention, {mass:.0%} mass", justify="right")
    for key, label in (
        ("raw_pixels", "raw pixels"),
        ("untrained", "ViT, untrained"),
        ("trained", "ViT, DINO teacher"),
    ):
        overlaps = [by_network.get(key) for by_network in figures["jaccard"].values()]
        style = "bold green" if key == "trained" else ""
        scores = [f"{figures['knn'][key][k]:.1f} %" for k in ks]
        scores += ["-" if overlap is None else f"{overlap:.1f} %" for overlap in overlaps]
        table.add_row(label, *scores, style=style)
    console = Console(soft_wrap=True)
    console.print(table)
    minutes, seconds = divmod(round(figures["seconds"]), 60)
    console.print(
        f"{figures['steps']} steps on {figures['images']} images; {minutes} min {seconds} s in all",
        highlight=False,
    )
    console.print(f"report: {figures['report']}", markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m fastdino.demo")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, order and crops (the images stay the same)"
    )
    args = parser.parse_args()
    show(run(args.output_dir, seed=args.seed))


if __name__ == "__main__":
    main()
