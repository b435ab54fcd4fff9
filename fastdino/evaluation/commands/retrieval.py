"""``python -m fastdino.evaluation retrieval``, after the official ``eval_image_retrieval.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Landmark retrieval on revisited Oxford or Paris: easy, medium and hard mean average precision."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path",
        metavar="DIR",
        required=True,
        help="folder with roxford5k/ and rparis6k/, each of jpg/ and gnd_<name>.pkl; with --gnd, of images",
    )
    parser.add_argument(
        "--dataset",
        choices=("roxford5k", "rparis6k"),
        default="roxford5k",
        help="default: roxford5k",
    )
    parser.add_argument(
        "--gnd",
        metavar="FILE",
        help="ground truth of your own, .json or .pkl: imlist, qimlist, gnd (easy, hard, junk, bbx)",
    )
    parser.add_argument(
        "--imsize",
        type=command.positive,
        default=224,
        help="longer side in pixels, larger images are shrunk (default: 224; the paper's for Paris: 512)",
    )
    parser.add_argument(
        "--multiscale",
        type=command.boolean,
        default=False,
        help="mean feature of scales 1, 1/sqrt(2), 1/2 (default: false; the paper's for Paris is true)",
    )
    parser.add_argument(
        "--crop_queries",
        type=command.boolean,
        default=False,
        help="queries are their boxes, as the benchmark asks (default: false, as in the official script)",
    )
    command.cuda_argument(parser, "search")
    command.loading_arguments(parser, batch_size=32)
    command.output_argument(parser)


def run(flags: argparse.Namespace) -> Result:
    from fastdino.evaluation.descriptors import describe
    from fastdino.evaluation.features import evaluating
    from fastdino.evaluation.ground_truth import read_ground_truth
    from fastdino.evaluation.ranking import rank
    from fastdino.evaluation.retrieval import (
        benchmark,
        describer,
        image_files,
        load_image,
        retrieval_scores,
        truncated_images,
    )

    if flags.gnd:
        truth = read_ground_truth(Path(flags.gnd))
        images, query_files = image_files(truth, Path(flags.data_path))
    else:
        truth, images, query_files = benchmark(Path(flags.data_path), flags.dataset)
    if flags.crop_queries and any(query.box is None for query in truth.queries):
        raise ValueError("--crop_queries: the ground truth has queries without a box (bbx)")
    files = [*images, *query_files]
    boxes = [None] * len(images) + [query.box if flags.crop_queries else None for query in truth.queries]

    world, backbone = command.world(flags), command.backbone(flags)
    with command.progress("features") as progress, evaluating(backbone), truncated_images():
        features = describe(
            describer(backbone, flags.multiscale),
            files,
            lambda i: load_image(files[i], flags.imsize, boxes[i]),
            device=world.device,
            batch_size=flags.batch_size_per_gpu,
            num_threads=flags.num_workers,
            dtype=command.precision(flags),
            progress=progress,
            world=world,
        )
    database, queries = features[: len(images)], features[len(images) :]
    scores = retrieval_scores(
        rank(queries, database, device=world.device if flags.use_cuda else "cpu"), truth.queries
    )

    name = Path(flags.gnd).stem if flags.gnd else flags.dataset
    lines = [f"{name}: {len(images)} images, {len(query_files)} queries"]
    figures = {}
    for setting, result in scores.items():
        figures[f"mAP_{setting}"] = result.mean_ap
        figures |= {f"mP{k}_{setting}": value for k, value in result.mean_precision.items()}
        precisions = ", ".join(f"mP@{k} {value:.2f}" for k, value in result.mean_precision.items())
        left_out = sum(ap is None for ap in result.per_query)
        without = f" ({left_out} queries without positives left out)" if left_out else ""
        lines.append(f"{setting}: mAP {result.mean_ap:.2f}, {precisions}{without}")
    return Result(
        figures,
        lines,
        {
            "dataset": name,
            "image_size": flags.imsize,
            "precision": command.precision_name(flags),
            "multiscale": flags.multiscale,
            "crop_queries": flags.crop_queries,
        },
        details={
            "average_precision": [
                {"query": query.name, **{setting: result.per_query[i] for setting, result in scores.items()}}
                for i, query in enumerate(truth.queries)
            ]
        },
    )
