"""Which images a network takes for alike: queries beside their nearest images by cosine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdino.evaluation import sheets
from fastdino.evaluation.features import ImagePath, center_crop, read_image

_SAME, _OTHER = sheets.COLORS[2], sheets.COLORS[5]


@dataclass(frozen=True)
class Neighbours:
    """Nearest first; of equal cosines the lower index comes first."""

    indices: Tensor
    """int64 [Q, k] into the bank."""
    cosines: Tensor
    """float32 [Q, k]."""


def nearest(features: Tensor, queries: Sequence[int], k: int) -> Neighbours:
    """The ``k`` rows of ``features`` [N, D] most alike to each of the rows ``queries``, but not that row.

    Raises ValueError unless there are more than ``k`` rows.
    """
    if not 1 <= k < len(features):
        raise ValueError(
            f"--k: expected 1 to {len(features) - 1} neighbours of {len(features)} images, got {k}"
        )
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    cosines = unit[list(queries)] @ unit.T  # [Q, N]
    cosines[torch.arange(len(queries)), list(queries)] = -torch.inf
    best, indices = cosines.sort(dim=1, descending=True, stable=True)
    return Neighbours(indices[:, :k].clone(), best[:, :k].clone())


def choose_queries(words: Sequence[str], paths: Sequence[ImagePath], count: int, seed: int) -> list[int]:
    """Indices of the queries that ``words`` name, each an index or a path or its ending; ``count`` random
    ones if there is no word. Raises ValueError for a word that fits no image, or several.
    """
    if not words:
        return np.random.default_rng(seed).permutation(len(paths))[:count].tolist()
    chosen = []
    for word in words:
        if word.isdecimal() and int(word) < len(paths):
            chosen.append(int(word))
            continue
        ending = "/" + word.lstrip("./")
        fitting = [i for i, path in enumerate(paths) if ("/" + os.fspath(path)).endswith(ending)]
        fitting = [i for i in fitting if os.fspath(paths[i]) == word] or fitting
        if len(fitting) != 1:
            raise ValueError(
                f"--queries: expected an index below {len(paths)} or the path of one image, got {word!r}, "
                f"which fits {len(fitting)}"
            )
        chosen += fitting
    return chosen


def sheet(
    paths: Sequence[ImagePath],
    classes: Sequence[str] | None,
    queries: Sequence[int],
    found: Neighbours,
    *,
    image_size: int = 224,
) -> Image.Image:
    """A row per query: the query, then its neighbours with cosines, cropped as the network saw them.

    With ``classes`` (of every path) a bar is green under a neighbour of the query's class, else vermilion.
    """
    rows: list[list[sheets.Cell | None]] = []
    for query, indices, cosines in zip(queries, found.indices.tolist(), found.cosines.tolist(), strict=True):
        text = Path(paths[query]).name if classes is None else classes[query]
        row: list[sheets.Cell | None] = [
            sheets.Cell(_crop(paths[query], image_size), f"query {query}\n{text}", sheets.INK)
        ]
        for index, cosine in zip(indices, cosines, strict=True):
            name = Path(paths[index]).name if classes is None else classes[index]
            color = None if classes is None else _SAME if classes[index] == classes[query] else _OTHER
            row.append(sheets.Cell(_crop(paths[index], image_size), f"{cosine:.4f}\n{name}", color))
        rows.append(row)
    note = f"Cosine of the features, the highest first, among {len(paths)} images."
    note += "" if classes is None else " Green: of the query's class; vermilion: of another one."
    return sheets.contact_sheet(rows, "Queries and their nearest images", note, side=144)


def _crop(path: ImagePath, size: int) -> np.ndarray:
    return center_crop(read_image(path), size)
