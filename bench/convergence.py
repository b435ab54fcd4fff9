"""Does the fast step learn what the plain one learns? The demo's training with both, over several seeds.

python -m bench.convergence [--seeds 0 1 2] [--epochs N] [--images DIR] [--jobs 2] [--save]

Same images, crops, initial weights and schedules; one side is the trainer as it is, the other takes every
step by `bench/eager_step.py` in fp32. Low-precision rounding makes two runs differ as two seeds do, so the
claim is that the k-NN accuracies of both sides have one distribution: the means over seeds must differ by
less than the seeds do among themselves.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.eager_step import EagerStep
from bench.harness import Transcript, save
from fastdino.config import Config, config_from_flags
from fastdino.data.demo import write_demo
from fastdino.data.loader import Crops
from fastdino.engine.metrics import Clock
from fastdino.engine.schedules import Hyper
from fastdino.engine.step import TrainStep
from fastdino.engine.trainer import Trainer


class PlainStep(TrainStep):
    """The trainer's step, computed by :class:`EagerStep`."""

    def __init__(self, inner: TrainStep, config: Config, first: Hyper):
        super().__init__(inner.method, inner.updater, dtype=torch.float32)
        self.eager = EagerStep(inner.method, first, clip=config.optim.clip_grad)

    def enqueue(self, batches: Iterator[Crops], hyper: Hyper, stop: Callable[[], bool] = bool) -> None:
        clock = Clock(self.sums.device)
        self.eager.hyper = hyper
        for group, decay in zip(self.eager.optimizer.param_groups, (hyper.weight_decay, 0.0), strict=True):
            group.update(lr=hyper.lr, weight_decay=decay)
        crops = next(batches)
        clock.lap("data")
        loss = self.eager(crops)
        clock.lap("forward")
        self.ring.push(torch.tensor([loss, math.nan, math.nan, 0.0, 0.0, 1.0]), clock)


def accuracy(config: Config, plain: bool) -> float:
    """k-NN top-1 in percent (k = 20) of the teacher at the end of a run."""
    torch.set_num_threads(1)  # as the demo
    trainer = Trainer(config)
    if plain:
        trainer.engine.step = PlainStep(trainer.engine.step, config, trainer.schedule(0))
    out = trainer.fit()
    return json.loads((out / "eval.jsonl").read_text().splitlines()[-1])["knn"]["20"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="none takes the demo's")
    parser.add_argument("--images", type=Path, help="demo images that were written before")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    say = Transcript()
    with tempfile.TemporaryDirectory() as scratch:
        images = args.images or write_demo(Path(scratch) / "images")
        flags: dict[str, Any] = dict(preset="demo", logger="none", report=False, log_every=500)
        flags |= dict(data_path=images / "train", eval_data_path=images / "val", eval_every=0)
        flags |= {"epochs": args.epochs} if args.epochs else {}
        runs = [(side, seed) for seed in args.seeds for side in ("plain", "fast")]
        configs = [
            config_from_flags(**flags, seed=seed, output_dir=Path(scratch) / f"{side}-{seed}")
            for side, seed in runs
        ]
        found: dict[str, list[float]] = {"plain": [], "fast": []}
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            scores = pool.map(accuracy, configs, [side == "plain" for side, _ in runs])
            for (side, seed), score in zip(runs, scores, strict=True):
                found[side].append(score)
                print(f"seed {seed}, {side} step: k-NN {score:.1f} %", flush=True)
    length = f"{args.epochs} epochs" if args.epochs else "the demo preset"
    say(f"k-NN top-1 (k = 20) after {length}")
    say("step   " + "".join(f"  seed {seed}" for seed in args.seeds) + "    mean  deviation")
    for side, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        row = "".join(f"{value:8.1f}" for value in values)
        say(f"{side:7}{row}{statistics.mean(values):8.1f}{spread:11.1f}")
    if args.save:
        print(save("convergence", say, {"seeds": args.seeds, "epochs": args.epochs, "knn": found}))


if __name__ == "__main__":
    main()
