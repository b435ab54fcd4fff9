"""Frames in and out of video files: PyAV where it is installed (``pip install 'fastdino[video]'``); without
it Pillow's animated GIF and WebP, and folders of numbered frames.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from fastdino.evaluation.features import ImagePath, UnreadableImage, list_images, read_image

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")
"""Endings of files that are taken as videos."""
FORMATS = ("mp4", "avi", "gif", "webp", "frames")
_CODECS = {"mp4": ("libx264", "mpeg4"), "avi": ("mpeg4",)}


class Clip:
    """The frames of a video file, or of a folder of images in the order of the numbers in their names.

    ``fps`` is the file's, None where it says nothing; ``frames`` the number of frames, 0 where unknown.
    Iterate as often as wanted; each frame is an RGB image. Raises OSError or ValueError naming the file.
    """

    def __init__(self, path: ImagePath):
        self.path = Path(path)
        self.fps: float | None = None
        self.files: list[str] = []
        if self.path.is_dir():
            self.files = sorted(list_images(self.path)[1], key=_numbers)
            self.frames = len(self.files)
        elif not self.path.is_file():
            raise FileNotFoundError(f"no such video or folder of frames: {self.path}")
        elif self.path.suffix.lower() == ".gif":
            self._open_gif()
        else:
            self._open_stream()

    def __iter__(self) -> Iterator[Image.Image]:
        if self.files:
            yield from map(read_image, self.files)
        elif self.path.suffix.lower() == ".gif":
            with Image.open(self.path, formats=("GIF",)) as image:
                for frame in ImageSequence.Iterator(image):
                    yield frame.convert("RGB")
        else:
            with _av().open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    yield frame.to_image()

    def _open_gif(self) -> None:
        try:
            with Image.open(self.path, formats=("GIF",)) as image:
                # equal frames are stored once and shown for longer
                pauses = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(image)]
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableImage(f"cannot read video {self.path}: {error}") from error
        self.frames = len(pauses)
        self.fps = 1000 * len(pauses) / sum(pauses) if sum(pauses) else None

    def _open_stream(self) -> None:
        av = _av()
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{self.path}: expected a video, found no picture in it")
                stream = container.streams.video[0]
                self.fps = float(stream.average_rate) if stream.average_rate else None
                self.frames = stream.frames
        except av.FFmpegError as error:
            raise UnreadableImage(f"cannot read video {self.path}: {error.strerror}") from error


def write_video(frames: Iterable[np.ndarray], path: Path, fps: float) -> int:
    """Write uint8 [H, W, 3] frames of one size and return their number; 0 writes nothing.

    The ending of ``path`` chooses the format: mp4 (H.264, for any player and browser), avi (MPEG-4), gif or
    webp; without an ending it is a folder of ``frame-000001.png``. A file appears when it is complete.
    """
    if not fps > 0:
        raise ValueError(f"--fps: expected a positive number, got {fps}")
    kind = path.suffix.lower().removeprefix(".")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not kind:
        return _write_folder(frames, path)
    if kind not in FORMATS:
        raise ValueError(f"{path}: expected a file ending in .mp4, .avi, .gif or .webp")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write = _write_animation if kind in ("gif", "webp") else _write_stream
        count = write(frames, temporary, fps)
        if count:
            os.replace(temporary, path)
        return count
    finally:
        temporary.unlink(missing_ok=True)


def has_av() -> bool:
    """Whether mp4 and other video files can be read and written."""
    from importlib.util import find_spec

    return find_spec("av") is not None


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError(
            "video files need PyAV (pip install 'fastdino[video]'); without it, give a GIF or a folder of "
            "frames, and --video_format gif, webp or frames"
        ) from None
    return av


def _numbers(path: str) -> list[Any]:
    """Sorts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _write_folder(frames: Iterable[np.ndarray], folder: Path) -> int:
    count = 0
    for count, frame in enumerate(frames, 1):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(folder / f"frame-{count:06d}.png")
    return count


def _write_animation(frames: Iterable[np.ndarray], path: Path, fps: float) -> int:
    count = 0

    def images() -> Iterator[Image.Image]:
        nonlocal count
        for frame in frames:
            count += 1
            yield Image.fromarray(frame)

    rest = images()
    first = next(rest, None)
    if first is not None:
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return count


def _write_stream(frames: Iterable[np.ndarray], path: Path, fps: float) -> int:
    av = _av()
    rate = Fraction(fps).limit_denominator(1001)
    count = 0
    with av.open(str(path), "w") as container:
        stream = None
        for pixels in frames:
            count += 1
            even = np.pad(pixels, [(0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)], mode="edge")
            if stream is None:
                codec = next(c for c in _CODECS[path.suffix[1:].lower()] if c in av.codecs_available)
                quality = {"crf": "18"} if codec == "libx264" else {"qscale": "3"}
                stream = container.add_stream(codec, rate=rate, options=quality)
                stream.height, stream.width = even.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())
    return count
