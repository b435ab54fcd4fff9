"""The multi-crop finish against Pillow, one thread each, operation by operation and as a whole.

    python bench/multicrop.py [--images FOLDER] [--repeats 7]

The Pillow side is what torchvision's transforms call (crop, resize, ImageEnhance, HSV shift, GaussianBlur, ToTensor,
Normalize). The two results are compared first and must be equal bit for bit. The cost of an operation of ours is what a
call with it takes more than a call without; medians of the repeats, with the quartiles' spread for the whole.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from fastdino_kernels import csrc
from fastdino_kernels.multicrop import multicrop as mc_function
from fastdino_kernels.multicrop import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
)

VIEWS = [(224, 0.25, 1.0)] * 2 + [(96, 0.05, 0.25)] * 8  # size and scale of every view
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


def pillow_hue(image: Image.Image, turns: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    shifted = np.array(h, np.uint8) + np.int32(turns * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), s, v)).convert("RGB")


PILLOW_JITTER: dict[int, Callable[[Image.Image, float], Image.Image]] = {
    BRIGHTNESS: lambda image, f: ImageEnhance.Brightness(image).enhance(f),
    CONTRAST: lambda image, f: ImageEnhance.Contrast(image).enhance(f),
    SATURATION: lambda image, f: ImageEnhance.Color(image).enhance(f),
    HUE: pillow_hue,
}


def pillow(image: Image.Image, row: np.ndarray, size: int) -> Tensor:
    y, x, h, w = (int(v) for v in row[:4])
    crop = image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)
    if row[FLIP]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if row[JITTER]:
        for column in ORDERS[int(row[ORDER])]:
            crop = PILLOW_JITTER[column](crop, float(row[column]))
    if row[GRAY]:
        gray = np.array(crop.convert("L"))
        crop = Image.fromarray(np.dstack([gray, gray, gray]))
    if row[SIGMA] > 0:
        crop = crop.filter(ImageFilter.GaussianBlur(float(row[SIGMA])))
    if row[SOLARIZE]:
        crop = ImageOps.solarize(crop, 128)
    tensor = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float().div(255)
    return tensor.sub_(MEAN).div_(STD)


def random_rows(images: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """The official distribution: [n, V, 16]."""
    rows = np.zeros((len(images), len(VIEWS), COLUMNS), np.float32)
    for i, image in enumerate(images):
        height, width = image.shape[:2]
        for v, (_, low, high) in enumerate(VIEWS):
            while True:
                area, ratio = height * width * rng.uniform(low, high), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
                h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
                if h <= height and w <= width:
                    break
            y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            jitter = [rng.random() < 0.8, *rng.uniform(0.6, 1.4, 2), rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1)]
            blur = rng.random() < (1.0, 0.1, *[0.5] * 8)[v]
            effects = [rng.random() < 0.2, rng.uniform(0.1, 2) if blur else 0, v == 1 and rng.random() < 0.2]
            rows[i, v, :14] = [y, x, h, w, rng.random() < 0.5, *jitter, rng.integers(24), *effects]
    return rows


def interleaved(sides: list[Callable[[], None]], repeats: int) -> list[list[float]]:
    """CPU seconds of every repeat of every side, taken in turns so that all see the same machine."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, seconds in zip(sides, times, strict=True):
            start = time.thread_time()
            side()
            seconds.append(time.thread_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images (default: 500 x 375 coloured noise)")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if csrc.library() is None:
        raise SystemExit("multicrop: the C++ kernels are not built")
    rng = np.random.default_rng(0)
    if options.images:
        paths = sorted(p for p in options.images.iterdir() if p.suffix.lower() in (".jpeg", ".jpg", ".png"))[:16]
        pictures = [Image.open(path).convert("RGB") for path in paths]
    else:
        small = rng.integers(0, 256, (16, 24, 32, 3), dtype=np.uint8)
        pictures = [Image.fromarray(s).resize((500, 375), Image.Resampling.BICUBIC) for s in small]
    images = [np.array(p) for p in pictures]
    n = len(images)
    rows = random_rows(images, rng)

    def ours(some: np.ndarray, views: slice, dtype: torch.dtype = torch.float32) -> Callable[[], list[Tensor]]:
        out = [torch.empty(n, 3, s, s, dtype=dtype) for s, _, _ in VIEWS[views]]
        part = np.ascontiguousarray(some[:, views])

        def call() -> list[Tensor]:
            mc_function(images, part, out=out)
            return out

        return call

    def theirs(some: np.ndarray, views: slice) -> Callable[[], list[list[Tensor]]]:
        sizes = list(enumerate(VIEWS))[views]
        return lambda: [[pillow(p, some[i, v], s) for i, p in enumerate(pictures)] for v, (s, _, _) in sizes]

    everything = slice(0, len(VIEWS))
    for ours_, theirs_ in zip(ours(rows, everything)(), theirs(rows, everything)(), strict=True):
        if not torch.equal(ours_, torch.stack(theirs_)):
            raise SystemExit("multicrop: the result differs from Pillow's")

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, commit {commit}; one thread; microseconds per crop, median of {options.repeats}")
    print(f"{'operation':24}{'size':>6}{'Pillow':>10}{'ours':>10}{'ratio':>8}")
    plain = rows.copy()
    plain[..., FLIP] = plain[..., JITTER] = plain[..., GRAY] = plain[..., SIGMA] = plain[..., SOLARIZE] = 0
    plain[..., BRIGHTNESS : SATURATION + 1], plain[..., HUE] = 1, 0
    jitter = plain.copy()
    jitter[..., JITTER] = 1
    blurred = plain.copy()
    blurred[..., SIGMA] = rng.uniform(0.1, 2, blurred.shape[:2])
    grayed = plain.copy()
    grayed[..., GRAY] = 1
    colored = jitter.copy()
    colored[..., BRIGHTNESS:ORDER] = rows[..., BRIGHTNESS:ORDER]
    for size, views in ((224, slice(0, 2)), (96, slice(2, 10))):
        count = n * (views.stop - views.start)
        cases = {"resize + normalize": plain, "+ jitter": colored, "+ gray": grayed, "+ blur": blurred}
        sides: list[Callable[[], object]] = []
        for some in cases.values():
            sides += [theirs(some, views), ours(some, views)]
        medians = [statistics.median(t) / count * 1e6 for t in interleaved(sides, options.repeats)]  # type: ignore[arg-type]
        for i, name in enumerate(cases):
            a, b = medians[2 * i], medians[2 * i + 1]
            if i:
                a, b = a - medians[0], b - medians[1]
            print(f"{name:24}{size:6}{a:10.1f}{b:10.1f}{a / b:8.1f}")
    sides = [theirs(rows, everything), *(ours(rows, everything, d) for d in (torch.float32, torch.bfloat16))]
    pil, fp32, bf16 = (sorted(s / n * 1e6 for s in t) for t in interleaved(sides, options.repeats))  # type: ignore[arg-type]
    for name, times in (("Pillow", pil), ("ours, float32", fp32), ("ours, bfloat16", bf16)):
        low, mid, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(pil) / mid
        print(f"{name:24} 2 x 224 + 8 x 96: {mid:8.0f} us per image (quartiles {low:.0f} to {high:.0f}), {ratio:.1f}x")


if __name__ == "__main__":
    main()
