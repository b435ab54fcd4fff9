"""``python -m fastdino.evaluation jaccard``: the attention as a segmentation (paper, figure 4)."""

from __future__ import annotations

import argparse

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Overlap (intersection over union) of attention masks and ground-truth masks."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument("--data_path", metavar="DIR", required=True, help="folder of images (recursive)")
    parser.add_argument(
        "--mask_path",
        metavar="DIR",
        required=True,
        help="folder of mask PNGs with the same relative names: 0 background, 255 void",
    )
    parser.add_argument(
        "--image_size", type=command.positive, default=480, help="side in pixels (default: 480)"
    )
    parser.add_argument(
        "--threshold",
        type=command.share,
        default=0.6,
        help="share of the attention a mask holds (default: 0.6)",
    )
    command.output_argument(parser)


def run(flags: argparse.Namespace) -> Result:
    from fastdino.evaluation.jaccard import jaccard, pair_masks

    images, masks = pair_masks(flags.data_path, flags.mask_path)
    backbone = command.backbone(flags)
    with command.progress("attention masks") as progress:
        result = jaccard(
            backbone,
            images,
            masks,
            image_size=flags.image_size,
            threshold=flags.threshold,
            device=command.device(flags),
            progress=progress,
        )
    counted = sum(score is not None for score in result.per_image)
    return Result(
        figures={"jaccard": result.mean},
        lines=[
            f"Jaccard of attention masks: {result.mean:.2f} "
            f"(best head per object, {counted} images, {flags.threshold:g} of the mass)"
        ],
        settings={"image_size": flags.image_size, "threshold": flags.threshold},
    )
