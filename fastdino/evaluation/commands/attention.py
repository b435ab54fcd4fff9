"""``python -m fastdino.evaluation attention``, after the official ``visualize_attention.py``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Write the attention of every head of the last block as PNG files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path",
        "--image_path",
        metavar="PATH",
        required=True,
        help="one image, or a folder of images (recursive)",
    )
    parser.add_argument(
        "--image_size",
        type=command.positive,
        nargs="+",
        default=[480, 480],
        help="height and width in pixels (default: 480 480)",
    )
    parser.add_argument(
        "--threshold",
        type=command.share,
        help="also show the fewest patches that hold this share of the attention, e.g. 0.6",
    )
    command.output_argument(parser, ".")


def run(flags: argparse.Namespace) -> Result:
    from fastdino.data.manifest import printable
    from fastdino.evaluation.attention import write_attention
    from fastdino.evaluation.features import UnreadableImage, list_images

    if len(flags.image_size) > 2:
        raise ValueError(f"--image_size: expected one or two numbers, got {len(flags.image_size)}")
    size = (flags.image_size[0], flags.image_size[-1])
    root, paths = list_images(flags.data_path)
    backbone = command.backbone(flags)
    output = Path(flags.output_dir)
    files, unreadable = [], []
    with command.progress("attention maps") as progress:
        for done, path in enumerate(paths, 1):
            # the suffix stays in the folder's name: cat.jpg and cat.png are two images
            inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
            folder = output if len(paths) == 1 else output / inside
            try:
                files += write_attention(
                    backbone,
                    path,
                    folder,
                    image_size=size,
                    threshold=flags.threshold,
                    device=command.device(flags),
                )
            except UnreadableImage as error:
                unreadable.append(str(error))
            progress(done, len(paths))
    if not files:
        raise ValueError(f"--data_path: none of {len(paths)} can be used: {printable(unreadable[0])}")
    for message in unreadable:
        print(f"left out: {printable(message)}", file=sys.stderr)
    sheets = [file for file in files if file.name == "attention.png"]
    return Result(
        figures={},
        lines=[f"{len(paths) - len(unreadable)} images, {len(files)} files, in {output}"],
        settings={"image_size": list(size), "threshold": flags.threshold},
        pictures={sheet.relative_to(output).as_posix(): "attention of every head" for sheet in sheets[:8]},
    )
