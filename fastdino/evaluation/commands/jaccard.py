"""``python -m fastdino.evaluation jaccard``: the attention as a segmentation (paper, figure 4)."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Overlap (intersection over union) of attention masks and ground-truth masks."

_PAPER = {
    "vit_small/16": "random 22.0, supervised 27.3, DINO 45.9; MoCo-v2 46.3, BYOL 47.8, SwAV 46.8",
    "vit_small/8": "random 21.8, supervised 23.7, DINO 44.7",
}
"""Figure 4 and appendix D, PASCAL VOC 2012 val."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path",
        metavar="DIR",
        required=True,
        help="VOCdevkit of PASCAL VOC 2012, or a folder of images (recursive)",
    )
    parser.add_argument(
        "--mask_path",
        metavar="DIR",
        help="for data other than VOC: mask PNGs of the same relative names, 0 background, 255 void",
    )
    parser.add_argument(
        "--gt",
        choices=("class", "instance"),
        default="class",
        help="VOC: objects are the classes in an image (default), or its instances",
    )
    parser.add_argument(
        "--image_size", type=command.positive, default=480, help="side in pixels (default: 480)"
    )
    parser.add_argument(
        "--threshold",
        type=command.share,
        default=0.6,
        help="share of the attention a mask holds (default: 0.6); 0.6 and 0.8 are reported as well",
    )
    command.output_argument(parser)


def run(flags: argparse.Namespace) -> Result:
    from fastdino.evaluation import sheets
    from fastdino.evaluation.jaccard import (
        VOC_LAYOUT,
        best_and_worst,
        jaccard_by_threshold,
        pair_masks,
        voc_pairs,
    )
    from fastdino.evaluation.plan import find_voc

    voc = None if flags.mask_path else find_voc(flags.data_path)
    if voc is not None:
        images, masks = voc_pairs(voc, flags.gt)
    elif flags.mask_path:
        images, masks = pair_masks(flags.data_path, flags.mask_path)
    else:
        raise ValueError(
            f"--mask_path is required: {flags.data_path} is not PASCAL VOC 2012 (it has no folder "
            f"JPEGImages); {VOC_LAYOUT}"
        )
    backbone = command.vision_transformer(flags, "whose heads attend from [CLS] to patches")
    device = command.device(flags)
    thresholds = list(dict.fromkeys([flags.threshold, 0.6, 0.8]))
    with command.progress("attention masks") as progress:
        results = jaccard_by_threshold(
            backbone,
            images,
            masks,
            thresholds,
            image_size=flags.image_size,
            device=device,
            progress=progress,
        )
    chosen = results[flags.threshold]
    counted = sum(score is not None for score in chosen.per_image)
    lines = [
        f"Jaccard of attention masks: {results[threshold].mean:.2f} "
        f"(best head per object, {counted} images, {threshold:g} of the mass)"
        for threshold in thresholds
    ]
    settings = {"image_size": flags.image_size, "threshold": flags.threshold}
    if voc is not None:
        settings |= {"dataset": "voc12", "gt": flags.gt}
        lines += [f"paper, VOC12 val, {name}: {text}" for name, text in _PAPER.items()]
    pictures = {}
    if flags.output_dir:
        sheet = best_and_worst(
            backbone,
            images,
            masks,
            chosen,
            threshold=flags.threshold,
            image_size=flags.image_size,
            device=device,
        )
        sheets.save(sheet, Path(flags.output_dir) / "jaccard.png")
        pictures["jaccard.png"] = "Objects and the best head's mask: the best and the worst images"
    return Result(
        figures={f"jaccard_{100 * threshold:g}": result.mean for threshold, result in results.items()},
        lines=lines,
        settings=settings,
        pictures=pictures,
        details={"per_image": dict(zip(images, chosen.per_image, strict=True))},
    )
