"""Figures of the report: line charts as geometry for the template, pictures as data URIs.

A chart is plotted in the unit square and stretched by the browser, while its text stays HTML; so lines are
crisp and labels readable at any width. Every function returns None or an empty list when there is nothing to
draw.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastdino.data.headers import PILLOW_FORMATS
from fastdino.data.manifest import printable

if TYPE_CHECKING:
    import torch

    from fastdino.models.vit import VisionTransformer

_MOST_POINTS = 400  # of a drawn line: more than a chart has pixels to show
_MOST_STOPS = 48  # of the pointer: each is a narrow column with its values


@dataclass(frozen=True)
class Series:
    """A named line; ``color`` is the number of a colour of the page, 1 to 4."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 1
    smooth: bool = False
    """Draw the values faintly and their running mean over them."""


@dataclass(frozen=True)
class Level:
    """A named horizontal line."""

    y: float
    name: str
    tone: str = "quiet"
    """quiet for a baseline, alarm for a limit."""


@dataclass(frozen=True)
class Stop:
    """What the pointer shows over a column: place in percent, heading, (top, color, name, text) per line."""

    left: float
    width: float
    heading: str
    values: list[tuple[float, int, str, str]]


@dataclass(frozen=True)
class Chart:
    """Geometry for the template; all positions in percent of the plot."""

    paths: list[tuple[str, str]]
    """SVG path data and CSS class."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    levels: list[tuple[float, str, str, bool]]
    """Top, name, tone, and whether the name stands below its line."""
    stops: list[Stop]
    legend: list[tuple[int, str]]
    summary: str
    """One sentence for those who cannot see the chart."""
    x_label: str = "step"


def line_chart(
    series: Sequence[Series],
    *,
    levels: Sequence[Level] = (),
    from_zero: bool = False,
    margin: float = 0.0,
    whole: bool = False,
    heading: Callable[[float], str] | None = None,
    x_label: str = "step",
    unit: str = "",
) -> Chart | None:
    """Lines over a common x, without the points that are not finite. None if no series has a finite point.

    ``from_zero`` makes y start at 0 or below, ``margin`` leaves that share of the values' range free above
    and below them, ``whole`` puts y ticks at whole numbers only.
    """
    lines = [(s, *_finite(s)) for s in series]
    lines = [(s, xs, ys) for s, xs, ys in lines if len(xs)]
    if not lines:
        return None
    all_x = np.concatenate([xs for _, xs, _ in lines])
    all_y = np.concatenate([ys for _, _, ys in lines] + [np.array([level.y for level in levels])])
    x0, x1 = float(all_x.min()), float(all_x.max())
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    elif 0 < x0 < 0.05 * x1:
        x0 = 0.0
    low, high = min(float(all_y.min()), 0.0) if from_zero else float(all_y.min()), float(all_y.max())
    y_values = _ticks(low, high, whole)
    y0, y1 = y_values[0], y_values[-1]
    if margin:
        y0, y1 = low - margin * (high - low), high + margin * (high - low)
        y_values = [y for y in y_values if y0 <= y <= y1]

    def left(x: float) -> float:
        return 100 * (x - x0) / (x1 - x0)

    def top(y: float) -> float:
        return 100 * (y1 - y) / (y1 - y0)

    paths = []
    for s, xs, ys in lines:
        if s.smooth and len(ys) >= 24:
            paths.append((_path(*_thin(xs, ys), left, top), f"line c{s.color} faint"))
            ys = _running_mean(ys, max(3, len(ys) // 24) | 1)
        paths.append((_path(*_thin(xs, ys), left, top), f"line c{s.color}"))

    x_ticks = [(left(x), short(x)) for x in _ticks(x0, x1, whole=True) if x0 <= x <= x1]
    return Chart(
        paths=paths,
        x_ticks=x_ticks,
        y_ticks=[(top(y), _tick_text(y, y_values)) for y in y_values],
        levels=[(top(level.y), level.name, level.tone, _named_below(level, levels)) for level in levels],
        stops=_stops(lines, left, top, heading or (lambda x: f"{x_label} {x:g}"), unit),
        legend=[(s.color, s.name) for s, _, _ in lines],
        summary="; ".join(f"{s.name}: from {short(ys[0])} to {short(ys[-1])}{unit}" for s, _, ys in lines),
        x_label=x_label,
    )


def _named_below(level: Level, levels: Sequence[Level]) -> bool:
    """Of several levels, the lowest has its name below its line, so that names of close levels stay apart."""
    return len(levels) > 1 and level.y == min(other.y for other in levels)


def short(value: float) -> str:
    """A number in few characters: 0.0123, 12.3, 4567, 12.3k, 1.2e-06."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.2e}".replace("e-0", "e-")


def _finite(series: Series) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = np.asarray(series.xs, np.float64), np.asarray(series.ys, np.float64)
    keep = np.isfinite(xs) & np.isfinite(ys)
    return xs[keep], ys[keep]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers about a fifth of the range apart, from at or below ``low`` to at or above ``high``."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def _tick_text(value: float, ticks: Sequence[float]) -> str:
    """All ticks of an axis with the same number of decimals."""
    step = ticks[1] - ticks[0]
    if abs(value) < step * 1e-6:
        return "0"
    largest = max(abs(ticks[0]), abs(ticks[-1]))
    if largest >= 1e4 or largest < 1e-2 or step < 1e-6:
        return short(value)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1  # steps of 2.5
    return f"{value:.{decimals}f}"


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centered mean, at the ends over the part of the window that has values."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _thin(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MOST_POINTS` points: the lowest and the highest of each stretch, so no peak is lost."""
    if len(xs) <= _MOST_POINTS:
        return xs, ys
    keep = {0, len(xs) - 1}
    for part in np.array_split(np.arange(len(xs)), _MOST_POINTS // 2 - 1):
        keep |= {int(part[np.argmin(ys[part])]), int(part[np.argmax(ys[part])])}
    chosen = sorted(keep)
    return xs[chosen], ys[chosen]


def _path(
    xs: np.ndarray, ys: np.ndarray, left: Callable[[float], float], top: Callable[[float], float]
) -> str:
    points = [f"{left(x) * 10:.1f} {top(y) * 4:.1f}" for x, y in zip(xs, ys, strict=True)]
    # a lone point is a short dash, or round line caps would have nothing to draw
    return "M" + "L".join(points) if len(points) > 1 else f"M{points[0]}h0.1"


def _stops(
    lines: Sequence[tuple[Series, np.ndarray, np.ndarray]],
    left: Callable[[float], float],
    top: Callable[[float], float],
    heading: Callable[[float], str],
    unit: str,
) -> list[Stop]:
    """Columns at evenly chosen points of the longest line; the other lines join with their nearest point."""
    longest = max(lines, key=lambda line: len(line[1]))[1]
    chosen = longest[np.unique(np.linspace(0, len(longest) - 1, min(len(longest), _MOST_STOPS)).astype(int))]
    places = np.array([left(x) for x in chosen])
    edges = np.concatenate([[0.0], (places[1:] + places[:-1]) / 2, [100.0]])
    stops = []
    for i, x in enumerate(chosen):
        values = []
        for s, xs, ys in lines:
            y = float(ys[int(np.argmin(np.abs(xs - x)))])
            values.append((top(y), s.color, s.name, short(y) + unit))
        stops.append(Stop(float(edges[i]), float(edges[i + 1] - edges[i]), heading(float(x)), values))
    return stops


def data_uri(pixels: np.ndarray, quality: int = 84) -> str:
    """JPEG of uint8 [H, W, 3] as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture_file(path: Path, most_bytes: int = 1_200_000) -> tuple[str, int, int]:
    """Data URI, width and height of an image file, shrunk until it takes at most ``most_bytes``.

    Raises OSError if it cannot be read.
    """
    with Image.open(path, formats=PILLOW_FORMATS) as image:
        pixels = image.convert("RGB")
    while True:
        uri = data_uri(np.asarray(pixels), quality=88)
        if len(uri) <= most_bytes:
            return uri, *pixels.size
        scale = 0.95 * math.sqrt(most_bytes / len(uri))
        pixels = pixels.resize((max(1, int(pixels.width * scale)), max(1, int(pixels.height * scale))))


@dataclass(frozen=True)
class Strip:
    """One held-out image and what the network makes of it; pictures are data URIs."""

    name: str
    photo: str
    features: str
    heads: list[str]
    overlap: float | None = None
    """Best head's intersection over union with the object in percent, where there is a mask."""


@dataclass
class Strips:
    """Attention and features of several images."""

    strips: list[Strip] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    side: int = 0
    """Pixels per side the network saw."""


def strips(
    backbone: VisionTransformer,
    image_paths: Sequence[str | os.PathLike[str]],
    mask_paths: Sequence[str | os.PathLike[str]],
    *,
    side: int,
    device: torch.device | str,
    tile: int = 192,
    threshold: float = 0.6,
) -> Strips:
    """Each image beside its patch features (principal components as RGB) and the attention map of every head.

    The components are those of all patches of all images together, so a colour means the same in every
    picture. Files that cannot be read are listed, not raised. ``mask_paths`` is empty or has one object mask
    per image, whose outline is drawn.
    """
    import torch

    from fastdino.evaluation.attention import attention_maps, colorize, mass_masks, scale_to_unit
    from fastdino.evaluation.features import center_crop, evaluating, normalize, read_image
    from fastdino.evaluation.jaccard import best_head_jaccard, read_mask

    result = Strips(side=side)
    found = []
    for i, path in enumerate(image_paths):
        try:
            photo = center_crop(read_image(path), side)
            objects = None
            if mask_paths:
                mask = Image.fromarray(read_mask(mask_paths[i]))
                objects = center_crop(mask, side, Image.Resampling.NEAREST)
        except (OSError, ValueError):
            result.unreadable.append(printable(Path(path).name))
            continue
        pixels = normalize(torch.from_numpy(photo)[None].to(device))
        with evaluating(backbone):
            tokens = backbone.get_intermediate_layers(pixels, 1)[0][0, 1:].float().cpu()  # [h*w, D]
        maps = attention_maps(backbone, pixels)[0].cpu()  # [heads, h, w]
        found.append((Path(path), photo, objects, tokens.numpy().astype(np.float64), maps))
    if not found:
        return result

    colors = principal_colors(
        np.stack([tokens for _, _, _, tokens, _ in found]),
        np.stack([m.mean(0).flatten().numpy() for *_, m in found]),
    )
    for (path, photo, objects, _, maps), color in zip(found, colors, strict=True):
        grid = maps.shape[-2:]
        overlap = None if objects is None else best_head_jaccard(mass_masks(maps, threshold), objects)
        shown = photo if objects is None else _outline(photo, objects > 0)
        result.strips.append(
            Strip(
                name=printable(path.name),
                photo=data_uri(_resize(shown, 2 * tile if len(found) <= 8 else tile)),
                features=data_uri(_resize((color.reshape(*grid, 3) * 255).round().astype(np.uint8), tile)),
                heads=[data_uri(colorize(_enlarge(scale_to_unit(head), tile)), 76) for head in maps],
                overlap=overlap,
            )
        )
    return result


def principal_colors(features: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """First three principal components of patch features as RGB in [0, 1]: [n, p, D] and [n, p] -> [n, p, 3].

    Signs are free in a PCA; each is chosen such that patches with more attention get more of the colour,
    which also makes pictures of successive reports comparable. Scaled to the 2nd and 98th percentile over all
    images.
    """
    flat = features.reshape(-1, features.shape[-1])
    centered = flat - flat.mean(0)
    _, vectors = np.linalg.eigh(centered.T @ centered)
    components = centered @ vectors[:, ::-1][:, :3]  # [n*p, 3]
    if components.shape[1] < 3:
        components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    weight = attention.reshape(-1) - attention.mean()
    components = components * np.where(weight @ components < 0, -1.0, 1.0)
    low, high = np.percentile(components, [2, 98], axis=0)
    scaled = (components - low) / np.where(high > low, high - low, 1.0)
    return np.clip(scaled, 0, 1).reshape(*features.shape[:2], 3)


def _resize(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def _enlarge(values: np.ndarray, side: int) -> np.ndarray:
    """float [h, w] to [side, side], smooth."""
    return np.asarray(
        Image.fromarray(values.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    )


def _outline(photo: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """``photo`` with a white line, dark on its outer side, around the region."""
    width = max(1, len(photo) // 112)
    wide, wider = _grow(inside, width), _grow(inside, 2 * width)
    shown = photo.copy()
    shown[wider & ~wide] = shown[wider & ~wide] // 3
    shown[wide & ~inside] = 255
    return shown


def _grow(region: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        padded = np.pad(region, 1)
        region = region | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return region
