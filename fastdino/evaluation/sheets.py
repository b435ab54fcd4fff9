"""Drawing that the visual evaluations share: contact sheets with captions, outlines, colours, plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastdino.data.manifest import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Color = tuple[int, int, int]

COLORS: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
"""Okabe and Ito's palette, told apart with any colour vision; orange, sky blue, green, yellow, purple, ..."""
BACKGROUND, INK, FAINT, FRAME = (250, 250, 248), (32, 33, 36), (104, 106, 110), (222, 222, 218)
_MARGIN, _GAP, _LINE = 20, 10, 20  # pixels: border, space between cells, height of a line of text


def color_of(i: int) -> Color:
    """Colour number ``i``; they repeat after seven."""
    return COLORS[i % len(COLORS)]


def hexadecimal(color: Color) -> str:
    """``#rrggbb``, as matplotlib takes it."""
    return "#{:02x}{:02x}{:02x}".format(*color)


# --------------------------------------------------------------------------------------------- contact sheets


@dataclass(frozen=True)
class Cell:
    """A picture, uint8 [h, w, 3], with lines of text below it; ``color`` is a bar between the two."""

    picture: np.ndarray
    caption: str = ""
    color: Color | None = None


def contact_sheet(
    rows: Sequence[Sequence[Cell | None]], title: str, note: str = "", *, side: int = 216
) -> Image.Image:
    """Rows of cells below a title, as one RGB image; None leaves a place empty.

    A picture is scaled to a height of ``side`` pixels, or to 1.5 times that in width if that is less; small
    pictures keep their pixels visible. Long captions are cut. Columns are as wide as their widest picture.
    """
    if not rows or not any(cell for row in rows for cell in row):
        raise ValueError("contact_sheet: expected at least one cell, got none")
    pictures = [[None if cell is None else _fit(cell.picture, side) for cell in row] for row in rows]
    widths = [
        max((row[x].width for row in pictures if x < len(row) and row[x] is not None), default=side)  # type: ignore[union-attr]
        for x in range(max(map(len, rows)))
    ]
    left = [_MARGIN + sum(widths[:x]) + x * _GAP for x in range(len(widths))]
    width = max(left[-1] + widths[-1] + _MARGIN, 560)
    heading = [(line, INK, 18) for line in _wrapped(title, width - 2 * _MARGIN, 18)]
    heading += [(line, FAINT, 14) for line in _wrapped(note, width - 2 * _MARGIN, 14)]
    heights = [
        max(picture.height for picture in line if picture is not None)
        + _LINE * max(len(cell.caption.splitlines()) for cell in row if cell is not None)
        + (8 if any(cell is not None and cell.caption for cell in row) else 0)
        if any(row)
        else 0
        for row, line in zip(rows, pictures, strict=True)
    ]
    top = _MARGIN + sum(size + 6 for _, _, size in heading) + 8
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    y = _MARGIN - 4
    for text, ink, size in heading:
        draw.text((_MARGIN, y), text, ink, ImageFont.load_default(size))
        y += size + 6
    for row, line, height in zip(rows, pictures, heights, strict=True):
        for cell, picture, x, room in zip(row, line, left, widths, strict=False):
            if cell is not None and picture is not None:
                _place(sheet, draw, cell, picture, x, top, room)
        top += height + _GAP
    return sheet


def _fit(pixels: np.ndarray, side: int) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = min(side / image.height, 1.5 * side / image.width)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def _place(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, picture: Image.Image, x: int, y: int, room: int
) -> None:
    sheet.paste(picture, (x, y))
    y += picture.height
    if cell.color is not None:
        draw.rectangle((x, y, x + picture.width - 1, y + 3), fill=cell.color)
    font = ImageFont.load_default(14)
    for i, line in enumerate(cell.caption.splitlines()):
        draw.text((x, y + 5 + i * _LINE), _cut(line, room, font), INK if i == 0 else FAINT, font)


def _cut(text: str, room: float, font: Any) -> str:
    """``text``, or as much of it as fits into ``room`` pixels, and an ellipsis."""
    text = printable(text)
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "\u2026") > room:
        text = text[:-1].rstrip()
    return text + "\u2026"


def _wrapped(text: str, room: float, size: int) -> list[str]:
    """``text`` in lines of at most ``room`` pixels; longer words are cut."""
    font = ImageFont.load_default(size)
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= room:
            lines[-1] = joined
        else:
            lines.append(_cut(word, room, font))
    return lines


# --------------------------------------------------------------------------------------------------- outlines


def rim(region: np.ndarray, width: int = 1) -> np.ndarray:
    """The pixels of a region, bool [H, W], at most ``width`` steps from one outside of it, as bool [H, W].

    Steps go up, down, left and right; what lies beyond the edge of the picture is outside, so that outlines
    are closed.
    """
    inside = region
    for _ in range(width):
        inside = _shrunk(inside, edge=False)
    return region & ~inside


def _shrunk(region: np.ndarray, *, edge: bool) -> np.ndarray:
    padded = np.pad(region, 1, constant_values=edge)
    return region & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def outlined(pixels: np.ndarray, region: np.ndarray, color: Color, width: int = 2) -> np.ndarray:
    """``pixels`` uint8 [H, W, 3] with a line along the inner side of a region's edge, and a thin dark one
    along its outer side, so that it shows on any ground.
    """
    shown = pixels.copy()
    beyond = ~region
    for _ in range(max(1, width // 2)):
        beyond = _shrunk(beyond, edge=True)
    shadow = ~region & ~beyond
    shown[shadow] = shown[shadow] // 3
    shown[rim(region, width)] = color
    return shown


def line_width(pixels: np.ndarray) -> int:
    """Of outlines on a picture [H, W, 3] that is shown about 200 pixels high."""
    return max(1, round(min(pixels.shape[:2]) / 110))


# ------------------------------------------------------------------------------------------------------ plots


def figure(width: float, height: float) -> Figure:
    """A matplotlib figure of ``width`` x ``height`` inches at 100 pixels each, apart from pyplot's state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor=hexadecimal(BACKGROUND))


def plain(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Axes with a title on the left and two thin spines."""
    axes.set_facecolor(hexadecimal(BACKGROUND))
    axes.set_title(title, loc="left", fontsize=13, color=hexadecimal(INK), parse_math=False)
    axes.set_xlabel(x, fontsize=12, color=hexadecimal(INK))
    axes.set_ylabel(y, fontsize=12, color=hexadecimal(INK))
    axes.tick_params(labelsize=11, colors=hexadecimal(FAINT))
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(hexadecimal(FRAME))


def save(picture: Image.Image | Figure, path: Path) -> Path:
    """Write a PNG, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, Image.Image):
        picture.save(path)
    else:
        picture.savefig(path)
    return path
