"""``python -m fastdino.evaluation finetune``: the whole network trained on labels with DeiT's recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Fine-tune the network on train/ with the recipe of DeiT and evaluate it on val/."

_RECIPE: tuple[tuple[str, Any, str], ...] = (
    ("epochs", command.positive, "default: 300; cifar: 1000"),
    ("lr", float, "learning rate for a batch of 512 (default: 5e-4; cifar: 5e-6; inat: 5e-5)"),
    ("min_lr", float, "learning rate at the end (default: 1e-5)"),
    ("warmup_epochs", int, "default: 5"),
    ("warmup_lr", float, "learning rate at the start (default: 1e-6)"),
    ("weight_decay", float, "default: 0.05"),
    (
        "layer_decay",
        command.share,
        "learning rate of a block by that of the next (default: 1; often 0.65-0.75)",
    ),
    ("drop_path", float, "stochastic depth of the last block (default: 0.1)"),
    ("smoothing", float, "label smoothing (default: 0.1)"),
    ("mixup", float, "alpha of mixup, 0 for none (default: 0.8)"),
    ("cutmix", float, "alpha of CutMix, 0 for none (default: 1)"),
    ("reprob", float, "probability of random erasing (default: 0.25; cifar: 0)"),
    ("rand_augment", command.boolean, "RandAugment, rand-m9-mstd0.5-inc1 (default: true)"),
    ("repeats", command.positive, "crops of an image in an epoch it is in (default: 3)"),
    ("head_scale", float, "of the new classifier's weights at the start (default: 0.001)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path", metavar="DIR", help="folder with train/ and val/ (or test/), each of class folders"
    )
    parser.add_argument(
        "--image_size", type=command.positive, default=224, help="side of the crops in pixels (default: 224)"
    )
    parser.add_argument(
        "--val_freq", type=command.positive, default=1, help="epochs between evaluations (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--recipe",
        choices=("imagenet", "cifar", "inat"),
        default="imagenet",
        help="what the flags below are by default; cifar is meant for a batch of 768 in all, the others for "
        "1024 (default: imagenet)",
    )
    for name, kind, text in _RECIPE:
        recipe.add_argument(f"--{name}", type=kind, help=text)
    command.loading_arguments(parser)
    command.output_argument(parser)


def run(flags: argparse.Namespace) -> Result:
    from dataclasses import asdict

    from fastdino.evaluation.feature_file import digest_of_images, digest_of_weights
    from fastdino.evaluation.finetune import FineTuning, build_classifier
    from fastdino.evaluation.knn import matching_labels
    from fastdino.evaluation.training import enough_images, splits

    recipe = _recipe(flags)
    train, test = splits(flags.data_path)
    train_labels, labels = matching_labels(train, test)
    backbone, world, dtype = command.backbone(flags), command.world(flags), command.precision(flags)
    enough_images(world, train, test)
    batch, classes = flags.batch_size_per_gpu * world.size, len(train.class_names)
    settings = {**asdict(recipe), "image_size": flags.image_size, "batch_size": batch, "seed": flags.seed}
    kept_with = {
        **settings,
        "classes": classes,
        "images": digest_of_images(train.paths, train_labels.tolist()),
    }
    kept_with |= {"held_out": digest_of_images(test.paths, labels.tolist())}
    kept_with |= {"precision": str(dtype), "weights": digest_of_weights(backbone)}
    model = build_classifier(backbone, classes, recipe, flags.image_size, world.device, flags.seed)
    tuning = FineTuning(
        model,
        train,
        train_labels,
        test,
        labels,
        recipe,
        world,
        batch,
        image_size=flags.image_size,
        dtype=dtype,
        num_threads=flags.num_workers,
        seed=flags.seed,
        root=Path(flags.output_dir, "finetune") if flags.output_dir else None,
        settings=kept_with,
    )
    with command.progress("finetune") as progress:
        history = tuning.run(val_freq=flags.val_freq, on_step=progress, on_epoch=_say if world.main else None)
    best = max((entry for entry in history if "top1" in entry), key=lambda entry: entry["top1"])
    lines = [
        f"{len(train)} training images, {len(test)} held-out images, {classes} classes",
        f"Fine-tuned: best Top1: {best['top1']:.2f}, Top5: {best['top5']:.2f} (epoch {best['epoch']}), "
        f"last Top1: {history[-1]['top1']:.2f}, Top5: {history[-1]['top5']:.2f}",
    ]
    figures = {"top1": best["top1"], "top5": best["top5"]}
    return Result(figures, lines, settings, details={"epochs": history})


def _say(entry: dict[str, Any]) -> None:
    shown = f"loss {entry['loss']:.4f}"
    if "top1" in entry:
        shown += f" | Top1 {entry['top1']:.2f}"
    print(f"Epoch {entry['epoch']}: {shown}", flush=True)


def _recipe(flags: argparse.Namespace) -> Any:
    """The recipe of --recipe with what the flags change. Raises ValueError naming a flag."""
    from dataclasses import replace

    from fastdino.evaluation.finetune import RECIPES

    given = {name: getattr(flags, name) for name, _, _ in _RECIPE if getattr(flags, name) is not None}
    for name, value in given.items():
        at_most = {"drop_path": 0.99, "smoothing": 1.0, "reprob": 1.0}.get(name, float("inf"))
        if name != "rand_augment" and not 0 <= value <= at_most:
            raise ValueError(f"--{name}: expected a number from 0 to {at_most:g}, got {value}")
    if flags.seed < 0:
        raise ValueError(f"--seed: expected 0 or more, got {flags.seed}")
    if "reprob" in given:
        given["erase"] = given.pop("reprob")
    return replace(RECIPES[flags.recipe], **given)
