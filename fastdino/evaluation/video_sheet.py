"""A picture of a segmented video: a few frames with their masks, above the same frames with the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastdino.evaluation.davis import Video, read_labels
from fastdino.evaluation.features import read_image
from fastdino.evaluation.segmentation_metrics import SequenceScores
from fastdino.evaluation.sheets import Cell, color_of, contact_sheet, line_width, outlined

_SHOWN = 5  # frames


def video_sheet(video: Video, masks: Sequence[Path], scores: SequenceScores) -> Image.Image:
    """Sheet of ``masks``, one file per frame; ``scores`` are of all frames but the first and last."""
    last = len(video.frames) - 1
    carried, true = [], []
    for i in np.unique(np.linspace(0, last, _SHOWN).round().astype(int)).tolist():
        pixels = np.array(read_image(video.frames[i]))
        caption = "given" if i == 0 else "not scored"
        if 0 < i < last:
            caption = f"J {scores.j[:, i - 1].mean():.0f}  F {scores.f[:, i - 1].mean():.0f}"
        carried.append(Cell(tinted(pixels, read_labels(masks[i])), f"{video.frames[i].stem}: {caption}"))
        true.append(Cell(tinted(pixels, read_labels(video.masks[i], void=True)), "truth"))
    j, f = scores.j.mean(), scores.f.mean()
    return contact_sheet(
        [carried, true],
        f"{video.name}: J&F {(j + f) / 2:.1f}, J {j:.1f}, F {f:.1f}",
        "Masks carried from the first frame by features alone, above the true ones.",
    )


def tinted(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Pixels uint8 [H, W, 3] with the objects of ``labels`` uint8 [H, W] tinted and outlined."""
    shown = pixels
    for number in np.unique(labels[labels > 0]).tolist():
        region, color = labels == number, color_of(number - 1)
        mixed = np.where(region[..., None], 0.5 * pixels + 0.5 * np.array(color), shown).astype(np.uint8)
        shown = outlined(mixed, region, color, line_width(pixels))
    return shown
