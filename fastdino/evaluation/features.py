"""Images in, feature vectors out: the evaluation transform, and one pass of a backbone over a list of files.

The transform is the one of the official ``eval_knn.py``: bicubic resize of the shorter side to 256/224 of the
wanted size, center crop, ImageNet mean and standard deviation. PIL does it in threads (it releases the
interpreter lock), on 8-bit pixels; normalisation follows in float32 on the device.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ImagePath: TypeAlias = "str | os.PathLike[str]"
Progress: TypeAlias = Callable[[int, int], None]
"""Called as ``progress(images done, images in all)`` after every batch."""


class UnreadableImage(ValueError):
    """A file that is no image, or damaged; the message names it."""


def read_image(path: ImagePath) -> Image.Image:
    """The RGB image in a file, as PIL converts it; EXIF rotation is not applied (as in ImageFolder).

    Raises FileNotFoundError or UnreadableImage.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image: {os.fspath(path)}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"cannot read image {os.fspath(path)}: {error}") from error


def center_crop(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Shorter side to ``round(size * 256 / 224)``, then the center: uint8 [size, size, 3] of an RGB image."""
    width, height = image.size
    shorter = round(size * 256 / 224)
    # torchvision's Resize truncates the longer side and its CenterCrop rounds the offsets
    if width <= height:
        new = (shorter, max(shorter, int(shorter * height / width)))
    else:
        new = (max(shorter, int(shorter * width / height)), shorter)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.array(image.resize(new, resample).crop((left, top, left + size, top + size)))


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W], contiguous, with ImageNet mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(3, 1, 1)
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous()


@contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """Eval mode without autograd; afterwards every module is in the mode it was in before."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def extract_features(
    backbone: nn.Module,
    paths: Sequence[ImagePath],
    *,
    image_size: int = 224,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    num_threads: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Tensor:
    """Features of image files, in their order: float32 [len(paths), D] on the CPU, not normalised.

    The backbone maps [B, 3, image_size, image_size] to [B, D]; it must be on ``device`` already.
    ``num_threads`` decode images (0: one per core); a ``dtype`` other than float32 runs the backbone under
    autocast. Raises ValueError naming the file when an image cannot be read or a feature is not finite.
    """
    device = torch.device(device)
    if not len(paths):
        raise ValueError("extract_features: expected at least one image, got an empty list")
    features: Tensor | None = None
    done = 0
    with evaluating(backbone), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for pixels in _batches(paths, image_size, batch_size, num_threads):
            if device.type == "cuda":
                pixels = pixels.pin_memory().to(device, non_blocking=True)
            batch = backbone(normalize(pixels)).float().cpu()  # [b, D]
            if features is None:
                features = torch.empty(len(paths), batch.shape[1])
            bad = torch.nonzero(~torch.isfinite(batch).all(1))
            if len(bad):
                raise ValueError(
                    f"the backbone's feature of {os.fspath(paths[done + int(bad[0])])} is not finite"
                )
            features[done : done + len(batch)] = batch
            done += len(batch)
            if progress is not None:
                progress(done, len(paths))
    assert features is not None
    return features


def raw_pixel_features(paths: Sequence[ImagePath], size: int = 32, *, num_threads: int = 0) -> Tensor:
    """The pixels as features, the baseline without a network: float32 [len(paths), 3 * size * size].

    The evaluation transform at ``size`` pixels, so the ImageNet mean colour is subtracted and cosines are not
    all near one.
    """
    if not len(paths):
        raise ValueError("raw_pixel_features: expected at least one image, got an empty list")
    return torch.cat([normalize(pixels).flatten(1) for pixels in _batches(paths, size, 256, num_threads)])


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(paths: Sequence[ImagePath], size: int, batch_size: int, num_threads: int) -> Iterator[Tensor]:
    """uint8 [b, size, size, 3] batches in order; decoding stays at most two batches ahead."""
    if size < 1 or batch_size < 1:
        raise ValueError(f"expected image size and batch size of at least 1, got {size} and {batch_size}")

    def load(path: ImagePath) -> np.ndarray:
        return center_crop(read_image(path), size)

    with ThreadPoolExecutor(num_threads or available_cores(), thread_name_prefix="decode") as pool:
        pending: deque[Future[np.ndarray]] = deque(
            pool.submit(load, path) for path in paths[: 2 * batch_size]
        )
        submitted = len(pending)
        try:
            while pending:
                rows = [pending.popleft().result() for _ in range(min(batch_size, len(pending)))]
                ahead = paths[submitted : submitted + len(rows)]
                pending.extend(pool.submit(load, path) for path in ahead)
                submitted += len(ahead)
                yield torch.from_numpy(np.stack(rows))
        finally:
            for future in pending:
                future.cancel()


def list_images(data_path: ImagePath) -> tuple[Path, list[Path]]:
    """``(root, images below it in order)`` of a folder, or of the folder of a single image file."""
    from fastdino.data.manifest import build_manifest

    root = Path(data_path)
    if root.is_file() and root.suffix.lower() != ".txt":
        return root.parent, [root]
    manifest = build_manifest(root)
    return (root if root.is_dir() else root.parent), [Path(path) for path in manifest.paths]
