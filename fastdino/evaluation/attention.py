"""Where the [CLS] token of the last block looks (DINO paper, figures 1 and 4)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdino.evaluation.features import ImagePath, evaluating, normalize, read_image

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
    patch = backbone.patch_size
    batch, _, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(
            f"images: expected sides that are multiples of the patch size {patch}, got {height} x {width}"
        )
    with evaluating(backbone):
        attention = backbone.get_last_selfattention(images)  # [B, heads, 1 + h*w, 1 + h*w]
        return attention[:, :, 0, 1:].float().reshape(batch, -1, height // patch, width // patch).clone()


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


def overlay(pixels: np.ndarray, mask: np.ndarray, color: tuple[int, int, int] = (255, 74, 74)) -> np.ndarray:
    """uint8 [H, W, 3]: ``pixels`` tinted where ``mask`` (bool [H, W]) holds, dimmed elsewhere."""
    tinted = 0.55 * pixels + 0.45 * np.asarray(color)
    return np.where(mask[..., None], tinted, 0.45 * pixels).round().astype(np.uint8)


def write_attention(
    backbone: VisionTransformer,
    path: ImagePath,
    output: Path,
    *,
    image_size: tuple[int, int] = (480, 480),
    threshold: float | None = None,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """Write the attention of one image into the folder ``output``; returns the PNG files, composite last.

    ``img.png`` (what the network saw), ``attn-head<i>.png`` per head, with a ``threshold`` also
    ``mask_th<threshold>_head<i>.png`` (the smallest set of patches holding that mass), and ``attention.png``,
    all in one row.
    """
    pixels = square_pixels(read_image(path), image_size, backbone.patch_size)
    maps = attention_maps(backbone, normalize(pixels[None].to(device)))[0].cpu()  # [heads, h, w]
    image = pixels.numpy()
    height, width = image.shape[:2]
    output.mkdir(parents=True, exist_ok=True)

    def enlarge(array: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST))

    heads = [enlarge(colorize(scale_to_unit(head))) for head in maps]
    files = [(f"attn-head{i}.png", head) for i, head in enumerate(heads)]
    rows = [[image, enlarge(colorize(scale_to_unit(maps.mean(0)))), *heads]]
    if threshold is not None:
        masks = [overlay(image, enlarge(mask.numpy())) for mask in mass_masks(maps, threshold)]
        files += [(f"mask_th{threshold:g}_head{i}.png", mask) for i, mask in enumerate(masks)]
        rows.append([image, overlay(image, enlarge(mass_masks(maps.mean(0), threshold).numpy())), *masks])
    files = [("img.png", image), *files, ("attention.png", _sheet(rows))]
    for name, array in files:
        Image.fromarray(array).save(output / name)
    return [output / name for name, _ in files]


def _sheet(rows: list[list[np.ndarray]], gap: int = 8) -> np.ndarray:
    """Tiles of equal size in rows on white."""
    height, width = rows[0][0].shape[:2]
    shape = (len(rows) * (height + gap) - gap, len(rows[0]) * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, np.uint8)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            sheet[y * (height + gap) :, x * (width + gap) :][:height, :width] = tile
    return sheet
