"""Attention of the last block: of [CLS] (DINO paper, figures 1 and 4) and of chosen patches (figure 8)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastdino.evaluation import sheets
from fastdino.evaluation.features import ImagePath, evaluating, normalize, read_image
from fastdino.evaluation.sheets import Color

if TYPE_CHECKING:
    from fastdino.models.vit import VisionTransformer


def square_pixels(image: Image.Image, size: tuple[int, int], patch_size: int) -> Tensor:
    """uint8 [H, W, 3]: the whole image resized (bicubic, aspect not kept) to ``size`` = (height, width).

    Each side is rounded down to a multiple of ``patch_size``. Raises ValueError if less than one patch would
    remain.
    """
    height, width = (side // patch_size * patch_size for side in size)
    if not height or not width:
        raise ValueError(
            f"image_size: expected at least one patch ({patch_size} pixels) per side, got {size[0]}x{size[1]}"
        )
    return torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC)))


def attention_maps(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """Attention of [CLS] over the patches in the last block: float32 [B, heads, h, w] of images [B, 3, H, W].

    ``images`` are normalised and on the backbone's device; H = h * patch size, W likewise. A map sums to at
    most one: the rest of the attention goes to [CLS] itself.
    """
    return attention_rows(backbone, images, [0])[:, :, 0]


def attention_rows(backbone: VisionTransformer, images: Tensor, tokens: Sequence[int]) -> Tensor:
    """Attention of some tokens over the patches in the last block: float32 [B, heads, len(tokens), h, w].

    Token 0 is [CLS], token 1 + i is patch i in reading order. ``images`` as in :func:`attention_maps`. Raises
    ValueError if the attention is not finite.
    """
    patch = backbone.patch_size
    batch, _, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(
            f"images: expected sides that are multiples of the patch size {patch}, got {height} x {width}"
        )
    with evaluating(backbone):
        attention = backbone.get_last_selfattention(images)  # [B, heads, 1 + h*w, 1 + h*w]
        rows = attention[:, :, list(tokens), 1:].float()
        if not torch.isfinite(rows).all():
            raise ValueError("the attention of the network's last block is not finite")
        return rows.reshape(batch, -1, len(tokens), height // patch, width // patch).clone()


def patch_at(point: tuple[int, int], size: tuple[int, int], grid: tuple[int, int]) -> int:
    """Number in reading order of the patch that holds the pixel ``point`` = (x, y).

    ``size`` is (width, height) of the image in which the point was chosen, ``grid`` (rows, columns) of
    patches. Raises ValueError if the point lies outside of the image.
    """
    (x, y), (width, height), (rows, columns) = point, size, grid
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"--points: expected pixels inside the image of {width} x {height}, got {x},{y}")
    return y * rows // height * columns + x * columns // width


def mass_masks(maps: Tensor, threshold: float) -> Tensor:
    """The smallest set of patches that holds ``threshold`` of a map's mass: [..., h, w] -> bool [..., h, w].

    Patches of equal attention are taken in reading order. ``threshold`` is in (0, 1]; the paper uses 0.6.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share of the attention in (0, 1], got {threshold}")
    flat = maps.double().flatten(-2)  # [..., h*w]
    value, order = flat.sort(dim=-1, descending=True, stable=True)
    before = value.cumsum(-1) - value
    # the slack, float32 resolution, keeps rounding from adding a patch when the mass is met exactly
    keep = before < (threshold - 1e-6) * flat.sum(-1, keepdim=True)
    return torch.zeros_like(keep).scatter(-1, order, keep).view(maps.shape)


def colorize(values: np.ndarray, name: str = "inferno") -> np.ndarray:
    """uint8 [..., 3] of values float [...] in [0, 1] through a matplotlib colormap."""
    from matplotlib import colormaps

    return (colormaps[name](np.clip(values, 0, 1))[..., :3] * 255).round().astype(np.uint8)


def scale_to_unit(map_: Tensor) -> np.ndarray:
    """float [h, w] with its smallest value at 0 and its largest at 1 (all 0 if they are equal)."""
    values = map_.double().cpu().numpy()
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


def overlay(pixels: np.ndarray, mask: np.ndarray, color: Color = sheets.COLORS[5]) -> np.ndarray:
    """uint8 [H, W, 3]: ``pixels`` tinted and outlined where ``mask`` (bool [H, W]) holds, dim elsewhere."""
    tinted = 0.65 * pixels + 0.35 * np.asarray(color)
    shown = np.where(mask[..., None], tinted, 0.5 * pixels).round().astype(np.uint8)
    return sheets.outlined(shown, mask, color, sheets.line_width(pixels))


@dataclass(frozen=True)
class View:
    """The attention of one image as pictures, all uint8 [H, W, 3]."""

    image: np.ndarray
    """What the network saw."""
    mean: np.ndarray
    """Mean of the heads' maps."""
    heads: list[np.ndarray]
    masks: list[np.ndarray]
    """With a threshold: the image with the smallest set of patches that holds that mass, one per head."""
    contours: np.ndarray | None
    """With a threshold: the image with the outline of every head's mask, in the head's colour."""
    points: list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]
    """For every reference point: the image with the point, the mean map of its patch, the heads' maps."""


def view(
    backbone: VisionTransformer,
    image: Image.Image,
    *,
    image_size: tuple[int, int] = (480, 480),
    threshold: float | None = None,
    points: Sequence[tuple[int, int]] = (),
    device: torch.device | str = "cpu",
) -> View:
    """The attention of an RGB image resized to ``image_size`` = (height, width), patches enlarged to pixels.

    ``points`` are (x, y) pixels of ``image`` before that. Raises ValueError for points outside of it.
    """
    pixels = square_pixels(image, image_size, backbone.patch_size)
    height, width = pixels.shape[:2]
    grid = (height // backbone.patch_size, width // backbone.patch_size)
    tokens = [0, *(1 + patch_at(point, image.size, grid) for point in points)]
    rows = attention_rows(backbone, normalize(pixels[None].to(device)), tokens)[0].cpu()
    shown = pixels.numpy()

    def enlarge(array: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST))

    def picture(map_: Tensor) -> np.ndarray:
        return enlarge(colorize(scale_to_unit(map_)))

    masks, contours = [], None
    if threshold is not None:
        regions = [enlarge(mask.numpy()) for mask in mass_masks(rows[:, 0], threshold)]
        masks = [overlay(shown, region, sheets.color_of(i)) for i, region in enumerate(regions)]
        contours = shown
        for i, region in enumerate(regions):
            contours = sheets.outlined(contours, region, sheets.color_of(i), sheets.line_width(shown))
    marked = []
    for i, token in enumerate(tokens[1:]):
        y, x = divmod(token - 1, grid[1])
        place = ((x + 0.5) * backbone.patch_size, (y + 0.5) * backbone.patch_size)
        maps = rows[:, 1 + i]
        heads = [_with_point(picture(head), place, sheets.color_of(i)) for head in maps]
        mean = _with_point(picture(maps.mean(0)), place, sheets.color_of(i))
        marked.append((_with_point(shown, place, sheets.color_of(i)), mean, heads))
    maps = rows[:, 0]  # [heads, h, w]
    return View(shown, picture(maps.mean(0)), [picture(head) for head in maps], masks, contours, marked)


def _with_point(pixels: np.ndarray, place: tuple[float, float], color: Color) -> np.ndarray:
    """A ring with a dark edge around a place (x, y)."""
    image = Image.fromarray(pixels)
    draw, (x, y) = ImageDraw.Draw(image), place
    radius, line = max(3, min(image.size) / 32), sheets.line_width(pixels)
    for ink, more in (((0, 0, 0), line), ((255, 255, 255), 0), (color, -line)):
        r = radius + more
        draw.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=max(1, line))
    return np.array(image)


def write_attention(
    backbone: VisionTransformer,
    path: ImagePath,
    output: Path,
    *,
    image_size: tuple[int, int] = (480, 480),
    threshold: float | None = None,
    points: Sequence[tuple[int, int]] = (),
    device: torch.device | str = "cpu",
) -> list[Path]:
    """Write the attention of one image into the folder ``output``; returns the PNG files, the sheet last.

    ``img.png`` (what the network saw), ``attn-head<i>.png`` per head, with a ``threshold`` also
    ``mask_th<threshold>_head<i>.png`` (the smallest set of patches holding that mass) and ``contours.png``,
    with ``points`` ``point<i>.png`` (mean of the heads), and ``attention.png``, all of it with captions.
    """
    seen = view(
        backbone,
        read_image(path),
        image_size=image_size,
        threshold=threshold,
        points=points,
        device=device,
    )
    files = [("img.png", seen.image)]
    files += [(f"attn-head{i}.png", head) for i, head in enumerate(seen.heads)]
    files += [(f"mask_th{threshold:g}_head{i}.png", mask) for i, mask in enumerate(seen.masks)]
    files += [] if seen.contours is None else [("contours.png", seen.contours)]
    files += [(f"point{i}.png", mean) for i, (_, mean, _) in enumerate(seen.points)]
    output.mkdir(parents=True, exist_ok=True)
    for name, array in files:
        Image.fromarray(array).save(output / name)
    name = "attention.png"
    sheets.save(_sheet(seen, Path(path).name, threshold, points), output / name)
    return [output / file for file, _ in files] + [output / name]


def film(
    backbone: VisionTransformer,
    frames: Iterable[Image.Image],
    *,
    resize: Sequence[int],
    threshold: float | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[np.ndarray]:
    """For every frame uint8 [H, W, 3]: the frame, the mean of the heads and, with a ``threshold``, the
    outlines of all heads' masks, side by side.

    ``resize`` is (height, width), or the length of the shorter side; of the first frame, the others follow.
    """
    size: tuple[int, int] | None = None
    for frame in frames:
        size = size or frame_size(frame.size, resize)
        seen = view(backbone, frame, image_size=size, threshold=threshold, device=device)
        parts = [seen.image, seen.mean] + ([] if seen.contours is None else [seen.contours])
        yield np.concatenate(parts, axis=1)


def frame_size(size: tuple[int, int], resize: Sequence[int]) -> tuple[int, int]:
    """(height, width) of an image of ``size`` = (width, height) resized to ``resize``, see :func:`film`."""
    if len(resize) == 2:
        return resize[0], resize[1]
    scale = resize[0] / min(size)
    return round(size[1] * scale), round(size[0] * scale)


def _sheet(
    seen: View, name: str, threshold: float | None, points: Sequence[tuple[int, int]], columns: int = 6
) -> Image.Image:
    """Two columns for the image and the mean of the heads, then the heads, ``columns`` of them in a row."""
    share = "" if threshold is None else f"{100 * threshold:g} % of the attention"
    rows: list[list[sheets.Cell | None]] = []

    def add(first: list[sheets.Cell | None], heads: list[sheets.Cell]) -> None:
        for start in range(0, len(heads), columns):
            rows.append([*(first if start == 0 else [None, None]), *heads[start : start + columns]])

    add(
        [sheets.Cell(seen.image, "image"), sheets.Cell(seen.mean, "[CLS], mean of heads")],
        [sheets.Cell(head, f"head {i}") for i, head in enumerate(seen.heads)],
    )
    if seen.contours is not None:
        masks = [sheets.Cell(mask, f"head {i}", sheets.color_of(i)) for i, mask in enumerate(seen.masks)]
        add([None, sheets.Cell(seen.contours, "outlines of all heads")], masks)
    for i, ((x, y), (image, mean, heads)) in enumerate(zip(points, seen.points, strict=True)):
        caption = f"patch at {x},{y}"
        first = [sheets.Cell(image, caption, sheets.color_of(i)), sheets.Cell(mean, "mean of heads")]
        add(list(first), [sheets.Cell(head, f"head {j}") for j, head in enumerate(heads)])
    note = "Brighter is more; each map is scaled to its own range."
    note += f" Masks hold {share}." if share else ""
    note += " Rings mark the patch that looks." if points else ""
    return sheets.contact_sheet(rows, f"Attention of the last block: {name}", note)
