"""``python -m fastdino.evaluation logistic``: low-shot logistic regression."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

if TYPE_CHECKING:
    from torch import Tensor

HELP = "Logistic regression on frozen features of train/, or of a share of it, evaluated on val/."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path", metavar="DIR", help="folder with train/ and val/ (or test/), each of class folders"
    )
    parser.add_argument(
        "--subset",
        metavar="SHARE",
        help="train on 1%%, 10%% or the images that a file lists, one name per line (default: all)",
    )
    parser.add_argument(
        "--lambd",
        type=float,
        default=0.1,
        help="weight decay, divided by the number of training images (default: 0.1)",
    )
    parser.add_argument(
        "--undivided",
        action="store_true",
        help="do not divide it, as the script of iBOT does",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-6,
        help="distance of the objective from its minimum at which it ends (default: 1e-6)",
    )
    parser.add_argument(
        "--max_iterations", type=command.positive, default=2000, help="of L-BFGS (default: 2000)"
    )
    parser.add_argument(
        "--image_size",
        type=command.positive,
        default=224,
        help="side of the center crop in pixels (default: 224)",
    )
    command.loading_arguments(parser)
    command.output_argument(parser, keeps="the features until the end, so that a killed run goes on")


def run(flags: argparse.Namespace) -> Result:
    from fastdino.engine import parallel
    from fastdino.evaluation.knn import matching_labels
    from fastdino.evaluation.training import splits

    for name in ("lambd", "tolerance"):
        if not 0 < getattr(flags, name) < float("inf"):
            raise ValueError(f"--{name}: expected a positive number, got {getattr(flags, name)}")
    train, test = splits(flags.data_path)
    if flags.subset:
        from fastdino.evaluation.subsets import subset

        train = subset(train, flags.subset)
    train_labels, labels = matching_labels(train, test)
    backbone, world = command.backbone(flags), command.world(flags)
    features = []
    kept = Path(flags.output_dir, "logistic_features") if flags.output_dir else None
    for name, manifest in (("train", train), ("held_out", test)):
        file = kept and kept / f"{name}.pth"
        text = f"features of {manifest.root}"
        features.append(command.extract(flags, backbone, manifest.paths, text, file=file, world=world))
    try:
        if world.main:
            result = _fit(flags, features[0], train_labels, features[1], labels)
            if kept:
                shutil.rmtree(kept)
            return result
    finally:
        parallel.after_main()
    return Result({}, [])


def _fit(
    flags: argparse.Namespace, features: Tensor, train_labels: Tensor, test_features: Tensor, labels: Tensor
) -> Result:
    from fastdino.evaluation.logistic import accuracy, logistic_regression

    n = len(features)
    decay = flags.lambd if flags.undivided else flags.lambd / n
    with command.progress("L-BFGS") as progress:
        fit = logistic_regression(
            features,
            train_labels,
            decay=decay,
            tolerance=flags.tolerance,
            max_iterations=flags.max_iterations,
            device=command.device(flags),
            progress=lambda done, gap: progress(done, flags.max_iterations),
        )
    top1, top5 = accuracy(fit, test_features, labels)
    lines = [
        f"{n} training images, {len(labels)} held-out images, {len(train_labels.unique())} classes",
        f"objective {fit.objective:.6f} at most {fit.gap:.1e} above the minimum, {fit.iterations} iterations",
    ]
    if fit.gap > flags.tolerance:
        lines.append(f"NOT CONVERGED to --tolerance {flags.tolerance:g} (see --max_iterations)")
    lines.append(f"Logistic regression: Top1: {top1:.2f}, Top5: {top5:.2f}")
    settings = {"image_size": flags.image_size, "subset": flags.subset, "lambd": flags.lambd}
    settings |= {"undivided": flags.undivided, "precision": command.precision_name(flags)}
    details = {"objective": fit.objective, "gap": fit.gap, "iterations": fit.iterations, "images": n}
    return Result({"top1": top1, "top5": top5}, lines, settings, details=details)
