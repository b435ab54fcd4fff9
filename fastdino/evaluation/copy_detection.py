"""Copy detection on Copydays (DINO paper, table 4; Douze et al. 2009): distorted copies find their originals.

The descriptor is [CLS] beside the patch tokens pooled by a generalised mean, both after the final norm,
whitened on images that are neither queries nor database. The database holds the originals and distractors; of
each ranking only the first twenty count, as in the official script. A copy and its original share the first
four characters of their file names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdino.evaluation.features import ImagePath, read_image
from fastdino.evaluation.ranking import RankingScores, rank, score

if TYPE_CHECKING:
    from fastdino.models.vit import VisionTransformer

LAYOUT = """\
DIR/
  original/        the originals: 200000.jpg, 200100.jpg, ...
  strong/          their copies, under names with the same first four characters: 200001.jpg, ...
  jpegqual/<n>/    more copies, each block optional
  crops/<n>/"""

COUNTED = 20  # ranks
_PREFIX = 4  # characters
_POWER = 4
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def copydays(data_path: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The originals, and the copies by block: every other folder below that holds images, in order.

    Raises FileNotFoundError, with the expected layout, without originals or without copies.
    """
    originals = images_of(data_path / "original")
    folders = [path for pattern in ("*", "*/*") for path in data_path.glob(pattern) if path.is_dir()]
    blocks = {path.relative_to(data_path).as_posix(): images_of(path) for path in sorted(folders)}
    blocks = {name: files for name, files in blocks.items() if files and name.split("/")[0] != "original"}
    for what, files in (("originals", originals), ("copies", blocks)):
        if not files:
            raise FileNotFoundError(f"--data_path {data_path}: no {what} there; expected\n{LAYOUT}")
    return originals, blocks


def images_of(folder: Path, pattern: str = "*") -> list[Path]:
    """Image files in a folder, in order; with the pattern ``**/*`` also those in folders below."""
    return sorted(path for path in folder.glob(pattern) if path.suffix.lower() in _SUFFIXES)


def load_square(path: ImagePath, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the whole image, resized bicubically, aspect not kept."""
    return np.array(read_image(path).resize((size, size), Image.Resampling.BICUBIC))


def copy_descriptors(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """[CLS] beside pooled patches: images [B, 3, H, W] -> float32 [B, 2D].

    Patches x are pooled to ``mean(max(x, 1e-6)^4)^(1/4)`` per channel.
    """
    tokens = backbone.get_intermediate_layers(images, 1)[0].float()  # [B, 1+N, D]
    patches = tokens[:, 1:].clamp(min=1e-6)
    pooled = patches.pow(_POWER).mean(1).pow(1 / _POWER)
    return torch.cat([tokens[:, 0], pooled], 1)


@dataclass(frozen=True)
class Whitening:
    """Decorrelates descriptors: ``(x - mean) @ matrix.T``."""

    mean: Tensor
    """float64 [D]"""
    matrix: Tensor
    """float64 [D, D]"""

    def __call__(self, descriptors: Tensor) -> Tensor:
        """float32 [N, D] -> float32 [N, D]."""
        return ((descriptors.double() - self.mean) @ self.matrix.T).float()


def learn_whitening(descriptors: Tensor, center_covariance: bool = False) -> Whitening:
    """Whitening of full rank from descriptors [N, D]: ``diag(d^-1/2) V^T`` of covariance ``V diag(d) V^T``.

    The official script subtracts the mean from what it whitens, but takes the second moment ``X^T X / N`` for
    the covariance; ``center_covariance`` subtracts the mean there too. Eigenvalues below 1e-5 of the largest
    are raised to that. Raises ValueError without descriptors or if all are zero.
    """
    if descriptors.ndim != 2 or not len(descriptors):
        raise ValueError(f"learn_whitening: expected descriptors [N, D], got {list(descriptors.shape)}")
    x = descriptors.double()
    mean = x.mean(0)
    if center_covariance:
        x = x - mean
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x / len(x))
    largest = eigenvalues[-1]
    if not largest > 0:
        raise ValueError(
            f"learn_whitening: expected descriptors that differ, got {len(x)} without any variance"
        )
    return Whitening(mean, eigenvalues.clamp(min=1e-5 * largest).rsqrt()[:, None] * vectors.T)


def copy_scores(
    queries: Tensor,
    query_names: Sequence[str],
    database: Tensor,
    original_names: Sequence[str],
    device: torch.device | str = "cpu",
) -> RankingScores:
    """Average precision of copies, descriptors [Q, D], in a database [N, D] that starts with the originals.

    Positives are the originals whose file name shares its first four characters with the query's; the rest of
    the database are distractors. Raises ValueError if no query has a positive.
    """
    prefixes = np.array([name[:_PREFIX] for name in original_names])
    positives = [np.flatnonzero(prefixes == name[:_PREFIX]) for name in query_names]
    return score(rank(queries, database, COUNTED, device), positives, ks=())
