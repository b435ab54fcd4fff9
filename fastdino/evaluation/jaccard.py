"""Attention as segmentation: overlap of attention masks with ground-truth objects (DINO paper, figure 4).

The last block's attention of [CLS] gives one mask per head, the smallest set of patches that holds 60 % of
the mass. Each object is compared with its best head; the score is the mean over the objects of an image, then
over images. No label touches the network. On PASCAL VOC 2012 the paper reports 45.9 for ViT-S/16 and 22.0 for
random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdino.evaluation.attention import attention_maps, mass_masks, square_pixels
from fastdino.evaluation.features import ImagePath, Progress, list_images, normalize, read_image

if TYPE_CHECKING:
    from fastdino.models.vit import VisionTransformer

_VOID = 255


@dataclass(frozen=True)
class JaccardResult:
    """Scores in percent."""

    mean: float
    """Mean over the images that have an object."""
    per_image: list[float | None]
    """One score per image, in order; None for an image without an object."""


def jaccard(
    backbone: VisionTransformer,
    image_paths: Sequence[ImagePath],
    mask_paths: Sequence[ImagePath],
    *,
    image_size: int = 480,
    threshold: float = 0.6,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> JaccardResult:
    """Mean Jaccard index of the attention masks of a backbone, against masks given as image files.

    Image i belongs to mask i. A mask holds one object number per pixel, 0 for background and 255 for pixels
    that belong to no object; a mask of 0 and 255 alone is one object in white. Images are resized to
    ``image_size`` squares (bicubic, masks nearest). Raises ValueError naming the file if one cannot be read,
    or if no mask holds an object.
    """
    if len(image_paths) != len(mask_paths):
        raise ValueError(
            f"jaccard: expected one mask per image, got {len(image_paths)} images and {len(mask_paths)} masks"
        )
    scores: list[float | None] = []
    for image_path, mask_path in zip(image_paths, mask_paths, strict=True):
        pixels = square_pixels(read_image(image_path), (image_size, image_size), backbone.patch_size)
        height, width = pixels.shape[:2]
        maps = attention_maps(backbone, normalize(pixels[None].to(device)))[0].cpu()
        scores.append(best_head_jaccard(mass_masks(maps, threshold), read_mask(mask_path, (height, width))))
        if progress is not None:
            progress(len(scores), len(image_paths))
    counted = [score for score in scores if score is not None]
    if not counted:
        raise ValueError(f"jaccard: expected at least one object in {len(scores)} masks, got none")
    return JaccardResult(float(np.mean(counted)), scores)


def best_head_jaccard(head_masks: Tensor, objects: np.ndarray) -> float | None:
    """Score of an image in percent: head masks bool [heads, h, w], objects uint8 [H, W]; None without object.

    Head masks are enlarged to H x W by repetition. For each object the head with the largest intersection
    over union counts, then the mean over objects is taken. Void pixels are no object, but count in the union
    when a head covers them (the authors' recipe).
    """
    present = [int(value) for value in np.unique(objects) if value not in (0, _VOID)]
    if not present:
        return None
    height, width = objects.shape
    heads = (
        nn.functional.interpolate(head_masks[None].float(), (height, width), mode="nearest")[0].numpy() > 0.5
    )
    best = []
    for value in present:
        target = objects == value
        intersection = (heads & target).sum((1, 2))
        union = (heads | target).sum((1, 2))
        best.append(float((intersection / union).max()))
    return 100.0 * float(np.mean(best))


def read_mask(path: ImagePath, size: tuple[int, int] | None = None) -> np.ndarray:
    """Object numbers uint8 [H, W] of a mask (palette, grey, 1-bit), resized nearest to ``size`` = (H, W).

    Raises FileNotFoundError or ValueError naming the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise ValueError(
                    f"expected a palette, 8-bit grey or 1-bit image of object numbers, got mode {image.mode}"
                )
            mask = image.convert("L") if image.mode == "1" else image.copy()
    except FileNotFoundError:
        raise FileNotFoundError(f"no such mask: {path}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read mask {path}: {error}") from error
    full = np.array(mask)
    if set(np.unique(full)) <= {0, _VOID}:
        mask, full = Image.fromarray((full == _VOID).astype(np.uint8)), full // _VOID
    return full if size is None else np.array(mask.resize(size[::-1], Image.Resampling.NEAREST))


def pair_masks(images: ImagePath, masks: ImagePath) -> tuple[list[str], list[str]]:
    """Images and masks of two folders that have the same relative path up to the suffix, in order.

    Images without a mask are left out. Raises ValueError if there is no pair at all or a mask has no image.
    """
    image_root, image_files = list_images(images)
    mask_root, mask_files = list_images(masks)
    image_of = {path.relative_to(image_root).with_suffix("").as_posix(): path for path in image_files}
    mask_of = {path.relative_to(mask_root).with_suffix("").as_posix(): path for path in mask_files}
    common = [name for name in image_of if name in mask_of]
    alone = [str(mask_of[name]) for name in mask_of if name not in image_of]
    if alone or not common:
        example = f", for instance {alone[0]}" if alone else ""
        raise ValueError(
            f"{len(common)} of {len(mask_of)} masks in {masks} have an image of the same name in {images}; "
            f"{len(alone)} have none{example}"
        )
    return [str(image_of[name]) for name in common], [str(mask_of[name]) for name in common]
