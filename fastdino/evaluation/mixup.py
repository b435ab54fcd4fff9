"""Mixtures of images and their targets: mixup (Zhang et al. 2018, arXiv 1710.09412), CutMix (Yun et al. 2019,
arXiv 1905.04899), label smoothing, and random erasing (Zhong et al. 2020, arXiv 1708.04896), with the numbers
of DeiT.

A whole batch is mixed with itself in reverse order, by one share and in one way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ERASED_AREA = (0.02, 1 / 3)
ERASED_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))
ATTEMPTS = 10


class Mixture(NamedTuple):
    """``share`` of the target is an image's own; the rest belongs to its partner."""

    share: float
    box: tuple[int, int, int, int] | None
    """top, bottom, left, right of what CutMix takes from the partner; None blends all pixels."""


def draw_mixture(
    rng: np.random.Generator, size: int, mixup: float, cutmix: float, switch: float = 0.5
) -> Mixture:
    """One of a batch of ``size`` x ``size`` images. The share is Beta(a, a) with a = ``mixup`` or ``cutmix``;
    where both are positive CutMix is taken with probability ``switch``, where none is nothing is mixed. A box
    that sticks out of the image is cut off there, and the share is that of the area.
    """
    coin, center = rng.random(), rng.integers(size, size=2).tolist()
    cut = cutmix > 0 and (mixup <= 0 or coin < switch)
    alpha = cutmix if cut else mixup
    if alpha <= 0:
        return Mixture(1.0, None)
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return Mixture(share, None)
    half = int(size * math.sqrt(1 - share)) // 2
    (top, bottom), (left, right) = ((max(c - half, 0), min(c + half, size)) for c in center)
    return Mixture(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def mix_images(images: Tensor, mixture: Mixture) -> Tensor:
    """float [B, C, S, S] mixed with their partners, those at the other end of the batch."""
    if mixture.share == 1.0:
        return images
    partners = images.flip(0)
    if mixture.box is None:
        return images * mixture.share + partners * (1 - mixture.share)
    top, bottom, left, right = mixture.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return mixed


def mix_targets(labels: Tensor, classes: int, share: float, smoothing: float) -> Tensor:
    """Distributions [B, classes] of labels [B]: 1 - smoothing at the class and smoothing / classes
    everywhere, in the mixture of a batch with its reverse.
    """
    own = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    own.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
    return own * share + own.flip(0) * (1 - share)


def draw_box(rng: np.random.Generator, size: int, probability: float) -> tuple[int, int, int, int]:
    """top, bottom, left, right of what is erased from an image of ``size`` x ``size`` pixels, zeros for none:
    area 2 .. 33 %, aspect ratio log-uniform in 0.3 .. 1 / 0.3.
    """
    coin, shapes, place = rng.random(), rng.random((ATTEMPTS, 2)), rng.random(2)
    if coin < probability:
        for u, v in shapes.tolist():
            area = size * size * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * u)
            ratio = math.exp(ERASED_LOG_RATIO[0] + (ERASED_LOG_RATIO[1] - ERASED_LOG_RATIO[0]) * v)
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < size and width < size:
                top, left = int(place[0] * (size - height + 1)), int(place[1] * (size - width + 1))
                return top, top + height, left, left + width
    return 0, 0, 0, 0


def erase(images: Tensor, boxes: Tensor, generator: torch.Generator) -> Tensor:
    """Normalised images [B, C, S, S] with N(0, 1) in their boxes, int [B, 4]: top, bottom, left, right."""
    top, bottom, left, right = boxes[:, :, None].unbind(1)  # [B, 1] each
    at = torch.arange(images.shape[-1], device=images.device)
    inside = ((at >= top) & (at < bottom))[:, None, :, None] & ((at >= left) & (at < right))[:, None, None]
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return torch.where(inside, noise, images)
