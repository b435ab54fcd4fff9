"""Video object segmentation on DAVIS 2017 by carrying labels along features (DINO paper, table 5).

Nothing is trained. The first frame's mask is known; every later frame's patches take the labels of the most
similar patches in the first and the last few frames (Jabri et al., arXiv 2006.14613). Sizes, the resize, the
context and the output follow the official ``eval_video_segmentation.py``; similarities are only computed
where its window allows them, tile by tile, so that memory does not grow with the square of the frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdino.evaluation.features import (
    IMAGENET_MEAN,
    Progress,
    evaluating,
    in_threads,
    read_image,
    read_numbers,
)

if TYPE_CHECKING:
    from fastdino.models.vit import VisionTransformer

LAYOUT = """\
DIR/
  ImageSets/2017/val.txt             names of the sequences, one per line
  JPEGImages/480p/<sequence>/*.jpg   the frames: 00000.jpg, 00001.jpg, ...
  Annotations/480p/<sequence>/*.png  a mask per frame: 0 background, 1, 2, ... objects"""

OFFICIAL_STD = (0.228, 0.224, 0.225)
"""What the official script divides by; ImageNet's red standard deviation is 0.229."""

_TEMPERATURE = 0.1
_TILE = 16  # patches: 8 context frames of a 40 x 40 neighbourhood are 13 MB of similarities
_VOID = 255


@dataclass(frozen=True)
class Video:
    """A sequence: its frames and their masks, in order."""

    name: str
    frames: list[Path]
    masks: list[Path]


@dataclass(frozen=True)
class Propagation:
    """How labels are carried; the defaults are the official ones."""

    n_last_frames: int = 7
    """Earlier frames that labels come from, besides the first."""
    radius: int = 12
    """Labels come from at most so many patches away, per direction; 0 is from anywhere."""
    topk: int = 5
    """Patches that a patch takes its label from; more if the last of them are equally similar."""
    short_side: int = 480
    """Of the frames as the backbone sees them, in pixels."""
    std: tuple[float, float, float] = OFFICIAL_STD
    """Colours are divided by it, after ImageNet's mean is subtracted."""


# ------------------------------------------------------------------------------------------------------ files


def davis_videos(root: Path) -> list[Video]:
    """The validation sequences of DAVIS 2017.

    Raises FileNotFoundError or ValueError, with the expected layout, if files are missing or frames too few.
    """
    try:
        names = (root / "ImageSets" / "2017" / "val.txt").read_text(encoding="utf-8").split()
        videos = [_video(root, name) for name in names]
        if not videos:
            raise ValueError("ImageSets/2017/val.txt names no sequence")
    except (OSError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"--data_path {root}: {error}; expected\n{LAYOUT}") from error
    return videos


def _video(root: Path, name: str) -> Video:
    frames = sorted((root / "JPEGImages" / "480p" / name).glob("*.jpg"))
    if len(frames) < 3:
        raise ValueError(f"sequence {name} has {len(frames)} frames, and the first and last are not scored")
    masks = [root / "Annotations" / "480p" / name / f"{frame.stem}.png" for frame in frames]
    missing = [mask for mask in masks if not mask.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(masks)} masks of {name} are missing, first {missing[0]}"
        )
    return Video(name, frames, masks)


def read_labels(path: Path, void: bool = False) -> np.ndarray:
    """Object numbers uint8 [H, W] of a mask; with ``void`` 255 becomes 0, background.

    Raises FileNotFoundError or ValueError naming the file.
    """
    labels = read_numbers(path)
    return np.where(labels == _VOID, 0, labels).astype(np.uint8) if void else labels


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Write object numbers uint8 [H, W] as a PNG with the palette of PASCAL VOC and DAVIS."""
    image = Image.fromarray(labels)
    image.putpalette(_palette())
    image.save(path)


def _palette() -> bytes:
    """Bits 0, 1, 2 of a number are the highest bits of red, green, blue, bits 3, 4, 5 the next, ..."""
    colors = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colors[:, bit % 3] |= ((np.arange(256) >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colors.tobytes()


# ----------------------------------------------------------------------------------------------------- frames


def frame_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side at ``short_side``, the longer rounded down to 64s."""
    if height > width:
        return int(short_side * height / width // 64 * 64), short_side
    return short_side, int(short_side * width / height // 64 * 64)


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] of uint8 [H, W, 3], as OpenCV's ``INTER_LINEAR``: two taps, no antialiasing.

    The arithmetic is OpenCV's in fixed point: weights of 11 bits, and the sum down the columns from products
    of which the low bits are dropped.
    """
    top, bottom, top_weight, bottom_weight = _taps(pixels.shape[0], height)
    left, right, left_weight, right_weight = _taps(pixels.shape[1], width)
    wide = pixels[:, left] * left_weight[:, None] + pixels[:, right] * right_weight[:, None]  # [H, width, 3]
    wide >>= 4
    tall = (wide[top] * top_weight[:, None, None] >> 16) + (wide[bottom] * bottom_weight[:, None, None] >> 16)
    return (tall + 2 >> 2).astype(np.uint8)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Both source positions of each of ``new`` places, and their weights in 1/2048: int32 [new] each."""
    place = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(place)
    part = place - first
    weights = [np.rint(share * np.float32(2048)).astype(np.int32) for share in (np.float32(1) - part, part)]
    first = first.astype(np.int32)
    return first.clip(0, old - 1), (first + 1).clip(0, old - 1), weights[0], weights[1]


def load_frame(path: Path, how: Propagation, size: tuple[int, int]) -> Tensor:
    """Normalised frame float32 [3, h, w]; ValueError if the file's picture is not of ``size`` = (H, W)."""
    pixels = np.array(read_image(path))
    if pixels.shape[:2] != size:
        raise ValueError(f"{path}: expected {size} pixels as in the first mask, got {pixels.shape[:2]}")
    small = torch.from_numpy(resize_bilinear(pixels, *frame_size(*size, how.short_side)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, how.std))
    return (small.permute(2, 0, 1).float() / 255 - mean) / std


# ------------------------------------------------------------------------------------------------ propagation


def patch_features(backbone: VisionTransformer, frames: Tensor) -> Tensor:
    """Frames [B, 3, H, W] -> last block's patch tokens after the final norm, of length one: [B, h, w, D]."""
    tokens = backbone.get_intermediate_layers(frames, 1)[0][:, 1:].float()
    if not torch.isfinite(tokens).all():
        raise ValueError("the patch features of the network are not finite")
    h, w = frames.shape[2] // backbone.patch_size, frames.shape[3] // backbone.patch_size
    return nn.functional.normalize(tokens, dim=2).view(len(frames), h, w, -1)


def propagate(queries: Tensor, keys: Tensor, labels: Tensor, radius: int, topk: int) -> Tensor:
    """Soft labels of a frame, float32 [C, h, w], from those of the frames around it.

    ``queries`` [h, w, D] are the frame's features, ``keys`` [F, h, w, D] and ``labels`` [F, C, h, w] those of
    its context; features have length one. A patch takes the mean label of its ``topk`` most similar patches
    among all frames, weighted by ``exp(cosine / 0.1)``, of those at most ``radius`` rows and columns away (0:
    all).
    """
    h, w, _ = queries.shape
    reach = radius or max(h, w)
    result = labels.new_empty(labels.shape[1:])
    row, column = torch.arange(h, device=queries.device), torch.arange(w, device=queries.device)
    for y in range(0, h, _TILE):
        ys, key_ys = slice(y, min(y + _TILE, h)), slice(max(y - reach, 0), y + _TILE + reach)
        for x in range(0, w, _TILE):
            xs, key_xs = slice(x, min(x + _TILE, w)), slice(max(x - reach, 0), x + _TILE + reach)
            near_y = (row[ys, None] - row[key_ys]).abs() <= reach  # [qy, ky]
            near_x = (column[xs, None] - column[key_xs]).abs() <= reach  # [qx, kx]
            near = near_y[:, None, :, None] & near_x[None, :, None, :]  # [qy, qx, ky, kx]
            weights = _affinity(queries[ys, xs], keys[:, key_ys, key_xs], near, topk)  # [Q, F * K]
            source = labels[:, :, key_ys, key_xs].transpose(0, 1).flatten(1)  # [C, F * K]
            result[:, ys, xs] = (source @ weights.T).view(-1, *near.shape[:2])
    return result


def _affinity(queries: Tensor, keys: Tensor, near: Tensor, topk: int) -> Tensor:
    """Weights of keys [F, ky, kx, D] for queries [qy, qx, D]: [Q, F * ky * kx], rows sum to one."""
    cosines = queries.flatten(0, 1) @ keys.flatten(0, 2).T
    weights = (cosines / _TEMPERATURE).exp_().view(near.shape[0] * near.shape[1], len(keys), -1)
    weights = (weights * near.flatten(2).flatten(0, 1)[:, None]).flatten(1)
    least = weights.topk(min(topk, weights.shape[1]), dim=1).values[:, -1:]
    weights = weights.masked_fill_(weights < least, 0)
    return weights / weights.sum(1, keepdim=True)


def carry(features: Iterable[Tensor], first: Tensor, how: Propagation) -> Iterator[Tensor]:
    """Soft labels [C, h, w] of the second frame and each later one, from features [h, w, D] of all frames.

    ``first`` [C, h, w] are the labels of the first frame, which stays in the context throughout; the soft
    labels of later frames enter it as they are.
    """
    frames = iter(features)
    start = next(frames)
    context: deque[tuple[Tensor, Tensor]] = deque(maxlen=how.n_last_frames)
    for feature in frames:
        keys = torch.stack([start, *(key for key, _ in context)])
        labels = torch.stack([first, *(label for _, label in context)])
        label = propagate(feature, keys, labels, how.radius, how.topk)
        context.append((feature, label))
        yield label


def one_hot(labels: np.ndarray, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """float32 [C, h, w] of object numbers uint8 [H, W], resized nearest to ``size``; C = 1 + highest."""
    small = np.array(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))
    hot = nn.functional.one_hot(torch.from_numpy(small).to(device).long(), int(labels.max()) + 1)
    return hot.permute(2, 0, 1).float()


def hard_labels(soft: Tensor, patch_size: int, size: tuple[int, int]) -> np.ndarray:
    """Object numbers uint8 [H, W] at ``size`` = (H, W) of soft labels [C, h, w].

    Enlarged bilinearly by the patch size; each channel is stretched to [0, 1] there, unless it is constant,
    the largest wins, and the picture is resized nearest.
    """
    large = nn.functional.interpolate(
        soft[None],
        scale_factor=patch_size,
        mode="bilinear",
        align_corners=False,
        recompute_scale_factor=False,
    )[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    stretched = torch.where(high > low, (large - low) / (high - low), large)
    winner = Image.fromarray(stretched.argmax(0).to(torch.uint8).cpu().numpy())
    return np.array(winner.resize(size[::-1], Image.Resampling.NEAREST))


def segment(
    backbone: VisionTransformer,
    video: Video,
    how: Propagation,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 6,
    num_threads: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Object numbers uint8 [H, W] of every frame of a video; the first are those of its mask.

    Frames pass the backbone ``batch_size`` at a time, under autocast for a ``dtype`` other than float32;
    labels are carried in float32. Raises ValueError naming the file if a frame cannot be read or has another
    size.
    """
    device, patch = torch.device(device), backbone.patch_size
    labels = read_labels(video.masks[0], void=True)
    size = (labels.shape[0], labels.shape[1])
    height, width = frame_size(*size, how.short_side)
    if not height // patch or not width // patch:
        raise ValueError(
            f"--short_side {how.short_side}: {video.name} becomes {width} x {height} pixels, no patch"
        )

    def features() -> Iterator[Tensor]:
        parts = (video.frames[i : i + batch_size] for i in range(0, len(video.frames), batch_size))
        for batch in in_threads(lambda path: load_frame(path, how, size), parts, num_threads):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                tokens = patch_features(backbone, torch.stack(batch).to(device))
            yield from tokens

    result = [labels]
    with evaluating(backbone):
        first = one_hot(labels, (height // patch, width // patch), device)
        for soft in carry(features(), first, how):
            result.append(hard_labels(soft, patch, size))
            if progress is not None:
                progress(len(result), len(video.frames))
    return result
