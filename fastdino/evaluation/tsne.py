"""A map of the classes (DINO paper, appendix H): means of their features, PCA to 30 dimensions, then t-SNE
with perplexity 20, learning rate 200 and 5000 iterations.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdino.evaluation import sheets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELLED = 60
"""Classes whose names still find room on the map."""


def class_means(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean feature of every class that has an image, float64 [C, D], and the classes' numbers, [C]."""
    classes, places = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), features.shape[1]))
    np.add.at(sums, places, features)
    return sums / np.bincount(places)[:, None], classes


def capped_perplexity(perplexity: float, points: int) -> float:
    """The perplexity, at most a third of the other points: near their number no neighbourhoods are left.

    Raises ValueError for fewer than three points, or a perplexity below 1.
    """
    if points < 3:
        raise ValueError(f"--data_path: expected at least 3 classes with images, got {points}")
    if not perplexity >= 1:
        raise ValueError(f"--perplexity: expected at least 1, got {perplexity:g}")
    return max(1.0, min(perplexity, (points - 1) / 3))


def capped_learning_rate(learning_rate: float, points: int) -> float:
    """The learning rate, at most a fifth of the points or 50: few points jump about at the paper's 200."""
    if not learning_rate > 0:
        raise ValueError(f"--learning_rate: expected a positive number, got {learning_rate:g}")
    return min(learning_rate, max(50.0, points / 5))


def embed(
    means: np.ndarray,
    *,
    dimensions: int = 30,
    perplexity: float = 20.0,
    learning_rate: float = 200.0,
    iterations: int = 5000,
    seed: int = 0,
) -> np.ndarray:
    """Places in the plane, float64 [C, 2], of the rows of ``means`` [C, D]; the same for the same ``seed``.

    ``perplexity`` and ``learning_rate`` are capped as few rows demand, ``dimensions`` by C and D. Raises
    ValueError for fewer than three rows.
    """
    perplexity = capped_perplexity(perplexity, len(means))
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    reduced = PCA(min(dimensions, *means.shape), random_state=seed).fit_transform(means)
    return (
        TSNE(
            perplexity=perplexity,
            learning_rate=capped_learning_rate(learning_rate, len(means)),
            max_iter=iterations,
            init="pca",
            random_state=seed,
        )
        .fit_transform(reduced)
        .astype(np.float64)
    )


def write_csv(path: Path, names: Sequence[str], places: np.ndarray) -> None:
    """``class,x,y`` per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "x", "y"))
        writer.writerows((name, f"{x:.6g}", f"{y:.6g}") for name, (x, y) in zip(names, places, strict=True))


def scatter(
    places: np.ndarray, names: Sequence[str], note: str, thumbnails: Sequence[np.ndarray] | None = None
) -> Figure:
    """The map: names at up to 60 points, more are coloured by their order in the list; or small pictures.

    ``thumbnails`` are one uint8 [h, w, 3] per class.
    """
    figure = sheets.figure(12, 10)
    axes = figure.add_subplot()
    sheets.plain(axes, f"Classes by their mean feature, t-SNE\n{note}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.09)
    few = len(names) <= _LABELLED
    side = 10 if thumbnails is None else 64 if few else 30  # pixels, of what marks a class
    colors: Any = sheets.hexadecimal(sheets.COLORS[6]) if few else np.arange(len(names))
    points = axes.scatter(
        places[:, 0], places[:, 1], c=colors, cmap=None if few else "viridis", s=26 if few else 18
    )
    if thumbnails is not None:
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        zoom = side * 72 / figure.dpi / max(thumbnails[0].shape[:2])
        for place, picture in zip(places, thumbnails, strict=True):
            axes.add_artist(AnnotationBbox(OffsetImage(picture, zoom=zoom), place, frameon=False))
    elif not few:
        bar = figure.colorbar(points, ax=axes, shrink=0.5, aspect=30, pad=0.01)
        bar.set_label("number of the class, in sorted order", fontsize=12)
    if few:
        _label(figure, axes, places, names, side / 2)
    return figure


def _label(figure: Figure, axes: Any, places: np.ndarray, names: Sequence[str], radius: float) -> None:
    """Names beside their points, which reach ``radius`` pixels, each on the side where it covers the least of
    points and other names.
    """
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    points = axes.transData.transform(places)  # pixels
    distance = radius + 2
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    taken += [(frame.x0, frame.y0, frame.x0 + 1, frame.y1), (frame.x1 - 1, frame.y0, frame.x1, frame.y1)]
    for (x, y), name in zip(points, names, strict=True):
        width, height = 8.8 * len(name), 16.0
        sides = {
            ("left", "center"): (x + distance, y - height / 2),
            ("right", "center"): (x - distance - width, y - height / 2),
            ("center", "bottom"): (x - width / 2, y + distance),
            ("center", "top"): (x - width / 2, y - distance - height),
        }
        boxes = {side: (a, b, a + width, b + height) for side, (a, b) in sides.items()}
        side = min(boxes, key=lambda s: sum(_overlap(boxes[s], other) for other in taken))
        taken.append(boxes[side])
        offset = {"left": (distance, 0), "right": (-distance, 0)}.get(
            side[0], (0, distance if side[1] == "bottom" else -distance)
        )
        axes.annotate(
            name,
            axes.transData.inverted().transform((x, y)),
            xytext=offset,
            textcoords="offset pixels",
            ha=side[0],
            va=side[1],
            fontsize=11,
            parse_math=False,  # a class may be called anything
            color=sheets.hexadecimal(sheets.INK),
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes (x0, y0, x1, y1) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
