"""``python -m fastdino.evaluation pca``: patch features as colours."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Show patch features as colours: their first three principal components."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path", metavar="PATH", required=True, help="an image, or a folder of images (recursive)"
    )
    parser.add_argument(
        "--num_images",
        type=command.positive,
        default=8,
        help="of a folder with more, as many at equal distances (default: 8)",
    )
    parser.add_argument(
        "--image_size",
        type=command.positive,
        default=448,
        help="shorter side in pixels (default: 448); the smaller a patch is in it, the finer the picture",
    )
    command.output_argument(parser, ".")


def run(flags: argparse.Namespace) -> Result:
    from fastdino.evaluation import sheets
    from fastdino.evaluation.features import list_images
    from fastdino.evaluation.pca import patch_pictures, sheet

    paths = command.spread(list_images(flags.data_path)[1], flags.num_images)
    backbone = command.vision_transformer(flags, "whose patches have features")
    with command.progress("patch features") as progress:
        pictures, shares = patch_pictures(
            backbone, paths, image_size=flags.image_size, device=command.device(flags), progress=progress
        )
    path = sheets.save(sheet(pictures, paths), Path(flags.output_dir) / "pca.png")
    text = ", ".join(f"{100 * share:.1f} %" for share in shares)
    return Result(
        figures={},
        lines=[f"{len(paths)} images; the three components hold {text} of the patches' variance: {path}"],
        settings={"image_size": flags.image_size},
        pictures={"pca.png": "Patch features: image, first three principal components, foreground"},
        details={"variance": [float(share) for share in shares]},
    )
