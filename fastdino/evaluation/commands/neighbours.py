"""``python -m fastdino.evaluation neighbours``: queries beside their nearest images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Show queries beside the images that the network finds most alike."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path", metavar="DIR", nargs="+", required=True, help="folders of images, or of class folders"
    )
    parser.add_argument(
        "--queries",
        metavar="QUERY",
        nargs="+",
        default=[],
        help="each the index of an image in sorted order, or the end of its path (default: random ones)",
    )
    parser.add_argument(
        "--num_queries", type=command.positive, default=8, help="of the random ones (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    parser.add_argument("--k", type=command.positive, default=8, help="neighbours (default: 8)")
    parser.add_argument(
        "--max_images", type=command.positive, help="search as many random images only (default: all)"
    )
    parser.add_argument(
        "--image_size",
        type=command.positive,
        default=224,
        help="side of the center crop in pixels (default: 224)",
    )
    command.loading_arguments(parser)
    command.output_argument(parser, ".")


def run(flags: argparse.Namespace) -> Result:
    import numpy as np

    from fastdino.data.manifest import build_manifest, printable
    from fastdino.evaluation import sheets
    from fastdino.evaluation.neighbours import choose_queries, nearest, sheet

    paths: list[str] = []
    classes: list[str] = []
    for folder in flags.data_path:
        manifest = build_manifest(folder)
        paths += manifest.paths
        if manifest.labels is not None:
            classes += [manifest.class_names[label] for label in manifest.labels]
    if len(paths) < 2:
        raise ValueError(f"--data_path: expected at least 2 images, got {len(paths)}")
    queries = choose_queries(flags.queries, paths, flags.num_queries, flags.seed)
    named = classes if len(classes) == len(paths) else None
    if flags.max_images and flags.max_images < len(paths):
        order = np.random.default_rng(flags.seed).permutation(len(paths)).tolist()
        kept = sorted({*queries, *order[: flags.max_images]})
        queries = [kept.index(query) for query in queries]
        paths = [paths[i] for i in kept]
        named = None if named is None else [named[i] for i in kept]
    world, backbone = command.world(flags), command.backbone(flags)
    features = command.extract(flags, backbone, paths, "features", world=world)
    if not world.main:
        return Result({}, [])
    k = min(flags.k, len(paths) - 1)
    found = nearest(features, queries, k)
    picture = sheet(paths, named, queries, found, image_size=flags.image_size)
    path = sheets.save(picture, Path(flags.output_dir) / "neighbours.png")
    rows: list[dict[str, Any]] = [
        {
            "query": paths[query],
            "neighbours": [paths[i] for i in indices],
            "cosines": [round(cosine, 6) for cosine in cosines],
        }
        for query, indices, cosines in zip(
            queries, found.indices.tolist(), found.cosines.tolist(), strict=True
        )
    ]
    lines = [
        f"{printable(row['query'])}: {row['cosines'][0]:.4f} {printable(row['neighbours'][0])}"
        for row in rows
    ]
    return Result(
        figures={},
        lines=[*lines, f"{len(queries)} queries among {len(paths)} images: {path}"],
        settings={
            "image_size": flags.image_size,
            "k": k,
            "precision": command.precision_name(flags),
            "images": len(paths),
        },
        pictures={"neighbours.png": "Queries and their nearest images"},
        details={"queries": rows},
    )
