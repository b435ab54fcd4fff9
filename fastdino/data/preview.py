"""A contact sheet of crops: what the network is going to see, next to the images it comes from."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from fastdino_kernels.backend import backend, interpreted, resolve
from fastdino_kernels.multicrop import IMAGENET_MEAN, IMAGENET_STD, multicrop
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastdino.config import CropConfig
from fastdino.data.augment import FLIP, H, W, X, Y, crop_parameters
from fastdino.data.loader import MultiCropLoader
from fastdino.data.manifest import Manifest, printable
from fastdino.data.prescan import decode

CELL, GAP, GROUP_GAP, MARGIN = 144, 8, 26, 28
"""Pixels: side of a picture, space between two, more of it between groups of columns, border."""
HEADER, CAPTION = 46, 22
BACKGROUND, INK, FAINT, FRAME = (250, 250, 248), (32, 33, 36), (128, 130, 134), (222, 222, 218)
GLOBAL_COLORS = ((214, 74, 60), (38, 112, 194))
LOCAL_COLOR = (250, 200, 60)
AMPLIFIED = 64
"""Times that differences between the crops of the CPU and of the GPU are shown."""


def contact_sheet(
    manifest: Manifest, crops: CropConfig, seed: int, n: int, path: str | os.PathLike[str]
) -> None:
    """Write a PNG with one row for each of the first `n` training images: the image, then all of its crops.

    The crops are those of the first epoch, un-normalised; the image shows where they were taken. With fewer
    than `n` images the sheet has fewer rows. Where there is a GPU, or the triton backend was chosen in
    Triton's interpreter, two more rows of each image show the same crops made by the GPU's kernels, and how
    they differ. Raises ValueError if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"--preview_crops: expected at least 1 image, got {n}")
    n = min(n, len(manifest))
    gpu = _gpu()
    with backend("auto") if gpu is not None else nullcontext():
        loader = MultiCropLoader(
            manifest, crops, seed=seed, global_batch=n, micro_batch=n, cache_decoded=False, prefetch=1
        )
        with loader:
            batch = next(loader)
    ids = batch.ids.numpy()
    originals = [decode(manifest.paths[i]) for i in ids]
    sizes = np.array([image.shape[:2] for image in originals])
    params = crop_parameters(seed, 0, ids, sizes, crops)

    n_local = crops.local_crops_number
    view_sizes = [crops.global_crops_size] * 2 + [crops.local_crops_size] * n_local
    by_cpu = by_gpu = None
    if gpu is not None:
        by_cpu = _levels(originals, params, view_sizes)
        by_gpu = _levels(originals, params, view_sizes, gpu)

    left = list(_columns(len(view_sizes)))
    width = left[-1] + CELL + MARGIN
    row_height = CELL + CAPTION + GAP
    lines = n if gpu is None else 3 * n
    sheet = Image.new("RGB", (width, 2 * MARGIN + HEADER + lines * row_height - GAP), BACKGROUND)
    _draw_header(sheet, left, crops)
    for row, (sample, original) in enumerate(zip(ids, originals, strict=True)):
        top = MARGIN + HEADER + row * lines // n * row_height
        cells = [_with_boxes(original, params[row])]
        cells += [_to_image(batch.global_[view * n + row]) for view in range(2)]
        if batch.local is not None:
            cells += [_to_image(batch.local[view * n + row]) for view in range(n_local)]
        for x, cell in zip(left, cells, strict=True):
            _paste(sheet, cell, x, top)
        _draw_captions(sheet, left, top + CELL + 4, _name(manifest, sample), original.shape, params[row])
        if by_cpu is not None and by_gpu is not None:
            pairs = [(cpu[row], gpu[row]) for cpu, gpu in zip(by_cpu, by_gpu, strict=True)]
            _draw_comparison(sheet, left, top + row_height, row_height, pairs)
    sheet.save(Path(path), "PNG")


def _gpu() -> torch.device | None:
    """Where the GPU's kernels run, if they can."""
    if torch.cuda.is_available():
        return torch.device("cuda") if importlib.util.find_spec("triton") else None
    return torch.device("cpu") if interpreted() and resolve(torch.empty(0)) == "triton" else None


def _levels(
    images: list[np.ndarray], params: np.ndarray, sizes: list[int], gpu: torch.device | None = None
) -> list[np.ndarray]:
    """The crops in 8 bits, [B, S, S, 3] for each view: by the CPU or, with a device, the GPU's kernels."""
    device = torch.device("cpu") if gpu is None else gpu
    out = [torch.empty(len(images), 3, size, size, device=device) for size in sizes]
    with backend("auto" if gpu is None else "triton"):
        multicrop(images, params, out=out, mean=(0, 0, 0), std=(1 / 255,) * 3)
    return [view.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy() for view in out]


def _columns(n_views: int) -> Iterator[int]:
    """Left edges of the image and of its crops, the three groups set apart."""
    x = MARGIN
    for column in range(1 + n_views):
        yield x
        x += CELL + GAP + (GROUP_GAP if column in (0, 2) else 0)


def _to_image(crop: Tensor) -> Image.Image:
    """A normalised crop [3, S, S] as it looked before."""
    pixels = crop.float().numpy().transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN
    return Image.fromarray(np.rint(255 * pixels.clip(0, 1)).astype(np.uint8))


def _with_boxes(image: np.ndarray, rows: np.ndarray) -> Image.Image:
    """The image scaled to a cell, its crops as frames."""
    height, width = image.shape[:2]
    scale = CELL / max(height, width)
    over = 3  # frames are drawn larger and scaled down, which smooths them
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    small = Image.fromarray(image).resize((size[0] * over, size[1] * over), method)
    draw = ImageDraw.Draw(small)
    boxes = [(row, LOCAL_COLOR, 1.0) for row in rows[2:]]
    boxes += [(row, color, 2.0) for row, color in zip(rows[:2], GLOBAL_COLORS, strict=True)]
    for row, color, line in boxes:
        y, x, h, w = row[[Y, X, H, W]] * scale * over
        inset = line * over / 2
        corners = (x + inset, y + inset, max(x + w - inset, x + inset), max(y + h - inset, y + inset))
        draw.rectangle(corners, outline=color, width=round(line * over))
    return small.resize(size, Image.Resampling.LANCZOS)


def _paste(sheet: Image.Image, picture: Image.Image, x: int, y: int) -> None:
    """Put a picture into the middle of its cell, scaled to fit; small ones keep their pixels visible."""
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if size != picture.size:
        method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
        picture = picture.resize(size, method)
    x, y = x + (CELL - size[0]) // 2, y + (CELL - size[1]) // 2
    sheet.paste(picture, (x, y))
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=FRAME)


def _draw_header(sheet: Image.Image, left: list[int], crops: CropConfig) -> None:
    draw = ImageDraw.Draw(sheet)
    title, note = ImageFont.load_default(17), ImageFont.load_default(12)

    def scale(low: float, high: float, size: int) -> str:
        return f"{size} px, {low:.0%} to {high:.0%} of the area"

    groups = [
        (left[0], "Image", "frames show the crops"),
        (left[1], "Global crops", scale(*crops.global_crops_scale, crops.global_crops_size)),
    ]
    if crops.local_crops_number:
        local = scale(*crops.local_crops_scale, crops.local_crops_size)
        groups.append((left[3], "Local crops", local))
    for x, heading, text in groups:
        draw.text((x, MARGIN - 4), heading, INK, title)
        draw.text((x, MARGIN + 17), text, FAINT, note)


def _draw_captions(
    sheet: Image.Image, left: list[int], y: int, name: str, shape: tuple[int, ...], rows: np.ndarray
) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    size = f"  {shape[1]} x {shape[0]}"
    room = CELL - draw.textlength(size, font)
    while draw.textlength(name, font) > room and len(name) > 1:
        name = name[:-2].rstrip(". ") + "\u2026"
    draw.text((left[0], y), name, INK, font)
    draw.text((left[0] + CELL, y), size, FAINT, font, anchor="ra")
    for view, (x, row) in enumerate(zip(left[1:], rows, strict=True)):
        color = GLOBAL_COLORS[view] if view < 2 else LOCAL_COLOR
        draw.rounded_rectangle((x, y + 3, x + 8, y + 11), 2, fill=color)
        text = f"{row[H] * row[W] / (shape[0] * shape[1]):.0%}{', flipped' if row[FLIP] else ''}"
        draw.text((x + 13, y), text, FAINT, font)


def _draw_comparison(
    sheet: Image.Image,
    left: list[int],
    top: int,
    row_height: int,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> None:
    """A row of the GPU's crops and one of their differences from the CPU's: pairs CPU, GPU, [S, S, 3]."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    below = top + row_height
    how = ",\ninterpreted" if interpreted() else ""
    texts = [(top, f"The same crops by\nthe GPU's kernels{how}"), (below, f"Difference, {AMPLIFIED} times")]
    for y, text in texts:
        draw.multiline_text((left[0] + CELL, y + CELL // 2), text, INK, font, anchor="rm", align="right")
    for x, (cpu, gpu) in zip(left[1:], pairs, strict=True):
        difference = np.abs(cpu.astype(int) - gpu)
        _paste(sheet, Image.fromarray(gpu), x, top)
        _paste(sheet, Image.fromarray((difference * AMPLIFIED).clip(0, 255).astype(np.uint8)), x, below)
        draw.text((x, below + CELL + 4), f"largest: {difference.max()} of 255", FAINT, font)


def _name(manifest: Manifest, sample: int) -> str:
    if manifest.labels is not None:
        return printable(manifest.class_names[manifest.labels[sample]])
    return printable(os.path.basename(manifest.paths[sample]))
