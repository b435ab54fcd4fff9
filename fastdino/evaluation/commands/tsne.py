"""``python -m fastdino.evaluation tsne``: a map of the classes (paper, appendix H)."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Draw a map of the classes: t-SNE of their mean features."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path", metavar="DIR", required=True, help="folder of class folders, or one with val/ or test/"
    )
    parser.add_argument("--perplexity", type=float, default=20.0, help="default: 20, less for few classes")
    parser.add_argument(
        "--learning_rate", type=float, default=200.0, help="default: 200, less for few classes"
    )
    parser.add_argument("--iterations", type=_iterations, default=5000, help="default: 5000")
    parser.add_argument(
        "--dimensions", type=command.positive, default=30, help="after the PCA before it (default: 30)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--thumbnails", action="store_true", help="draw the first image of every class")
    parser.add_argument(
        "--image_size",
        type=command.positive,
        default=224,
        help="side of the center crop in pixels (default: 224)",
    )
    command.loading_arguments(parser)
    command.output_argument(parser, ".")


def _iterations(text: str) -> int:
    if int(text) < 250:
        raise argparse.ArgumentTypeError(f"expected at least 250, got {text}")
    return int(text)


def run(flags: argparse.Namespace) -> Result:
    import numpy as np

    from fastdino.data.manifest import build_manifest, printable
    from fastdino.evaluation import sheets
    from fastdino.evaluation.features import center_crop, read_image
    from fastdino.evaluation.plan import held_out_folder
    from fastdino.evaluation.tsne import (
        capped_learning_rate,
        capped_perplexity,
        class_means,
        embed,
        scatter,
        write_csv,
    )

    held_out = held_out_folder(flags.data_path) or flags.data_path
    manifest = build_manifest(held_out)
    if manifest.labels is None:
        raise ValueError(f"--data_path: expected class folders in {held_out}, found images without classes")
    present = len(np.unique(manifest.labels))
    perplexity = capped_perplexity(flags.perplexity, present)
    learning_rate = capped_learning_rate(flags.learning_rate, present)
    world, backbone = command.world(flags), command.backbone(flags)
    features = command.extract(flags, backbone, manifest.paths, "features", world=world)
    if not world.main:
        return Result({}, [])
    means, classes = class_means(features.numpy(), manifest.labels)
    names = [printable(manifest.class_names[i]) for i in classes]
    places = embed(
        means,
        dimensions=flags.dimensions,
        perplexity=perplexity,
        learning_rate=learning_rate,
        iterations=flags.iterations,
        seed=flags.seed,
    )
    first = [manifest.paths[int(np.argmax(manifest.labels == i))] for i in classes]
    thumbnails = [center_crop(read_image(path), 72) for path in first] if flags.thumbnails else None
    note = f"{len(names)} classes, {len(manifest)} images, perplexity {perplexity:g}"
    output = Path(flags.output_dir)
    sheets.save(scatter(places, names, note, thumbnails), output / "tsne.png")
    write_csv(output / "tsne.csv", names, places)
    lines = [f"{note}: {output / 'tsne.png'} and tsne.csv"]
    if (perplexity, learning_rate) != (flags.perplexity, flags.learning_rate):
        changed = f"perplexity {perplexity:g}, learning rate {learning_rate:g}"
        lines.insert(0, f"{present} classes are few: {changed}")
    return Result(
        figures={},
        lines=lines,
        settings={
            "image_size": flags.image_size,
            "precision": command.precision_name(flags),
            "perplexity": perplexity,
            "learning_rate": learning_rate,
            "iterations": flags.iterations,
            "seed": flags.seed,
        },
        pictures={"tsne.png": "Classes by their mean feature, t-SNE"},
    )
