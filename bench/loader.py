"""The CPU data pipeline against the official one, from JPEG files to normalised crops in float32.

python -m bench.loader [--images FOLDER] [--rounds 5] [--demand IMG_S] [--save]

Official: Pillow and the transforms of DataAugmentationDINO, written here from their documentation, in a torch
DataLoader with as many worker processes as the loader gets threads. First, crops of several images with equal
parameters are compared: both are exact. Then the two take turns; a ratio is that of neighbours. Without a
folder, random pictures with the spectrum of photographs are made (500 x 375, about 85 KB).

Is the loader the bottleneck? Our rates are compared with the images per second that our training step takes,
measured in the same run with as many local crops (on a CPU while the loader rests), or with --demand.

Wall-clock ratios say little while other programs compute (a round is then called contested: more than a tenth
of a core went elsewhere), because they squeeze processes and threads differently. CPU time per image, of the
process and its workers, holds up better and is given too.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastdino_kernels.multicrop import multicrop
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from bench.harness import Transcript, interleave, save
from bench.machine import device
from bench.providers import Problem, standard, steps
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
    crop_parameters,
)
from fastdino.data.loader import MultiCropLoader
from fastdino.data.manifest import Manifest, build_manifest

MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
CONTESTED = 0.1  # cores


# ------------------------------------------------------------------------------------ the official transforms


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

    def __init__(self, paths: list[str], crops: CropConfig) -> None:
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


# --------------------------------------------------------------------------------------------- the comparison


WARM_UP = 4  # batches: start-up, and whatever was loaded ahead meanwhile


def official(manifest: Manifest, crops: CropConfig, batch: int, workers: int, n_batches: int) -> Figures:
    dataset = OfficialDataset(manifest.paths, crops)
    order = RandomSampler(dataset, replacement=True, num_samples=(n_batches + WARM_UP) * batch)
    loader = DataLoader(dataset, batch, sampler=order, num_workers=workers, drop_last=True)
    return measure(iter(loader), batch, n_batches)


def ours(
    manifest: Manifest,
    crops: CropConfig,
    batch: int,
    workers: int,
    n_batches: int,
    *,
    cache: bool,
) -> Figures:
    with MultiCropLoader(
        manifest,
        crops,
        seed=0,
        global_batch=batch,
        micro_batch=batch,
        num_threads=workers,
        cache_decoded=cache,
    ) as loader:
        return measure(loader, batch, n_batches)


Figures = dict[str, float]


def measure(batches: Iterator[object], batch: int, n_batches: int) -> Figures:
    """Images per second, CPU milliseconds per image, and the cores that other programs kept busy
    meanwhile."""
    for _ in range(WARM_UP):
        next(batches)
    busy, own, started = machine_cpu_seconds(), own_cpu_seconds(), time.perf_counter()
    for _ in range(n_batches):
        next(batches)
    seconds = time.perf_counter() - started
    own, busy = own_cpu_seconds() - own, machine_cpu_seconds() - busy
    n = n_batches * batch
    return {
        "images_per_second": n / seconds,
        "cpu_ms_per_image": 1000 * own / n,
        "competing_cores": max(0.0, (busy - own) / seconds),
    }


def machine_cpu_seconds() -> float:
    """CPU time that all programs have used since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_cpu_seconds() -> float:
    """CPU time of this process and its children, those still running included."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if os.getpid() in (int(stat.parent.name), int(fields[1])):
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def check_equal(manifest: Manifest, crops: CropConfig, n: int = 16) -> None:
    """Both give the same crops for the same parameters, or there is nothing to compare."""
    images = [Image.open(path).convert("RGB") for path in manifest.paths[:n]]
    sizes = np.array([(image.height, image.width) for image in images])
    params = crop_parameters(0, 0, np.arange(len(images)), sizes, crops)
    out = [torch.empty(len(images), 3, size, size) for size in view_sizes(crops)]
    multicrop([np.asarray(image) for image in images], params, out=out)
    for i, image in enumerate(images):
        for view, crop in enumerate(out):
            assert torch.equal(crop[i], apply(image, params[i, view], crop.shape[-1])), (i, view)


def make_images(folder: Path, n: int) -> None:
    """Pictures whose spectrum falls as 1/f, as that of photographs does."""
    rng = np.random.default_rng(0)
    f = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
    f[0, 0] = np.inf
    mix = np.array([[1.0, 0.3, 0.2], [1.0, 0.0, -0.3], [1.0, -0.3, 0.1]])
    for i in range(n):
        spectrum = (rng.normal(size=(3, *f.shape)) + 1j * rng.normal(size=(3, *f.shape))) / f**1.1
        planes = np.fft.irfft2(spectrum, (375, 500))
        planes /= planes.std(axis=(1, 2), keepdims=True)
        pixels = np.clip(120 + 50 * np.einsum("cp,phw->hwc", mix, planes), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}.jpg", quality=90)


def compare(
    manifest: Manifest, local_crops_number: int, args: argparse.Namespace, say: Transcript
) -> dict[str, Any]:
    crops = CropConfig((0.25, 1.0), local_crops_number, (0.05, 0.25))
    check_equal(manifest, crops)
    say(f"2 x 224 + {local_crops_number} x 96, batch {args.batch}, {args.workers} workers; equal crops")
    setting = (manifest, crops, args.batch, args.workers, max(1, args.count // args.batch))
    providers: dict[str, Callable[[], Figures]] = {
        "official": lambda: official(*setting),
        "fastdino": lambda: ours(*setting, cache=False),
        "fastdino, decoded once": lambda: ours(*setting, cache=True),
    }
    rounds = [{name: run() for name, run in providers.items()} for _ in range(args.rounds)]
    contested = sum(max(row[p]["competing_cores"] for p in row) > CONTESTED for row in rounds)
    summary = {name: summarise_rounds(rounds, name) for name in providers}
    say(
        f"{'provider':24} {'img/s':>7} {'CPU ms/img':>11} {'speed-up':>9} {'min-max':>12} {'by CPU time':>12}"
    )
    for name, row in summary.items():
        speed = f"{row['images_per_second']:7.0f} {row['cpu_ms_per_image']:11.2f} {row['speedup']:8.2f}x"
        spread = f"{row['speedup_min']:6.2f}-{row['speedup_max']:.2f}"
        say(f"{name:24} {speed} {spread} {row['cpu_speedup']:11.2f}x")
    say(f"{contested} of {args.rounds} rounds contested")
    demand = args.demand or step_demand(local_crops_number, args, say)
    for name in providers:
        if name.startswith("fastdino"):
            say(verdict(name, summary[name]["images_per_second"], demand, local_crops_number))
    say("")
    return {
        "local_crops_number": local_crops_number,
        "demand_images_per_second": demand,
        "contested_rounds": contested,
        "summary": summary,
        "rounds": rounds,
    }


def step_demand(local: int, args: argparse.Namespace, say: Transcript) -> float:
    """Images per second that our training step takes, in its best type."""
    case = Problem(args.step_batch or (64 if device().type == "cuda" else 8), local, args.arch, toy=args.toy)
    crops = case.crops()
    (name, ours) = list(standard(None).items())[-1]
    step = steps(ours.start(case, None), crops, 5 if device().type == "cuda" else 1)
    times = interleave({name: step}, rounds=3)[name]
    rate = case.batch * (5 if device().type == "cuda" else 1) / statistics.median(times)
    say(f"the step alone: {case}, {name}: {rate:.1f} img/s")
    return rate


def verdict(name: str, images_per_second: float, demand: float, local: int) -> str:
    """Whether a loader of this rate holds a step back that takes ``demand`` images per second."""
    supply, needed = images_per_second * (2 + local), demand * (2 + local)
    factor = images_per_second / demand
    answer = f"no, it is {factor:.1f} times as fast" if factor >= 1 else f"YES, it gives {factor:.0%} of that"
    return f"{name}: {supply:.0f} crops/s; the step takes {needed:.0f} crops/s. Bottleneck: {answer}"


def summarise_rounds(rounds: list[dict[str, Figures]], name: str) -> dict[str, float]:
    """Medians over the rounds; ratios to the official pipeline are those of the same round."""

    def median(figure: str) -> float:
        return statistics.median(row[name][figure] for row in rounds)

    speedups = [r[name]["images_per_second"] / r["official"]["images_per_second"] for r in rounds]
    cpu = [r["official"]["cpu_ms_per_image"] / r[name]["cpu_ms_per_image"] for r in rounds]
    return {
        "images_per_second": median("images_per_second"),
        "cpu_ms_per_image": median("cpu_ms_per_image"),
        "speedup": statistics.median(speedups),
        "speedup_min": min(speedups),
        "speedup_max": max(speedups),
        "cpu_speedup": statistics.median(cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="folder of images; by default made on the spot")
    parser.add_argument("--locals", type=int, nargs="+", default=[8, 10], help="numbers of local crops")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="processes there, threads here")
    parser.add_argument("--count", type=int, default=640, help="images per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--demand", type=float, metavar="IMG_S", help="of a step; else measured")
    parser.add_argument("--arch", default="vit_small", help="of that step, with 16 x 16 patches")
    parser.add_argument("--step_batch", type=int, help="images of that step; 64 on a GPU, 8 on a CPU")
    parser.add_argument("--toy", action="store_true", help="a tiny step: checks this file")
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    say = Transcript()

    with tempfile.TemporaryDirectory() as folder:
        if not args.images:
            make_images(Path(folder), 320)
        manifest = build_manifest(args.images or folder)
        results = [compare(manifest, number, args, say) for number in args.locals]
    if args.save:
        print(save("loader", say, {"batch": args.batch, "workers": args.workers, "results": results}))


if __name__ == "__main__":
    main()
