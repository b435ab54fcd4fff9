"""What the protocols that train share: labelled images in random crops, accuracy, checkpoints.

Randomness is counted, not kept: what happens to the image at a position of an epoch is a function of (seed,
epoch, position) alone, so neither threads nor processes nor an interruption change it. Crops are those of
torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip`` on Pillow images, with Pillow's filters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdino.data.augment import ATTEMPTS, LOG_RATIO, P_FLIP
from fastdino.data.manifest import Manifest, build_manifest
from fastdino.engine import checkpoint, parallel
from fastdino.engine.disk import make_directories
from fastdino.engine.parallel import World
from fastdino.evaluation.features import normalize, read_pixels
from fastdino.evaluation.plan import held_out_folder

LAYOUT = "DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg (or test/)"

SCALE = (0.08, 1.0)
"""Share of the image's area that a crop takes."""

_STREAM = 0x4556414C  # keeps these draws independent of every other use of the seed


def splits(data_path: str | None) -> tuple[Manifest, Manifest]:
    """Images to train on and held-out ones: ``train/`` and ``val/``, or ``test/``, below ``data_path``.

    Raises ValueError without a path, and FileNotFoundError or ValueError with the expected layout.
    """
    if not data_path:
        raise ValueError("--data_path is required (a folder with train/ and val/, each of class folders)")
    try:
        return build_manifest(Path(data_path) / "train"), held_out(data_path)
    except (OSError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{error}; expected {LAYOUT}") from error


def held_out(data_path: str) -> Manifest:
    """The images in ``val/``, or in ``test/`` where there is no ``val/``."""
    root = Path(data_path)
    return build_manifest(held_out_folder(root) or root / "val")


def enough_images(world: World, *manifests: Manifest) -> None:
    """Raise ValueError unless each process gets an image of each of the sets."""
    for manifest in manifests:
        if len(manifest) < world.size:
            raise ValueError(
                f"--data_path: {manifest.root} has {len(manifest)} images, expected at least one for each of "
                f"{world.size} processes"
            )


# ----------------------------------------------------------------------------------------------------- images


class Sample(NamedTuple):
    """An image and what its random numbers are drawn by."""

    path: str
    seed: int
    epoch: int
    position: int
    """In the order of the epoch."""


def generator(*counters: int) -> np.random.Generator:
    """Random numbers that depend on ``counters`` (each at least 0) alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((_STREAM, *counters))))


def crop_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float] = SCALE
) -> tuple[int, int, int, int]:
    """left, top, right, bottom of torchvision's RandomResizedCrop: area uniform in ``scale``, aspect ratio
    log-uniform in 3/4 .. 4/3, ten attempts to fit, else the largest central box of an allowed ratio.
    """
    draws = rng.random((ATTEMPTS, 2))
    place = rng.random(2)
    for u, v in draws.tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u)
        ratio = math.exp(LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0]) * v)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(place[0] * (width - w + 1)), int(place[1] * (height - h + 1))
            return left, top, left + w, top + h
    narrow, wide = math.exp(LOG_RATIO[0]), math.exp(LOG_RATIO[1])
    w = round(height * wide) if width / height > wide else width
    h = round(width / narrow) if width / height < narrow else height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def decoded(path: str) -> Image.Image:
    """The RGB image at ``path``; raises FileNotFoundError or UnreadableImage (a ValueError), naming it."""
    return Image.fromarray(read_pixels(path))


def random_crop(
    image: Image.Image, size: int, rng: np.random.Generator, resample: Image.Resampling
) -> Image.Image:
    """A random crop of an RGB image at ``size`` x ``size`` pixels, mirrored every other time."""
    crop = image.crop(crop_box(rng, *image.size)).resize((size, size), resample)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < P_FLIP else crop


def linear_crop(sample: Sample, size: int) -> np.ndarray:
    """The training crop of the official ``eval_linear.py``, bilinear: uint8 [size, size, 3]."""
    rng = generator(sample.seed, sample.epoch, sample.position)
    return np.array(random_crop(decoded(sample.path), size, rng, Image.Resampling.BILINEAR))


def on_device(crops: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """uint8 [S, S, 3] each to normalised float32 [B, 3, S, S]."""
    pixels = torch.from_numpy(np.stack(crops))
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    return normalize(pixels)


# --------------------------------------------------------------------------------------------------- accuracy


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Images whose class is the first, and among the first five: int64 [2] of logits [N, C], labels [N].

    Rows that are not finite are wrong.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    found = (best == labels[:, None]) & torch.isfinite(logits).all(1, keepdim=True)
    return torch.stack([found[:, 0].sum(), found.any(1).sum()])


# ------------------------------------------------------------------------------------------------ checkpoints


class Record:
    """Checkpoints of a training, one per epoch, below a folder; nothing is kept where that is None.

    ``settings`` (JSON) are what the result depends on: a folder that was written with others is refused.
    """

    def __init__(self, root: Path | None, settings: Mapping[str, Any], world: World) -> None:
        self.root, self.world = root, world
        self.settings = json.loads(json.dumps(settings))
        self._saver: checkpoint.Saver | None = None
        if root is not None and world.main:
            make_directories(checkpoint.Disk(), root)
            self._saver = checkpoint.Saver(root)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
        """Model, optimizer and meta of the newest valid checkpoint, None where there is none.

        Raises ValueError naming the first setting that differs.
        """
        found = checkpoint.latest(self.root) if self.root is not None and self.world.main else None
        path = parallel.broadcast_object(found)
        if not isinstance(path, Path):
            return None
        model, optimizer, meta = checkpoint.load(path)
        before = meta["settings"]
        for name in self.settings | before:
            if before.get(name) != self.settings.get(name):
                raise ValueError(
                    f"--output_dir: {path.parent} was written with {name} {before.get(name)}, this run has "
                    f"{self.settings.get(name)}: give another folder, or remove that one"
                )
        return model, optimizer, meta

    def save(
        self, epoch: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], meta: Mapping[str, Any]
    ) -> None:
        """Begin to write the state after ``epoch`` epochs; the newest two stay."""
        if self._saver is not None:
            self._saver.start(epoch, model, optimizer, {**meta, "settings": self.settings})

    def close(self) -> None:
        """Return when everything is on the disk."""
        if self._saver is not None:
            self._saver.wait()
