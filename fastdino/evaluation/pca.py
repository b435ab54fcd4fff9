"""Patch features as colours: their first three principal components, over all images jointly.

Equal colours mean similar features, also between images. The first component alone tends to tell objects from
their surroundings; among the patches of objects a second PCA shows their parts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from fastdino.data.manifest import printable
from fastdino.evaluation import sheets
from fastdino.evaluation.attention import frame_size, square_pixels
from fastdino.evaluation.features import ImagePath, Progress, evaluating, normalize, read_image

if TYPE_CHECKING:
    from fastdino.models.vit import VisionTransformer


def principal_components(features: np.ndarray, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Projections float64 [P, count] of features [P, D] on their principal axes, and the axes' shares of the
    variance, [count].

    An axis points to where its largest entry is positive. What D or P leaves undefined is zero.
    """
    centered = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centered.T @ centered)  # ascending
    axes = vectors[:, ::-1][:, :count]  # [D, count]
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0))
    missing = [(0, 0), (0, count - axes.shape[1])]
    shares = values[::-1][:count].clip(0) / max(float(values.clip(0).sum()), 1e-30)
    return np.pad(centered @ axes, missing), np.pad(shares, missing[1])


def to_colors(components: np.ndarray) -> np.ndarray:
    """uint8 [P, 3] of components [P, 3]; each channel runs from the 2nd to the 98th percentile."""
    if not len(components):
        return np.zeros((0, 3), np.uint8)
    low, high = np.percentile(components, [2, 98], axis=0)
    scaled = (components - low) / np.where(high > low, high - low, 1.0)
    return (255 * np.clip(scaled, 0, 1)).round().astype(np.uint8)


def foreground(first: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Which patches are objects: bool [h, w] of each image's first components [h, w].

    The threshold is Otsu's, over all images: the one that leaves the least variance within the two sides. The
    side that has less of the images' borders is the foreground.
    """
    threshold = otsu(np.concatenate([values.ravel() for values in first]))
    above = [values > threshold for values in first]
    rims = [sheets.rim(np.ones_like(region)) for region in above]
    at_border = np.concatenate([region[rim] for region, rim in zip(above, rims, strict=True)]).mean()
    overall = np.concatenate([region.ravel() for region in above]).mean()
    return [~region for region in above] if at_border > overall else above


def otsu(values: np.ndarray) -> float:
    """The value that splits ``values`` into those at most it and those above it with the largest variance
    between the two.
    """
    ordered = np.sort(values.ravel().astype(np.float64))
    below = np.arange(1, len(ordered))
    sums = ordered.cumsum()
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / (len(ordered) - below)
    between = below * (len(ordered) - below) * gap**2
    return float(ordered[between.argmax()]) if len(between) else float(ordered[0])


def patch_pictures(
    backbone: VisionTransformer,
    paths: Sequence[ImagePath],
    *,
    image_size: int = 448,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[list[tuple[np.ndarray, np.ndarray, np.ndarray]], np.ndarray]:
    """For every image (what the network saw, colours of its patches, those of its foreground), all uint8
    [H, W, 3], and the shares of the variance that the three colours hold.

    The shorter side of an image becomes ``image_size`` pixels. Raises ValueError naming a file that cannot be
    read.
    """
    images, tokens, grids = [], [], []
    patch = backbone.patch_size
    for path in paths:
        image = read_image(path)
        pixels = square_pixels(image, frame_size(image.size, [image_size]), patch)
        with evaluating(backbone):
            batch = normalize(pixels[None].to(device))
            last = backbone.get_intermediate_layers(batch, 1)[0][0, 1:]  # [h*w, D]
        if not torch.isfinite(last).all():
            raise ValueError(f"the patch features of {printable(os.fspath(path))} are not finite")
        images.append(pixels.numpy())
        tokens.append(last.float().cpu().numpy())
        grids.append((pixels.shape[0] // patch, pixels.shape[1] // patch))
        if progress is not None:
            progress(len(images), len(paths))
    ends = np.cumsum([len(rows) for rows in tokens])[:-1]
    everything = np.concatenate(tokens)  # [P, D]
    components, shares = principal_components(everything)
    first = [rows.reshape(grid) for rows, grid in zip(np.split(components[:, 0], ends), grids, strict=True)]
    inside = np.concatenate([region.ravel() for region in foreground(first)])
    parts = np.full((len(everything), 3), 24, np.uint8)  # the background is nearly black
    parts[inside] = to_colors(principal_components(everything[inside])[0]) if inside.any() else 24

    def enlarge(colors: np.ndarray, grid: tuple[int, int], image: np.ndarray) -> np.ndarray:
        size = (image.shape[1], image.shape[0])
        return np.asarray(Image.fromarray(colors.reshape(*grid, 3)).resize(size, Image.Resampling.NEAREST))

    colored = zip(np.split(to_colors(components), ends), np.split(parts, ends), grids, images, strict=True)
    pictures = [
        (image, enlarge(colors, grid, image), enlarge(some, grid, image))
        for colors, some, grid, image in colored
    ]
    return pictures, shares


def sheet(
    pictures: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], paths: Sequence[ImagePath]
) -> Image.Image:
    """Image, its patches and its foreground, of two images in a row."""
    cells = [
        [sheets.Cell(image, Path(path).name), sheets.Cell(colors, "patches"), sheets.Cell(some, "foreground")]
        for (image, colors, some), path in zip(pictures, paths, strict=True)
    ]
    rows = [[cell for triple in cells[i : i + 2] for cell in triple] for i in range(0, len(cells), 2)]
    note = "Red, green and blue are the first three principal components over all images. The foreground is "
    note += "one side of the first; its colours are those of a PCA of its own."
    return sheets.contact_sheet([list(row) for row in rows], "Patch features of the last block", note)
