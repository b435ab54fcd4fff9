"""The official multi-crop transforms with Pillow, written from their documentation: the pipeline to beat.

`OfficialDataset` draws and makes all crops of one file, as DataAugmentationDINO in a torch DataLoader does;
`apply` makes one crop from a row of our parameters, so that both can be compared bit for bit.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from fastdino.config import CropConfig
from fastdino.data.augment import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    JITTER,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
)

MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))


def uniform(low: float, high: float) -> float:
    return torch.empty(1).uniform_(low, high).item()


def draw(view: int, width: int, height: int, crops: CropConfig) -> np.ndarray:
    """Random parameters of one crop as the transforms draw them, in the form of a row of
    `crop_parameters`."""
    row = np.zeros(COLUMNS)
    scale = crops.global_crops_scale if view < 2 else crops.local_crops_scale
    row[:4] = random_resized_crop(width, height, scale)
    row[FLIP] = torch.rand(1).item() < 0.5
    row[JITTER] = torch.rand(1).item() < 0.8
    row[ORDER] = ORDERS.index(tuple(BRIGHTNESS + i for i in torch.randperm(4).tolist()))
    row[BRIGHTNESS], row[CONTRAST] = uniform(0.6, 1.4), uniform(0.6, 1.4)
    row[SATURATION], row[HUE] = uniform(0.8, 1.2), uniform(-0.1, 0.1)
    row[GRAY] = torch.rand(1).item() < 0.2
    p_blur = (1.0, 0.1)[view] if view < 2 else 0.5
    row[SIGMA] = random.uniform(0.1, 2) if random.random() <= p_blur else 0
    row[SOLARIZE] = view == 1 and random.random() < 0.2
    return row


def random_resized_crop(width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * uniform(*scale)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            y = int(torch.randint(0, height - h + 1, (1,)).item())
            return y, int(torch.randint(0, width - w + 1, (1,)).item()), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def apply(image: Image.Image, row: np.ndarray, size: int) -> Tensor:
    """One crop with Pillow: float32 [3, size, size]."""
    y, x, h, w = (int(v) for v in row[:4])
    crop = image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)
    if row[FLIP]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if row[JITTER]:
        for column in ORDERS[int(row[ORDER])]:
            crop = JITTERS[column](crop, float(row[column]))
    if row[GRAY]:
        luma = crop.convert("L")
        crop = Image.merge("RGB", (luma, luma, luma))
    if row[SIGMA]:
        crop = crop.filter(ImageFilter.GaussianBlur(float(row[SIGMA])))
    if row[SOLARIZE]:
        crop = ImageOps.solarize(crop)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(MEAN).div_(STD)


def shift_hue(crop: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = crop.convert("HSV").split()
    shifted = np.array(hue) + np.array(int(turns * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


JITTERS: dict[int, Callable[[Image.Image, float], Image.Image]] = {
    BRIGHTNESS: lambda crop, factor: ImageEnhance.Brightness(crop).enhance(factor),
    CONTRAST: lambda crop, factor: ImageEnhance.Contrast(crop).enhance(factor),
    SATURATION: lambda crop, factor: ImageEnhance.Color(crop).enhance(factor),
    HUE: shift_hue,
}


def view_sizes(crops: CropConfig) -> list[int]:
    return [crops.global_crops_size] * 2 + [crops.local_crops_size] * crops.local_crops_number


class OfficialDataset(Dataset[list[Tensor]]):
    """All crops of one file."""

    def __init__(self, paths: Sequence[str], crops: CropConfig) -> None:
        self.paths, self.crops = paths, crops

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        with open(self.paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        return [
            apply(image, draw(view, image.width, image.height, self.crops), size)
            for view, size in enumerate(view_sizes(self.crops))
        ]
