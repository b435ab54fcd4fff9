"""Do the official code and this one learn alike? The same images and flags, several seeds of each.

python -m bench.fidelity --official PATH [--images DIR] [--seeds 0 1 2] [--epochs N] [--save]

PATH is a checkout of facebookresearch/dino (see official.py), DIR holds train/ and test/ with a folder per
class, of which the first images are taken; without it the demo's are drawn. One side is the trainer as it is,
in its precision here. The other is the official model with its initial weights, loss, schedules, optimizer
and `train_one_epoch`, in fp32 as a CPU allows, fed by a DataLoader with the official transform in Pillow
(official_crops.py). Nothing is shared but images and flags: weights, order and crops are drawn by each side.

After each epoch both teachers get the same k-NN (k = 20); the mean loss of each epoch, which varies less, is
compared as well. Two codes that learn alike differ by no more than seeds do: the difference of the final
means must lie within the 95 % interval about none (Welch's t-test), whose half width is the smallest
difference that this experiment can see, and is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from bench import official
from bench.harness import Transcript, save
from bench.official_crops import OfficialDataset
from fastdino.config import Config, config_from_flags
from fastdino.data.demo import write_demo
from fastdino.data.manifest import build_manifest
from fastdino.engine.monitor import Monitor

SIZES = {"train": 4000, "test": 2000}  # images
RECIPE: dict[str, Any] = dict(preset="demo", eval_every=1, report=False, logger="none", resume="none")
EPOCHS = 10
FIGURES = {"knn": ("k-NN top-1 (k = 20), %", 1), "loss": ("mean loss", 2)}  # label, digits
SIDES = {"official": "#D55E00", "fastdino": "#0072B2"}  # Okabe and Ito's colours

Curve = dict[str, list[float]]
Verdict = dict[str, float | bool]


def subset(source: Path, target: Path, sizes: dict[str, int] = SIZES) -> Path:
    """``target`` with train/ and test/: links to the first images of each class in ``source``."""
    for part, n in sizes.items():
        classes = sorted(folder for folder in (source / part).iterdir() if folder.is_dir())
        for folder in classes:
            (target / part / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[: n // len(classes)]:
                (target / part / folder.name / image.name).symlink_to(image.resolve())
    return target


# ------------------------------------------------------------------------------------------------- both sides


def fastdino(config: Config) -> Curve:
    """k-NN in percent before training and after each epoch, mean loss of each epoch, CPU seconds in all."""
    from fastdino.engine.trainer import Trainer

    torch.set_num_threads(1)
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        out = Trainer(config).fit()
    logs = [(out / name).read_text().splitlines() for name in ("eval.jsonl", "log.txt")]
    knn, loss = (list(map(json.loads, lines)) for lines in logs)
    return {
        "knn": [record["knn"]["20"] for record in knn],
        "loss": [record["train_loss"] for record in loss],
        "cpu": [time.process_time() - began],
    }


def theirs(config: Config, path: Path) -> Curve:
    """The same of the official code: what its ``train_dino`` does, in one process that may have no GPU."""
    torch.set_num_threads(1)
    began = time.process_time()
    code, optim, loss = official.load(path), config.optim, config.loss
    utils, main = code.utils, code.main_dino
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest = build_manifest(config.data.data_path)
    monitor = Monitor(config.eval, config.crops.global_crops_size, manifest, device)
    utils.fix_random_seeds(config.run.seed)
    random.seed(config.run.seed)
    dataset = Labelled(OfficialDataset(manifest.paths, config.crops))
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)
    loader = DataLoader(dataset, optim.batch_size_per_gpu, sampler=sampler, drop_last=True)

    student, teacher = (official.network(code, config).to(device) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    for p in teacher.parameters():
        p.requires_grad = False
    wrapped = Alone(student)
    temperatures = loss.warmup_teacher_temp, loss.teacher_temp, loss.warmup_teacher_temp_epochs
    criterion = main.DINOLoss(
        config.model.out_dim,
        config.crops.local_crops_number + 2,
        *temperatures,
        optim.epochs,
        student_temp=loss.student_temp,
        center_momentum=loss.center_momentum,
    ).to(device)
    optimizer = torch.optim.AdamW(utils.get_params_groups(wrapped))
    steps = optim.epochs, len(loader)
    rate = optim.lr * optim.batch_size_per_gpu / 256
    schedules = (
        utils.cosine_scheduler(rate, optim.min_lr, *steps, warmup_epochs=optim.warmup_epochs),
        utils.cosine_scheduler(optim.weight_decay, optim.weight_decay_end, *steps),
        utils.cosine_scheduler(loss.momentum_teacher, 1, *steps),
    )
    args = argparse.Namespace(
        epochs=optim.epochs, clip_grad=optim.clip_grad, freeze_last_layer=optim.freeze_last_layer
    )

    knn, losses = [monitor.knn(teacher.backbone)["20"]], []
    for epoch in range(optim.epochs):
        sampler.set_epoch(epoch)
        with as_on_a_gpu(device):
            means = main.train_one_epoch(
                wrapped, teacher, teacher, criterion, loader, optimizer, *schedules, epoch, None, args
            )
        losses.append(means["loss"])
        knn.append(monitor.knn(teacher.backbone)["20"])
    return {"knn": knn, "loss": losses, "cpu": [time.process_time() - began]}


def kept(run: Callable[[Config], Curve], config: Config, file: Path) -> Curve:
    """``run(config)``, or its result where it stands in ``file`` already."""
    if not file.exists():
        found = run(config)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


class Labelled(Dataset[tuple[list[Tensor], int]]):
    """Crops with a label, which the official loop takes and does not read."""

    def __init__(self, inner: OfficialDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.inner[index], 0


class Alone(nn.Module):
    """What DistributedDataParallel is to one process."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, crops: list[Tensor]) -> Tensor:
        return self.module(crops)


@contextlib.contextmanager
def as_on_a_gpu(device: torch.device) -> Iterator[None]:
    """Lets the official loop, which asks for a GPU by name, run on the CPU; in either case silently."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of its names of autocast, old to this PyTorch
        if device.type == "cpu":
            stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, **options: tensor))
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda: None))
        yield


# --------------------------------------------------------------------------------------------------- verdict


def verdict(ours: list[float], theirs: list[float]) -> Verdict:
    """Welch's comparison of final accuracies: ``difference`` of the means (ours less theirs), ``visible``
    (the half width of its 95 % interval), ``p``, and whether the difference is ``within`` the noise of seeds.
    """
    from scipy import stats

    difference = statistics.mean(ours) - statistics.mean(theirs)
    parts = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    if not sum(parts):
        return {
            "difference": difference,
            "visible": 0.0,
            "p": float(not difference),
            "within": not difference,
        }
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (ours, theirs), strict=True)
    )
    visible = float(stats.t.ppf(0.975, freedom)) * math.sqrt(sum(parts))
    p = 2 * float(stats.t.sf(abs(difference) / math.sqrt(sum(parts)), freedom))
    return {"difference": difference, "visible": visible, "p": p, "within": abs(difference) <= visible}


def report(say: Transcript, found: dict[str, list[Curve]], seeds: list[int]) -> dict[str, Verdict]:
    """The tables, and a verdict on each figure at the end if there is more than one seed."""
    results = {}
    for figure, (title, digits) in FIGURES.items():
        say(f"{title}, by epoch")
        for side, curves in found.items():
            for seed, curve in zip(seeds, curves, strict=True):
                row = "".join(f"{value:6.{digits}f}" for value in curve[figure])
                spent = f"   {curve['cpu'][0]:6.0f} s of CPU" if figure == "knn" else ""
                say(f"{side:9} seed {seed:<3}{row}{spent}")
        if len(seeds) < 2:
            continue
        ends = {side: [curve[figure][-1] for curve in curves] for side, curves in found.items()}
        for side, values in ends.items():
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            say(f"{side:9} at the end {mean:.{digits + 1}f}, deviation {deviation:.{digits + 1}f}")
        results[figure] = result = verdict(ends["fastdino"], ends["official"])
        say(
            f"difference {result['difference']:+.{digits + 1}f}, p = {result['p']:.2f}; one beyond "
            f"{result['visible']:.{digits + 1}f} would be seen: "
            + ("within the noise of seeds" if result["within"] else "NOT within the noise of seeds")
        )
    return results


def picture(found: dict[str, list[Curve]], title: str, path: Path) -> None:
    """Every run's curves, and the means of both sides."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(1, len(FIGURES), figsize=(11, 4.2), layout="constrained")
    for panel, (figure, (label, _)) in zip(axes, FIGURES.items(), strict=True):
        for (side, curves), style, marker in zip(found.items(), ("--", "-"), "so", strict=True):
            runs = [curve[figure] for curve in curves]
            epochs = range(int(figure == "loss"), len(curves[0]["knn"]))
            for run in runs:
                panel.plot(epochs, run, ls=style, lw=1, color=SIDES[side], alpha=0.45)
            means = [statistics.mean(values) for values in zip(*runs, strict=True)]
            name = f"{side}, mean of {len(runs)} seeds"
            panel.plot(epochs, means, ls=style, lw=2.4, marker=marker, ms=4, color=SIDES[side], label=name)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    drawing.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, required=True, metavar="PATH")
    parser.add_argument("--images", type=Path, metavar="DIR", help="train/ and test/ of class folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--train", type=int, default=SIZES["train"], help="images to train with")
    parser.add_argument("--test", type=int, default=SIZES["test"], help="held-out images")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--runs", type=Path, help="keep the runs here, and go on with those that are complete"
    )
    parser.add_argument("--save", action="store_true", help="write bench/results/, with the picture")
    args = parser.parse_args()
    official.load(args.official)  # says what is wrong with it before anything is trained
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    say = Transcript()
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        if args.images is None:
            write_demo(images, n_train=args.train, n_val=args.test)
            (images / "val").rename(images / "test")
        else:
            for part in SIZES:
                if not (args.images / part).is_dir():
                    parser.error(f"--images {args.images}: expected folders train/ and test/, no {part}")
            subset(args.images, images, {"train": args.train, "test": args.test})
        n = sum(1 for _ in images.glob("train/*/*"))
        flags = RECIPE | dict(epochs=args.epochs, data_path=images / "train", eval_data_path=images / "test")
        configs = [
            config_from_flags(**flags, seed=seed, output_dir=(args.runs or Path(scratch)) / f"seed-{seed}")
            for seed in args.seeds
        ]
        runs: dict[str, list[Any]] = {side: [] for side in SIDES}
        found: dict[str, list[Curve]] = {}
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            for config in configs:
                for side, run in (("official", partial(theirs, path=args.official)), ("fastdino", fastdino)):
                    runs[side].append(
                        pool.submit(kept, run, config, Path(f"{config.run.output_dir}-{side}.json"))
                    )
            for side, pending in runs.items():
                found[side] = [future.result() for future in pending]
    title = f"{args.images.name if args.images else 'demo'}, {n} images, {args.epochs} epochs"
    say(title)
    results = report(say, found, args.seeds)
    if args.save:
        record = {"seeds": args.seeds, "epochs": args.epochs, "recipe": RECIPE, "runs": found}
        path = save("fidelity", say, record | {"verdicts": results})
        print(path)
        picture(found, f"Official code and this one, {title}", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
