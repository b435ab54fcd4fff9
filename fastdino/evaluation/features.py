"""Images in, feature vectors out: the evaluation transform, and one pass of a backbone over a list of images.

The transform is the one of the official ``eval_knn.py``, to the bit: bicubic resize of the shorter side to
256/224 of the wanted size, center crop, ImageNet mean and standard deviation. Threads do it ahead of the
network: nvImageCodec decodes JPEGs as Pillow does (Pillow itself decodes the rest, or all where DALI is not
installed), then `fastdino_kernels.resize_crop` computes the pixels that the crop shows. A CPU gets normalised
float32 from them, a GPU the bytes, which it normalises.
"""

from __future__ import annotations

import functools
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from fastdino_kernels import csrc
from fastdino_kernels.resize_crop import resize_crop
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from fastdino.data import headers, prescan
from fastdino.data.manifest import printable
from fastdino.data.samples import read
from fastdino.data.threads import threads
from fastdino.evaluation.feature_file import FeatureFile, digest_of_images, digest_of_weights

if TYPE_CHECKING:
    from fastdino.engine.parallel import World

T = TypeVar("T")
R = TypeVar("R")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ImagePath: TypeAlias = "str | os.PathLike[str]"
_KINDS = {"P": "palette", "L": "8-bit grey", "1": "1-bit"}  # Pillow's modes
Progress: TypeAlias = Callable[[int, int], None]
"""Called as ``progress(images done, images in all)`` after every batch."""


class UnreadableImage(ValueError):
    """A file that is no image, or damaged; the message names it."""


# -------------------------------------------------------------------------------------------------- one image


def read_image(path: ImagePath) -> Image.Image:
    """The RGB image in a file, as PIL converts it, but grey of more than 8 bits is scaled to 8; EXIF rotation
    is not applied (as in ImageFolder).

    Raises FileNotFoundError or UnreadableImage.
    """
    try:
        with _opened(read(os.fspath(path))) as image:
            if image.mode[0] in "IF":  # grey in 16 bits or more, which Pillow clips: as training sees it
                return Image.fromarray(np.asarray(prescan.decode(os.fspath(path))))
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image: {printable(os.fspath(path))}") from None
    except UnidentifiedImageError as error:  # which tells no more than the address of a buffer
        raise UnreadableImage(f"cannot read image {printable(os.fspath(path))}: of no known kind") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"cannot read image {printable(os.fspath(path))}: {error}") from error


def _opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=headers.PILLOW_FORMATS)
    codec = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png"}.get(str(image.format), headers.CODECS[-1])
    if reason := headers.refusal(codec, "uint8", image.height, image.width, content):
        raise ValueError(reason)
    return image


def read_pixels(path: ImagePath) -> np.ndarray:
    """The same as uint8 [height, width, 3], contiguous; JPEGs in less time, by nvImageCodec."""
    if os.fspath(path).lower().endswith((".jpg", ".jpeg")) and _nvimgcodec_there():
        try:
            return np.ascontiguousarray(prescan.decode(os.fspath(path)))
        except ValueError:  # Pillow may know what it is, and else says what is wrong
            pass
    return np.asarray(read_image(path))


@functools.cache
def _nvimgcodec_there() -> bool:
    try:
        prescan.import_nvimgcodec()
    except ImportError:
        return False
    return True


def center_view(height: int, width: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the resized image, whose shorter side is ``round(size * 256 / 224)``, and row and
    column of the center crop in it.
    """
    shorter = round(size * 256 / 224)
    # torchvision's Resize truncates the longer side and its CenterCrop rounds the offsets
    if width <= height:
        new = (max(shorter, int(shorter * height / width)), shorter)
    else:
        new = (shorter, max(shorter, int(shorter * width / height)))
    return new, (round((new[0] - size) / 2), round((new[1] - size) / 2))


def center_crop(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """The evaluation's view of an RGB image, by PIL: uint8 [size, size, 3]."""
    (height, width), (top, left) = center_view(image.height, image.width, size)
    return np.array(image.resize((width, height), resample).crop((left, top, left + size, top + size)))


def view(path: ImagePath, out: Tensor) -> None:
    """The evaluation's view of an image file into ``out``, [3, size, size]: uint8 pixels, or normalised
    float32.
    """
    pixels, size = read_pixels(path), out.shape[-1]
    if csrc.library() is not None:
        resized, corner = center_view(pixels.shape[0], pixels.shape[1], size)
        resize_crop(pixels, resized, corner, out=out)
        return
    crop = torch.from_numpy(center_crop(Image.fromarray(pixels), size))
    out.copy_(crop.permute(2, 0, 1) if out.dtype == torch.uint8 else normalize(crop[None])[0])


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W], contiguous, with ImageNet mean and standard deviation."""
    return normalize_planes(pixels.permute(0, 3, 1, 2)).contiguous()


def normalize_planes(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 with ImageNet mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


# ------------------------------------------------------------------------------------------------ many images


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
    normalized: bool = False,
    file: ImagePath | None = None,
    world: World | None = None,
) -> Tensor:
    """Features of images, in their order: float32 [len(paths), D] on the CPU.

    The backbone maps [B, 3, image_size, image_size] to [B, D]; it must be on ``device`` already.
    ``num_threads`` decode images (0: one per core), two batches ahead of the network; a ``dtype`` other than
    float32 runs the backbone under autocast. ``normalized`` divides each feature by its length.

    ``file`` keeps the features there (`feature_file`) instead of in memory and returns them mapped: a run
    that was killed continues where it was, and one that is complete is not done again, as long as weights,
    list of paths and the arguments above are the same.

    Each process of a ``world`` extracts :func:`share`, and all return everything: without a file every one
    of them holds all of it. Batches are those of a single process, so features are equal to the bit. To keep
    only its share a process passes that part of the list, without ``world``.

    Raises ValueError naming the file when an image cannot be read or a feature is not finite.
    """
    device = torch.device(device)
    if not len(paths):
        raise ValueError("extract_features: expected at least one image, got an empty list")
    if image_size < 1 or batch_size < 1:
        raise ValueError(
            f"expected image size and batch size of at least 1, got {image_size} and {batch_size}"
        )
    own = share(len(paths), batch_size, world)
    batches = [slice(i, min(i + batch_size, own.stop)) for i in range(own.start, own.stop, batch_size)]
    run = functools.partial(_run, backbone, paths, image_size, device, num_threads, dtype, normalized)
    if file is not None:
        settings = {"image_size": image_size, "precision": str(dtype), "normalized": normalized}
        key = {"weights": digest_of_weights(backbone), "images": digest_of_images(paths), **settings}
        width = _width(backbone, image_size, device)
        with FeatureFile(file, key, len(paths), width, batch_size, world) as store:
            missing = [batch for batch in batches if not store.finished[batch.start // batch_size]]
            run(missing, store.write, progress, own.stop - own.start)
        return store.load()

    features: Tensor | None = None

    def keep(rows: slice, batch: Tensor) -> None:
        nonlocal features
        if features is None:
            with torch.inference_mode(False):  # what is returned may be trained on
                features = torch.empty(own.stop - own.start, batch.shape[1])
        features[rows.start - own.start : rows.stop - own.start] = batch

    run(batches, keep, progress, own.stop - own.start)
    if features is None:  # more processes than batches
        features = torch.empty(0, _width(backbone, image_size, device))
    return features if world is None or world.size == 1 else gather(features, len(paths), batch_size, world)


def share(n: int, batch_size: int, world: World | None) -> slice:
    """The part of ``n`` images that is this process's: whole batches, one after another in order of rank."""
    if world is None:
        return slice(0, n)
    batches = -(-n // batch_size)
    ends = (batches * (world.rank + i) // world.size * batch_size for i in (0, 1))
    start, stop = (min(n, end) for end in ends)
    return slice(start, stop)


def _run(
    backbone: nn.Module,
    paths: Sequence[ImagePath],
    image_size: int,
    device: torch.device,
    num_threads: int,
    dtype: torch.dtype,
    normalized: bool,
    batches: list[slice],
    save: Callable[[slice, Tensor], None],
    progress: Progress | None,
    total: int,
) -> None:
    """``save(rows, features)`` of every batch; counts as done what of ``total`` images is in none of them."""
    done = total - sum(rows.stop - rows.start for rows in batches)
    cuda = device.type == "cuda"

    def finish(rows: slice, features: Tensor) -> None:
        nonlocal done
        features = features.float().cpu()
        bad = torch.nonzero(~torch.isfinite(features).all(1))
        if len(bad):
            name = os.fspath(paths[rows.start + int(bad[0])])
            raise ValueError(f"the backbone's feature of {name} is not finite")
        save(rows, nn.functional.normalize(features, dim=1) if normalized else features)
        done += len(features)
        if progress is not None:
            progress(done, total)

    running: tuple[slice, Tensor] | None = None
    with evaluating(backbone), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for rows, pixels in _views(paths, batches, image_size, num_threads, bytes_on_gpu=cuda):
            if cuda:
                pixels = normalize_planes(pixels.to(device, non_blocking=True))
            features = backbone(pixels)  # [b, D]
            if running is not None:  # a GPU has the next batch to work on while the host reads this one
                finish(*running)
            running = rows, features
        if running is not None:
            finish(*running)


def _views(
    paths: Sequence[ImagePath], batches: list[slice], size: int, num_threads: int, bytes_on_gpu: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Each batch and the views of its images: normalised float32 [b, 3, size, size], or uint8 in pinned
    memory.
    """
    dtype = torch.uint8 if bytes_on_gpu else torch.float32
    begun: deque[Tensor] = deque()

    def jobs() -> Iterator[list[tuple[ImagePath, Tensor]]]:
        for rows in batches:
            with torch.inference_mode(False):  # in which the threads are not
                out = torch.empty(rows.stop - rows.start, 3, size, size, dtype=dtype, pin_memory=bytes_on_gpu)
            begun.append(out)
            yield [(paths[i], out[i - rows.start]) for i in range(rows.start, rows.stop)]

    for rows, _ in zip(batches, in_threads(lambda job: view(*job), jobs(), num_threads), strict=True):
        yield rows, begun.popleft()


def in_threads(
    work: Callable[[T], R], batches: Iterable[Sequence[T]], num_threads: int = 0
) -> Iterator[list[R]]:
    """``work`` of all members of each batch, in order, done by threads (0: one per core) that keep two
    batches ahead.
    """
    with threads(num_threads or available_cores(), "decode") as pool:
        source = iter(batches)
        pending: deque[list[Future[R]]] = deque()
        while True:
            for batch in islice(source, 3 - len(pending)):
                pending.append([pool.submit(work, item) for item in batch])
            if not pending:
                return
            yield [future.result() for future in pending.popleft()]


def _width(backbone: nn.Module, image_size: int, device: torch.device) -> int:
    """Numbers per feature."""
    with evaluating(backbone):
        return backbone(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]


def gather(own: Tensor, n: int, batch_size: int, world: World, rows: int = 1 << 16) -> Tensor:
    """The features [n, D] of all processes, on every one, from those of each one's :func:`share`.

    Each sends its own in turn, some rows at a time.
    """
    features = torch.empty(n, own.shape[1])
    for rank in range(world.size):
        part = share(n, batch_size, replace(world, rank=rank))
        for start in range(part.start, part.stop, rows):
            piece = features[start : min(start + rows, part.stop)]
            if rank == world.rank:
                piece.copy_(own[start - part.start : start - part.start + len(piece)])
            there = piece.to(world.device)  # NCCL sends what is on a GPU
            dist.broadcast(there, src=rank)
            piece.copy_(there)
    return features


def raw_pixel_features(paths: Sequence[ImagePath], size: int = 32, *, num_threads: int = 0) -> Tensor:
    """The pixels as features, the baseline without a network: float32 [len(paths), 3 * size * size].

    The evaluation transform at ``size`` pixels, so the ImageNet mean colour is subtracted and cosines are not
    all near one.
    """
    if not len(paths):
        raise ValueError("raw_pixel_features: expected at least one image, got an empty list")
    batches = [slice(i, min(i + 256, len(paths))) for i in range(0, len(paths), 256)]
    parts = _views(paths, batches, size, num_threads)
    return torch.cat([pixels.flatten(1) for _, pixels in parts])


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def list_images(data_path: ImagePath) -> tuple[str, list[str]]:
    """``(root, images below it in order)`` of a folder, a list, containers, or the folder of one image file.

    Images in containers are no files: `read_image` reads them all, `name_below` names them.
    """
    from fastdino.data import containers
    from fastdino.data.manifest import build_manifest

    root = os.fspath(data_path)
    if os.path.isfile(root) and not root.lower().endswith(".txt") and containers.kind_of(root) is None:
        return os.path.dirname(root), [root]
    return root if os.path.isdir(root) else os.path.dirname(root), list(build_manifest(root).paths)


def name_below(root: ImagePath, path: ImagePath) -> Path:
    """The path relative to ``root``, or all of it if it lies elsewhere: relative, and without ``..``."""
    whole, top = Path(os.path.abspath(path)), os.path.abspath(root)
    return whole.relative_to(top if whole.is_relative_to(top) else whole.anchor)


def read_numbers(path: ImagePath, modes: Sequence[str] = ("P", "L")) -> np.ndarray:
    """Object numbers uint8 [H, W] of a mask: palette or 8-bit grey, or what ``modes`` of Pillow allow.

    Raises FileNotFoundError or ValueError naming the file.
    """
    name = os.fspath(path)
    try:
        with _opened(read(name)) as image:
            if image.mode not in modes:
                kinds = " or ".join(_KINDS[mode] for mode in modes)
                raise ValueError(f"expected a {kinds} image of object numbers, got mode {image.mode}")
            return np.array(image.convert("L") if image.mode == "1" else image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such mask: {printable(name)}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read mask {printable(name)}: {error}") from error
