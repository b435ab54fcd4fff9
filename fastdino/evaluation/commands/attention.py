"""``python -m fastdino.evaluation attention``, after the official ``visualize_attention.py`` and
``video_generation.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

if TYPE_CHECKING:
    from fastdino.evaluation.video import Clip

HELP = "Show the attention of every head of the last block: pictures of images, videos of videos."

_NEEDED = "whose heads attend from [CLS] to patches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data_path",
        "--image_path",
        metavar="PATH",
        help="an image, a folder of images (recursive), or a video file",
    )
    source.add_argument("--input_path", metavar="PATH", help="a video file, or a folder of its frames")
    parser.add_argument(
        "--num_images",
        type=command.positive,
        help="of a folder with more, as many at equal distances (default: all)",
    )
    parser.add_argument(
        "--image_size",
        type=command.positive,
        nargs="+",
        default=[480, 480],
        help="of images: height and width in pixels (default: 480 480)",
    )
    parser.add_argument(
        "--resize",
        type=command.positive,
        nargs="+",
        help="of images and videos: shorter side, or height and width (default of videos: 480)",
    )
    parser.add_argument(
        "--threshold",
        type=command.share,
        help="also show the fewest patches that hold this share of the attention, e.g. 0.6",
    )
    parser.add_argument(
        "--points",
        type=_point,
        nargs="+",
        default=[],
        metavar="X,Y",
        help="also show where the patches at these pixels of the image look, e.g. 120,200 300,80",
    )
    parser.add_argument("--fps", type=float, help="frames per second (default: the video's, else 30)")
    parser.add_argument(
        "--video_format",
        choices=("mp4", "avi", "gif", "webp", "frames"),
        help="of a video's result (default: mp4, or webp where PyAV is not installed)",
    )
    parser.add_argument(
        "--video_only",
        action="store_true",
        help="only join the pictures in the folder --input_path to a video; needs no weights",
    )
    parser.add_argument("--output_dir", "--output_path", metavar="DIR", default=".", help="default: .")


def _point(text: str) -> tuple[int, int]:
    try:
        x, y = (int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected X,Y in pixels such as 120,200, got {text}") from None
    return x, y


def run(flags: argparse.Namespace) -> Result:
    from fastdino.evaluation import video

    for flag in ("image_size", "resize"):
        if len(getattr(flags, flag) or [0]) > 2:
            raise ValueError(f"--{flag}: expected one or two numbers, got {len(getattr(flags, flag))}")
    if flags.video_only:
        return _joined(flags)
    if flags.input_path or Path(flags.data_path).suffix.lower() in video.SUFFIXES:
        return _film(flags)
    return _pictures(flags)


def _pictures(flags: argparse.Namespace) -> Result:
    from fastdino.data.manifest import one_line
    from fastdino.evaluation.attention import frame_size, write_attention
    from fastdino.evaluation.features import UnreadableImage, list_images, name_below, read_image

    size = (flags.image_size[0], flags.image_size[-1])
    root, paths = list_images(flags.data_path)
    paths = command.spread(paths, flags.num_images or len(paths))
    backbone = command.vision_transformer(flags, _NEEDED)
    output = Path(flags.output_dir)
    files, unreadable = [], []
    with command.progress("attention maps") as progress:
        for done, path in enumerate(paths, 1):
            # the suffix stays in the folder's name: cat.jpg and cat.png are two images
            try:
                files += write_attention(
                    backbone,
                    path,
                    output if len(paths) == 1 else output / name_below(root, path),
                    image_size=frame_size(read_image(path).size, flags.resize) if flags.resize else size,
                    threshold=flags.threshold,
                    points=flags.points,
                    device=command.device(flags),
                )
            except UnreadableImage as error:
                unreadable.append(str(error))
            progress(done, len(paths))
    if not files:
        raise ValueError(f"--data_path: none of {len(paths)} can be used: {one_line(unreadable[0])}")
    for message in unreadable:
        print(f"left out: {one_line(message)}", file=sys.stderr)
    found = [file for file in files if file.name == "attention.png"]
    return Result(
        figures={},
        lines=[f"{len(paths) - len(unreadable)} images, {len(files)} files, in {output}"],
        settings={"image_size": flags.resize or list(size), "threshold": flags.threshold},
        pictures={sheet.relative_to(output).as_posix(): "Attention of every head" for sheet in found[:8]},
    )


def _joined(flags: argparse.Namespace) -> Result:
    """The pictures of a folder as a video."""
    import numpy as np

    from fastdino.evaluation import video

    if not flags.input_path or not Path(flags.input_path).is_dir():
        raise ValueError(f"--video_only: expected --input_path with a folder, got {flags.input_path}")
    clip, path, fps = _clip(flags)
    count = video.write_video(map(np.asarray, clip), path, fps)
    return Result({}, [f"{count} frames at {fps:g} per second: {path}"], {"fps": fps})


def _clip(flags: argparse.Namespace) -> tuple[Clip, Path, float]:
    """The video that is read, the file that is written, and its frames per second."""
    from fastdino.evaluation import video

    clip = video.Clip(flags.input_path or flags.data_path)
    kind = flags.video_format or ("mp4" if video.has_av() else "webp")
    path = Path(flags.output_dir, "attention" if kind == "frames" else f"attention.{kind}")
    return clip, path, flags.fps or clip.fps or 30.0


def _film(flags: argparse.Namespace) -> Result:
    from collections.abc import Iterator

    import numpy as np

    from fastdino.evaluation import sheets, video
    from fastdino.evaluation.attention import film

    if flags.points:
        raise ValueError("--points: expected an image or a folder of images, got a video")
    clip, path, fps = _clip(flags)
    resize, output = flags.resize or [480], Path(flags.output_dir)
    chosen = set(np.linspace(0, max(0, clip.frames - 1), 6).astype(int).tolist())
    shown: list[list[sheets.Cell | None]] = []
    headings = ["mean of heads", *(["outlines of all heads"] if flags.threshold else [])]
    backbone = command.vision_transformer(flags, _NEEDED)
    made = film(backbone, clip, resize=resize, threshold=flags.threshold, device=command.device(flags))
    with command.progress("attention of frames") as progress:

        def frames() -> Iterator[np.ndarray]:
            for i, frame in enumerate(made):
                if i in chosen:
                    parts = np.split(frame, 1 + len(headings), axis=1)
                    captions = [f"frame {i + 1}", *headings]
                    shown.append([sheets.Cell(*pair) for pair in zip(parts, captions, strict=True)])
                yield frame
                progress(i + 1, clip.frames or i + 1)

        count = video.write_video(frames(), path, fps)
    if not count:
        raise ValueError(f"{clip.path}: expected a video, found no frame in it")
    rows = [[cell for cells in shown[i : i + 2] for cell in cells] for i in range(0, len(shown), 2)]
    note = "Attention of [CLS]; brighter is more, each map is scaled to its own range."
    if flags.threshold:
        note += f" Outlines hold {100 * flags.threshold:g} % of a head's attention."
    sheet = sheets.contact_sheet(rows, f"Attention of the last block: {clip.path.name}", note, side=180)
    sheets.save(sheet, output / "attention.png")
    return Result(
        figures={},
        lines=[f"{count} frames at {fps:g} per second: {path}"],
        settings={"resize": list(resize), "threshold": flags.threshold, "fps": fps},
        pictures={"attention.png": f"Attention of [CLS] in frames of {clip.path.name}"},
    )
