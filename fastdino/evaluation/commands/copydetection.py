"""``python -m fastdino.evaluation copydetection``, after the official ``eval_copy_detection.py``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

if TYPE_CHECKING:
    from torch import Tensor

    from fastdino.models.vit import VisionTransformer

HELP = "Copy detection on Copydays: mean average precision of distorted copies that look for their originals."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path",
        metavar="DIR",
        required=True,
        help="Copydays: original/ and blocks of copies (strong/, jpegqual/<n>/, crops/<n>/)",
    )
    parser.add_argument(
        "--whitening_path",
        metavar="DIR",
        help="other images to learn whitening from (the paper's: 20000 of YFCC100M; default: no whitening)",
    )
    parser.add_argument(
        "--distractors_path",
        metavar="DIR",
        help="images that are added to the database (the paper's: 10000 of YFCC100M)",
    )
    parser.add_argument(
        "--center_covariance",
        type=command.boolean,
        default=False,
        help="whiten with the covariance, not the second moment (default: false, as in the official script)",
    )
    parser.add_argument(
        "--blocks",
        nargs="+",
        metavar="BLOCK",
        help="folders of queries, such as strong or jpegqual/3 (default: all there are)",
    )
    parser.add_argument(
        "--imsize",
        type=command.positive,
        default=320,
        help="side in pixels, images become square (default: 320)",
    )
    command.cuda_argument(parser, "search")
    command.loading_arguments(parser, batch_size=16)
    command.output_argument(parser)


def run(flags: argparse.Namespace) -> Result:
    import torch

    from fastdino.evaluation.copy_detection import copy_scores, copydays, images_of, learn_whitening

    originals, blocks = copydays(Path(flags.data_path))
    unknown = set(flags.blocks or ()) - set(blocks)
    if unknown:
        raise ValueError(f"--blocks: expected some of {', '.join(blocks)}, got {', '.join(sorted(unknown))}")
    blocks = {name: files for name, files in blocks.items() if not flags.blocks or name in flags.blocks}
    others = {}
    for flag in ("distractors_path", "whitening_path"):
        folder = getattr(flags, flag)
        others[flag] = images_of(Path(folder), "**/*") if folder else []
        if folder and not others[flag]:
            raise ValueError(f"--{flag}: no images in {folder}")

    backbone = command.vision_transformer(flags, "whose patch tokens are part of the descriptor")
    database = _describe(flags, backbone, [*originals, *others["distractors_path"]], "database")
    queries = {name: _describe(flags, backbone, files, name) for name, files in blocks.items()}
    if others["whitening_path"]:
        whiten = learn_whitening(
            _describe(flags, backbone, others["whitening_path"], "whitening"), flags.center_covariance
        )
        database = whiten(database)
        queries = {name: whiten(descriptors) for name, descriptors in queries.items()}

    device = command.device(flags) if flags.use_cuda else torch.device("cpu")
    names = [path.name for path in originals]
    lines = [f"{len(originals)} originals, {len(others['distractors_path'])} distractors"]
    figures: dict[str, float] = {}
    details = {}
    for name, descriptors in queries.items():
        files = blocks[name]
        try:
            result = copy_scores(descriptors, [path.name for path in files], database, names, device)
        except ValueError as error:
            raise ValueError(f"--data_path: block {name}: {error} among the originals") from error
        left_out = sum(ap is None for ap in result.per_query)
        without = f", {left_out} without an original left out" if left_out else ""
        lines.append(f"{name}: mAP {result.mean_ap:.2f} ({len(files)} queries{without})")
        figures[f"mAP_{name}"] = result.mean_ap
        details[name] = {path.name: ap for path, ap in zip(files, result.per_query, strict=True)}
    headline = figures.get("mAP_strong", sum(figures.values()) / len(figures))
    return Result(
        {"mAP": headline, **figures},
        lines,
        {
            "image_size": flags.imsize,
            "precision": command.precision_name(flags),
            "distractors": len(others["distractors_path"]),
            "whitening": len(others["whitening_path"]),
            "center_covariance": flags.center_covariance,
        },
        details={"average_precision": details},
    )


def _describe(flags: argparse.Namespace, backbone: VisionTransformer, files: list[Path], what: str) -> Tensor:
    """Descriptors of image files, float32 [N, 2D]."""
    from fastdino.evaluation.copy_detection import copy_descriptors, load_square
    from fastdino.evaluation.descriptors import describe
    from fastdino.evaluation.features import evaluating

    with command.progress(f"descriptors: {what}") as progress, evaluating(backbone):
        return describe(
            lambda images: copy_descriptors(backbone, images),
            files,
            lambda i: load_square(files[i], flags.imsize),
            device=command.device(flags),
            batch_size=flags.batch_size_per_gpu,
            num_threads=flags.num_workers,
            dtype=command.precision(flags),
            progress=progress,
            world=command.world(flags),
        )
