"""``python -m fastdino.evaluation linear``, after the official ``eval_linear.py``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

if TYPE_CHECKING:
    import torch

    from fastdino.data.manifest import Manifest
    from fastdino.engine.parallel import World
    from fastdino.evaluation.linear import ProbeFeatures, Source, Trained

HELP = "Train a linear classifier on frozen features of train/ and evaluate it on val/."

_KEPT = "linear_features"
"""Folder of the features that a killed run goes on with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path", metavar="DIR", help="folder with train/ and val/ (or test/), each of class folders"
    )
    parser.add_argument(
        "--n_last_blocks",
        type=command.positive,
        help="blocks whose [CLS] tokens are joined (default: 4 or all, as of ViT-S)",
    )
    parser.add_argument(
        "--avgpool_patchtokens",
        type=command.boolean,
        default=False,
        help="join the mean patch token too, with --n_last_blocks 1 (default: false; ViT-B has it)",
    )
    parser.add_argument("--epochs", type=command.positive, default=100, help="default: 100")
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=[0.001],
        help="learning rates for 256 images, all trained at once; the best is reported (default: 0.001)",
    )
    parser.add_argument(
        "--val_freq", type=command.positive, default=1, help="epochs between evaluations (default: 1)"
    )
    parser.add_argument(
        "--num_labels", type=command.positive, help="classes of the layer (default: those of train/)"
    )
    parser.add_argument(
        "--features",
        choices=("live", "cached"),
        default="live",
        help="live: new crops in every epoch, the protocol of the paper; cached: each image goes through the "
        "network --cached_views times, an approximation",
    )
    parser.add_argument(
        "--cached_views",
        type=int,
        default=0,
        help="random crops kept of an image with --features cached; 0 is the center crop (default: 0)",
    )
    parser.add_argument(
        "--image_size", type=command.positive, default=224, help="side of the crops in pixels (default: 224)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate, see --linear_weights")
    parser.add_argument(
        "--linear_weights",
        metavar="PATH",
        help="layer for --evaluate: an official file, or a folder of this command (default: --output_dir)",
    )
    command.loading_arguments(parser)
    command.output_argument(parser, keeps="features and state until the end, so that a killed run goes on")


def run(flags: argparse.Namespace) -> Result:
    from fastdino.evaluation.linear import ProbeFeatures

    _check(flags)
    backbone = command.backbone(flags)
    blocks = flags.n_last_blocks or min(4, getattr(backbone, "depth", 4 if _has_blocks(backbone) else 1))
    network = ProbeFeatures(backbone, blocks, flags.avgpool_patchtokens)
    settings = {
        "image_size": flags.image_size,
        "n_last_blocks": blocks,
        "avgpool_patchtokens": flags.avgpool_patchtokens,
    }
    return _evaluate(flags, network, settings) if flags.evaluate else _train(flags, network, settings)


def _has_blocks(network: Any) -> bool:
    return hasattr(network, "probe_features") or hasattr(network, "get_intermediate_layers")


def _check(flags: argparse.Namespace) -> None:
    if not all(0 < lr < float("inf") for lr in flags.lr):
        raise ValueError(f"--lr: expected positive numbers, got {flags.lr}")
    if flags.cached_views < 0 or (flags.cached_views and flags.features == "live"):
        raise ValueError("--cached_views: expected 0, or a number of crops with --features cached")
    if flags.linear_weights and not flags.evaluate:
        raise ValueError("--linear_weights: expected --evaluate with it")
    if flags.evaluate and not (flags.linear_weights or flags.output_dir):
        raise ValueError("--evaluate: expected --linear_weights, or --output_dir of a training")
    if flags.seed < 0:
        raise ValueError(f"--seed: expected 0 or more, got {flags.seed}")


def _train(flags: argparse.Namespace, network: ProbeFeatures, settings: dict[str, Any]) -> Result:
    from fastdino.evaluation.feature_file import digest_of_images, digest_of_weights
    from fastdino.evaluation.knn import matching_labels
    from fastdino.evaluation.linear import train_linear
    from fastdino.evaluation.training import enough_images, splits

    train, test = splits(flags.data_path)
    train_labels, labels = matching_labels(train, test)
    classes = flags.num_labels or len(train.class_names)
    if classes < len(train.class_names):
        raise ValueError(f"--num_labels: {train.root} has {len(train.class_names)} classes, got {classes}")
    world = command.world(flags)
    enough_images(world, train, test)
    batch = flags.batch_size_per_gpu * world.size
    settings |= {"lr": flags.lr, "epochs": flags.epochs, "batch_size": batch, "num_labels": classes}
    settings |= {"features": flags.features, "cached_views": flags.cached_views, "seed": flags.seed}
    settings |= {"precision": command.precision_name(flags)}
    held_out = _features(flags, network, test, world, "held_out")
    kept_with = {**settings, "images": digest_of_images(train.paths, train_labels.tolist())}
    kept_with |= {"held_out": digest_of_images(test.paths, labels.tolist())}
    kept_with |= {"weights": digest_of_weights(network)}
    with command.progress("linear") as progress:
        trained = train_linear(
            _source(flags, network, train, train_labels, world, batch),
            held_out,
            labels[world.rank :: world.size],
            num_labels=classes,
            lrs=flags.lr,
            batch=batch,
            epochs=flags.epochs,
            world=world,
            val_freq=flags.val_freq,
            seed=flags.seed,
            root=Path(flags.output_dir, "linear") if flags.output_dir else None,
            settings=kept_with,
            on_step=progress,
            on_epoch=_say if world.main else None,
        )
    if flags.output_dir and world.main:
        shutil.rmtree(Path(flags.output_dir, _KEPT))
    lines = [f"{len(train)} training images, {len(test)} held-out images, {classes} classes"]
    return _result(trained, flags.lr, lines, settings)


def _say(entry: dict[str, Any]) -> None:
    shown = " ".join("diverged" if loss is None else f"{loss:.4f}" for loss in entry["loss"])
    if "top1" in entry:
        shown += " | Top1 " + " ".join(f"{value:.2f}" for value in entry["top1"])
    print(f"Epoch {entry['epoch']}: loss {shown}", flush=True)


def _result(trained: Trained, lrs: list[float], lines: list[str], settings: dict[str, Any]) -> Result:
    last, rows = trained.history[-1], []
    for i, lr in enumerate(lrs):
        top1, top5, epoch = trained.best_of(i)
        rows.append({"lr": lr, "top1": top1, "top5": top5, "epoch": epoch, "last_top1": last["top1"][i]})
        lines.append(
            f"lr {lr:g}: best Top1: {top1:.2f}, Top5: {top5:.2f} (epoch {epoch}), "
            f"last Top1: {last['top1'][i]:.2f}, Top5: {last['top5'][i]:.2f}"
        )
    best = trained.best
    figures = {"top1": best["top1"], "top5": best["top5"], "last_top1": max(last["top1"])}
    if len(lrs) > 1:
        lines.append(
            f"Best: lr {lrs[best['head']]:g}, Top1: {best['top1']:.2f}, Top5: {best['top5']:.2f} "
            f"(epoch {best['epoch']})"
        )
    return Result(figures, lines, settings, details={"rates": rows, "epochs": trained.history})


def _evaluate(flags: argparse.Namespace, network: ProbeFeatures, settings: dict[str, Any]) -> Result:
    import torch

    from fastdino.engine.checkpoint import CheckpointError
    from fastdino.evaluation.linear import accuracy, load_linear
    from fastdino.evaluation.training import enough_images

    test, labels = _labelled(flags.data_path)
    path = Path(flags.linear_weights) if flags.linear_weights else Path(flags.output_dir, "linear")
    try:
        weight, bias = load_linear(path)
    except CheckpointError as error:
        raise ValueError(f"--linear_weights: {error}") from error
    classes = int(labels.max()) + 1
    if len(weight) < classes:
        raise ValueError(f"--linear_weights: {path} knows {len(weight)} classes, {test.root} has {classes}")
    world = command.world(flags)
    enough_images(world, test)
    features = _features(flags, network, test, world)
    if features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"--linear_weights: {path} takes {weight.shape[1]} features, the network gives "
            f"{features.shape[1]} with --n_last_blocks {network.n} and --avgpool_patchtokens "
            f"{str(flags.avgpool_patchtokens).lower()}"
        )
    with torch.inference_mode():
        mine = labels[world.rank :: world.size]
        top1, top5 = accuracy(weight.to(world.device), bias.to(world.device), features, mine)
    line = f"Accuracy of the network on the {len(test)} test images: Top1: {top1:.2f}, Top5: {top5:.2f}"
    return Result({"top1": top1, "top5": top5, "last_top1": top1}, [line], settings)


def _labelled(data_path: str | None) -> tuple[Manifest, torch.Tensor]:
    """The held-out images and their labels, by the classes of train/ where there is one."""
    import torch

    from fastdino.evaluation.knn import matching_labels
    from fastdino.evaluation.training import held_out, splits

    if data_path and not Path(data_path, "train").is_dir():
        test = held_out(data_path)
        if test.labels is None:
            raise ValueError(f"--evaluate: expected one folder per class in {test.root}")
        return test, torch.from_numpy(test.labels)
    train, test = splits(data_path)
    return test, matching_labels(train, test)[1]


def _source(
    flags: argparse.Namespace,
    network: ProbeFeatures,
    train: Manifest,
    labels: torch.Tensor,
    world: World,
    batch: int,
) -> Source:
    from fastdino.evaluation.linear import Cached, Live

    live = Live(
        network,
        train.paths,
        labels,
        world,
        batch,
        flags.image_size,
        flags.seed,
        command.precision(flags),
        flags.num_workers,
    )
    if flags.features == "live":
        return live
    mine = slice(world.rank, None, world.size)
    if flags.cached_views:
        with command.progress(f"features of {train.root}") as progress:
            features = live.views(flags.cached_views, progress)
    else:
        features = _features(flags, network, train, world, "train")[None]
    return Cached(features, labels[mine], world, batch, len(train), flags.seed)


def _features(
    flags: argparse.Namespace, network: ProbeFeatures, images: Manifest, world: World, name: str = ""
) -> torch.Tensor:
    """Features of this process's share of the images, with a ``name`` kept in the output folder."""
    paths = images.paths[world.rank :: world.size]
    file = None
    if flags.output_dir and name:
        kind = f"{network.n}{'-avgpool' if network.avgpool else ''}"
        file = Path(flags.output_dir, _KEPT, f"{name}-{kind}-{world.rank}-of-{world.size}.pth")
    return command.extract(flags, network, paths, f"features of {images.root}", file=file)
