"""Images beside those that the network takes for most alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastdino.data.manifest import printable
from fastdino.report import figures

if TYPE_CHECKING:
    import torch

    from fastdino.evaluation.features import ImagePath
    from fastdino.models import Backbone

MOST = 512  # training images among which neighbours are looked for
_TILE = 112  # pixels


@dataclass(frozen=True)
class Tile:
    """A picture as data URI; ``cosine`` to the query, None for the query itself."""

    name: str
    picture: str
    cosine: float | None = None


def neighbours(
    backbone: Backbone,
    queries: Sequence[ImagePath],
    bank: Sequence[ImagePath],
    *,
    side: int,
    device: torch.device | str,
    k: int = 5,
) -> list[list[Tile]]:
    """A row per query: the query, then the ``k`` images of the ``bank`` with the highest cosine, best first.

    What cannot be read is left out; empty if too little is left.
    """
    import torch

    from fastdino.evaluation.features import extract_features
    from fastdino.evaluation.neighbours import nearest

    asked = [path for path in queries if _crop(path, side) is not None]
    names = {str(path) for path in asked}
    others = [path for path in bank if str(path) not in names]
    if not asked or len(others) <= k:
        return []
    try:
        features = extract_features(backbone, [*asked, *others], image_size=side, device=device)
    except (OSError, ValueError):
        others = [path for path in others if _crop(path, side) is not None]
        if len(others) <= k:
            return []
        features = extract_features(backbone, [*asked, *others], image_size=side, device=device)
    rows = []
    for i, query in enumerate(asked):
        found = nearest(torch.cat([features[i : i + 1], features[len(asked) :]]), [0], k)
        row = [_tile(query, side)]
        for index, cosine in zip(found.indices[0].tolist(), found.cosines[0].tolist(), strict=True):
            row.append(_tile(others[index - 1], side, cosine))
        rows.append(row)
    return rows


def _crop(path: ImagePath, side: int) -> np.ndarray | None:
    """None if it cannot be read."""
    from fastdino.evaluation.features import center_crop, read_image

    try:
        return center_crop(read_image(path), side)
    except (OSError, ValueError):
        return None


def _tile(path: ImagePath, side: int, cosine: float | None = None) -> Tile:
    pixels = _crop(path, side)
    small = Image.fromarray(np.zeros((1, 1, 3), np.uint8) if pixels is None else pixels)
    tile = np.asarray(small.resize((_TILE, _TILE), Image.Resampling.BICUBIC))
    return Tile(printable(Path(str(path)).name), figures.data_uri(tile), cosine)


def spread(paths: Sequence[ImagePath], count: int) -> list[ImagePath]:
    """``count`` of them at even distances, or all."""
    return [paths[i] for i in np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int)]


def images_of(config: dict[str, Any]) -> tuple[list[ImagePath], list[ImagePath]]:
    """Eight images to ask about and those to look among, by a run's configuration: held-out ones, if there
    are, and training images. Empty where they cannot be found.
    """
    from fastdino.data.manifest import build_manifest

    try:
        bank = build_manifest(str(config["data_path"]))
        held_out = config.get("eval_data_path")
        if held_out is None:
            return spread(bank.paths, 8), spread(bank.paths, MOST)
        val = Path(str(held_out), "val")
        asked = build_manifest(val if val.is_dir() else str(held_out))
        return spread(asked.paths, 8), spread(bank.paths, MOST)
    except (KeyError, OSError, ValueError, ImportError):
        return [], []
