"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) in the variant that DeiT trains with, called
``rand-m9-mstd0.5-inc1`` there: two of fifteen operations per image, drawn with replacement, each applied with
probability 1/2 at a level drawn from N(9, 0.5) and clipped to 0 .. 10, all of them stronger at higher levels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fastdino.evaluation.features import IMAGENET_MEAN

OPERATIONS_PER_IMAGE = 2
PROBABILITY = 0.5
LEVEL, LEVEL_STD, MAX_LEVEL = 9.0, 0.5, 10.0
FILL = tuple(round(255 * value) for value in IMAGENET_MEAN)
"""Colour of what a rotation, shear or shift leaves open."""

_RESAMPLE = Image.Resampling.BICUBIC


def rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An RGB image after the operations that ``rng`` draws; the number of draws is always the same."""
    chosen = rng.integers(len(OPERATIONS), size=OPERATIONS_PER_IMAGE)
    coins, levels = rng.random((OPERATIONS_PER_IMAGE, 2)), rng.standard_normal(OPERATIONS_PER_IMAGE)
    for which, (coin, side), normal in zip(chosen.tolist(), coins.tolist(), levels.tolist(), strict=True):
        if coin < PROBABILITY:
            share = min(max(LEVEL + LEVEL_STD * normal, 0.0), MAX_LEVEL) / MAX_LEVEL
            image = OPERATIONS[which](image, share, 1.0 if side < 0.5 else -1.0)
    return image


def _auto_contrast(image: Image.Image, share: float, sign: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, share: float, sign: float) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, share: float, sign: float) -> Image.Image:
    return ImageOps.invert(image)


def _rotate(image: Image.Image, share: float, sign: float) -> Image.Image:
    return image.rotate(sign * 30 * share, resample=_RESAMPLE, fillcolor=FILL)


def _posterize(image: Image.Image, share: float, sign: float) -> Image.Image:
    return ImageOps.posterize(image, 4 - int(4 * share))


def _solarize(image: Image.Image, share: float, sign: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * share))


def _solarize_add(image: Image.Image, share: float, sign: float) -> Image.Image:
    added = int(110 * share)
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[..., Image.Image]:
    return lambda image, share, sign: kind(image).enhance(1 + sign * 0.9 * share)


def _affine(matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> Callable[..., Image.Image]:
    def apply(image: Image.Image, share: float, sign: float) -> Image.Image:
        data = matrix(image, sign * share)
        return image.transform(image.size, Image.Transform.AFFINE, data, resample=_RESAMPLE, fillcolor=FILL)

    return apply


OPERATIONS: tuple[Callable[..., Image.Image], ...] = (
    _auto_contrast,
    _equalize,
    _invert,
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _affine(lambda image, share: (1, 0.3 * share, 0, 0, 1, 0)),
    _affine(lambda image, share: (1, 0, 0, 0.3 * share, 1, 0)),
    _affine(lambda image, share: (1, 0, 0.45 * share * image.size[0], 0, 1, 0)),
    _affine(lambda image, share: (1, 0, 0, 0, 1, 0.45 * share * image.size[1])),
)
"""Each takes (image, level / 10, sign); the last four shear and shift along x and y."""
