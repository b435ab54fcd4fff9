"""Attention as segmentation: overlap of attention masks with ground-truth objects (DINO paper, figure 4).

The last block's attention of [CLS] gives one mask per head, the smallest set of patches that holds 60 % of
the mass. Each object is compared with its best head; the score is the mean over the objects of an image, then
over images. No label touches the network. On PASCAL VOC 2012 (val) the paper reports, for ViT-S/16 and
ViT-S/8, 45.9 and 44.7; supervised 27.3 and 23.7; random weights 22.0 and 21.8. Its appendix D says that these
masks hold 80 % of the mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdino.evaluation import sheets
from fastdino.evaluation.attention import attention_maps, mass_masks, overlay, square_pixels
from fastdino.evaluation.features import (
    ImagePath,
    Progress,
    list_images,
    name_below,
    normalize,
    read_image,
    read_numbers,
)

if TYPE_CHECKING:
    from fastdino.models.vit import VisionTransformer

_VOID = 255
_WHITE = (255, 255, 255)


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

    As :func:`jaccard_by_threshold`, for one threshold.
    """
    settings: dict[str, Any] = {"image_size": image_size, "device": device, "progress": progress}
    return jaccard_by_threshold(backbone, image_paths, mask_paths, [threshold], **settings)[threshold]


def jaccard_by_threshold(
    backbone: VisionTransformer,
    image_paths: Sequence[ImagePath],
    mask_paths: Sequence[ImagePath],
    thresholds: Sequence[float],
    *,
    image_size: int = 480,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[float, JaccardResult]:
    """Threshold -> scores of the masks that hold this share of the attention.

    Image i belongs to mask i. A mask holds one object number per pixel, 0 for background and 255 for pixels
    that belong to no object; a mask of 0 and 255 alone is one object in white. Images are resized to
    ``image_size`` squares (bicubic, masks nearest). Raises ValueError naming the file if one cannot be read,
    or if no mask holds an object.
    """
    if len(image_paths) != len(mask_paths):
        raise ValueError(
            f"jaccard: expected one mask per image, got {len(image_paths)} images and {len(mask_paths)} masks"
        )
    scores: dict[float, list[float | None]] = {threshold: [] for threshold in thresholds}
    for i, (image, mask) in enumerate(zip(image_paths, mask_paths, strict=True)):
        _, maps, objects = _attention_and_objects(backbone, image, mask, image_size, device)
        for threshold, found in scores.items():
            found.append(best_head_jaccard(mass_masks(maps, threshold), objects))
        if progress is not None:
            progress(i + 1, len(image_paths))
    results = {}
    for threshold, found in scores.items():
        counted = [score for score in found if score is not None]
        if not counted:
            raise ValueError(f"jaccard: expected at least one object in {len(found)} masks, got none")
        results[threshold] = JaccardResult(float(np.mean(counted)), found)
    return results


def _attention_and_objects(
    backbone: VisionTransformer, image: ImagePath, mask: ImagePath, size: int, device: torch.device | str
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Pixels uint8 [H, W, 3], attention [heads, h, w] and object numbers uint8 [H, W] of one image."""
    pixels = square_pixels(read_image(image), (size, size), backbone.patch_size)
    maps = attention_maps(backbone, normalize(pixels[None].to(device)))[0].cpu()
    height, width = pixels.shape[:2]
    return pixels, maps, read_mask(mask, (height, width))


def best_head_jaccard(head_masks: Tensor, objects: np.ndarray) -> float | None:
    """Score of an image in percent: head masks bool [heads, h, w], objects uint8 [H, W]; None without object.

    Head masks are enlarged to H x W by repetition. For each object the head with the largest intersection
    over union counts, then the mean over objects is taken. Void pixels are no object, but count in the union
    when a head covers them (the authors' recipe).
    """
    best = best_heads(enlarged(head_masks, objects.shape), objects)
    return 100.0 * float(np.mean([overlap for _, overlap in best.values()])) if best else None


def enlarged(head_masks: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """bool [heads, h, w] to [heads, H, W] by repetition; ``size`` = (H, W)."""
    return nn.functional.interpolate(head_masks[None].float(), size, mode="nearest")[0].numpy() > 0.5


def best_heads(heads: np.ndarray, objects: np.ndarray) -> dict[int, tuple[int, float]]:
    """Object number -> (best head, its intersection over union) of heads bool [heads, H, W]."""
    best = {}
    for value in (int(value) for value in np.unique(objects) if value not in (0, _VOID)):
        target = objects == value
        overlap = (heads & target).sum((1, 2)) / (heads | target).sum((1, 2))
        best[value] = (int(overlap.argmax()), float(overlap.max()))
    return best


def best_and_worst(
    backbone: VisionTransformer,
    image_paths: Sequence[ImagePath],
    mask_paths: Sequence[ImagePath],
    result: JaccardResult,
    *,
    threshold: float,
    image_size: int = 480,
    device: torch.device | str = "cpu",
    count: int = 6,
) -> Image.Image:
    """A sheet of the ``count`` images with the highest and as many with the lowest scores of ``result``.

    Above: objects outlined in white. Below: the mask of the best head of each object, the objects' outlines
    in white on top.
    """
    scored = [(score, i) for i, score in enumerate(result.per_image) if score is not None]
    scored.sort(key=lambda pair: (-pair[0], pair[1]))
    half = min(count, (len(scored) + 1) // 2)
    parts = [("best", scored[:half]), ("worst", scored[max(half, len(scored) - half) :][::-1])]
    rows: list[list[sheets.Cell | None]] = []
    for name, chosen in parts:
        pairs = [
            _best_head_cells(
                *_attention_and_objects(backbone, image_paths[i], mask_paths[i], image_size, device),
                threshold=threshold,
                name=f"{name}: {Path(image_paths[i]).name}",
            )
            for _, i in chosen
        ]
        rows += [[image for image, _ in pairs], [mask for _, mask in pairs]] if pairs else []
    note = (
        "White: objects. Coloured: the head that overlaps most with an object, its smallest mask that holds "
    )
    note += f"{100 * threshold:g} % of the attention. In percent: intersection over union, mean over objects."
    title = f"Attention as segmentation, Jaccard {result.mean:.1f} % over {len(scored)} images"
    return sheets.contact_sheet(rows, title, note)


def _best_head_cells(
    pixels: Tensor, maps: Tensor, objects: np.ndarray, *, threshold: float, name: str
) -> tuple[sheets.Cell, sheets.Cell]:
    best = best_heads(enlarged(mass_masks(maps, threshold), objects.shape), objects)
    times = max(1, 216 // len(objects))  # so that lines are thin on small images too
    image, objects = (array.repeat(times, 0).repeat(times, 1) for array in (pixels.numpy(), objects))
    heads, line = enlarged(mass_masks(maps, threshold), objects.shape), sheets.line_width(image)
    used = sorted({head for head, _ in best.values()})
    masked = image if len(used) > 1 else overlay(image, heads[used[0]], sheets.color_of(used[0]))
    for head in used if len(used) > 1 else []:
        masked = sheets.outlined(masked, heads[head], sheets.color_of(head), 2 * line)
    shown = image
    for value in best:
        shown = sheets.outlined(shown, objects == value, _WHITE, line)
        masked = sheets.outlined(masked, objects == value, _WHITE, line)
    overlaps = [100 * overlap for _, overlap in best.values()]
    text = f"{np.mean(overlaps):.1f} %, " + ("head " if len(used) == 1 else "heads ")
    text += ", ".join(map(str, used)) + (f", {len(best)} objects" if len(best) > 1 else "")
    return sheets.Cell(shown, name), sheets.Cell(masked, text)


def read_mask(path: ImagePath, size: tuple[int, int] | None = None) -> np.ndarray:
    """Object numbers uint8 [H, W] of a mask (palette, grey, 1-bit), resized nearest to ``size`` = (H, W).

    Raises FileNotFoundError or ValueError naming the file.
    """
    full = read_numbers(path, ("P", "L", "1"))
    if set(np.unique(full)) <= {0, _VOID}:
        full //= _VOID
    if size is None:
        return full
    return np.array(Image.fromarray(full).resize(size[::-1], Image.Resampling.NEAREST))


def pair_masks(images: ImagePath, masks: ImagePath) -> tuple[list[str], list[str]]:
    """Images and masks of two folders that have the same relative path up to the suffix, in order.

    Images without a mask are left out. Raises ValueError if there is no pair at all or a mask has no image.
    """
    image_root, image_files = list_images(images)
    mask_root, mask_files = list_images(masks)
    image_of = {name_below(image_root, path).with_suffix("").as_posix(): path for path in image_files}
    mask_of = {name_below(mask_root, path).with_suffix("").as_posix(): path for path in mask_files}
    common = [name for name in image_of if name in mask_of]
    alone = [mask_of[name] for name in mask_of if name not in image_of]
    if alone or not common:
        example = f", for instance {alone[0]}" if alone else ""
        raise ValueError(
            f"{len(common)} of {len(mask_of)} masks in {masks} have an image of the same name in {images}; "
            f"{len(alone)} have none{example}"
        )
    return [image_of[name] for name in common], [mask_of[name] for name in common]


VOC_LAYOUT = """expected the layout of PASCAL VOC 2012:
  VOCdevkit/VOC2012/JPEGImages/*.jpg
  VOCdevkit/VOC2012/SegmentationClass/*.png
  VOCdevkit/VOC2012/SegmentationObject/*.png
  VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"""


def voc_pairs(root: Path, ground_truth: str = "class", split: str = "val") -> tuple[list[str], list[str]]:
    """Images and masks of a split of PASCAL VOC 2012; ``root`` is the folder VOC2012.

    The objects of an image are its classes with ``ground_truth`` "class", its objects with "instance".
    Raises FileNotFoundError showing the expected layout and what is missing.
    """
    masks = root / {"class": "SegmentationClass", "instance": "SegmentationObject"}[ground_truth]
    names = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    for path in (masks, names):
        if not path.exists():
            raise FileNotFoundError(f"--data_path: no {path}; {VOC_LAYOUT}")
    stems = names.read_text("utf-8").split()
    images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    labels = [masks / f"{stem}.png" for stem in stems]
    missing = [path for path in (*images, *labels) if not path.is_file()]
    if missing or not stems:
        found = (
            f"{len(missing)} files are missing, the first: {missing[0]}" if missing else f"{names} is empty"
        )
        raise FileNotFoundError(f"--data_path: {found}; {VOC_LAYOUT}")
    return [str(path) for path in images], [str(path) for path in labels]
