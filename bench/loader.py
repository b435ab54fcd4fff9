"""The data pipeline against others, from JPEG files to normalised crops in float32.

python -m bench.loader [--images FOLDER] [--workers 1 2] [--rounds 5] [--solo_learn PATH] [--save]

Official: Pillow and the transforms of DataAugmentationDINO, written here from their documentation, in a torch
DataLoader with as many worker processes as the others get threads. First, crops of several images with equal
parameters are compared: its and ours are the same to the bit. DALI's own operations in one graph, with a
chain for each crop or (stacked) one for all crops of a size, and solo-learn's graph of them from a checkout,
make other crops (marked by a star: colours and blur are not exact) and are there for their speed: these are
the other ways to build this on DALI. All take turns; a ratio is that of neighbours. On a GPU the same is done
there too: DALI decodes, then our Triton kernels or DALI's operations finish. Without a folder, random
pictures with the spectrum of photographs are made (500 x 375, about 85 KB).

Then the time of our pipeline by stages (`loader_stages`), and the memory that each provider takes in a
process of its own (`loader_providers.memory`).

Is the loader the bottleneck? Our rates are compared with the images per second that our training step takes,
measured in the same run with as many local crops while the loader rests, or with --demand. Then the step is
fed by our loader, and both share the machine: what is reached is told too.

Wall-clock ratios say little while other programs compute (a round is then called contested: more than a tenth
of a core went elsewhere), because they squeeze processes and threads differently. CPU time per image, of the
process and its workers, holds up better and is given too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastdino_kernels.multicrop import multicrop
from PIL import Image

from bench import solo_learn
from bench.harness import Transcript, interleave, save
from bench.loader_providers import PROVIDERS, WARM_UP, Figures, Setting, lacking, measure, ours, peak
from bench.loader_stages import stages, table
from bench.machine import device
from bench.official_crops import apply, view_sizes
from bench.providers import HYPER, EngineStep, Problem, standard, steps
from fastdino.data.augment import crop_parameters

CONTESTED = 0.1  # cores


def check_equal(setting: Setting, n: int = 16) -> None:
    """Both give the same crops for the same parameters, or there is nothing to compare."""
    crops = setting.crops
    images = [Image.open(path).convert("RGB") for path in setting.manifest.paths[:n]]
    sizes = np.array([(image.height, image.width) for image in images])
    params = crop_parameters(0, 0, np.arange(len(images)), sizes, crops)
    arrays = [np.asarray(image) for image in images]
    for where in {"cpu", device().type}:
        out = [torch.empty(len(images), 3, size, size, device=where) for size in view_sizes(crops)]
        multicrop(arrays, params, out=out)
        for i, image in enumerate(images):
            for view, crop in enumerate(out):
                expected = apply(image, params[i, view], crop.shape[-1])
                assert torch.equal(crop[i].cpu(), expected), (where, i, view)


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


def compare(setting: Setting, args: argparse.Namespace, say: Transcript) -> dict[str, Any]:
    """All providers by turns, the stages of ours, the memory of each, and the verdict."""
    check_equal(setting)
    local, workers = setting.local_crops_number, setting.workers
    say(f"2 x 224 + {local} x 96, batch {setting.batch}, {workers} workers or threads; equal crops but for *")
    missing = {name: lacking(name, setting) for name in PROVIDERS}
    names = [name for name in PROVIDERS if not missing[name]]
    rounds = [{name: measure(name, setting) for name in names} for _ in range(args.rounds)]
    contested = sum(max(row[p]["competing_cores"] for p in row) > CONTESTED for row in rounds)
    summary = {name: summarise_rounds(rounds, name) for name in names}
    memory = {name: peak(name, setting) for name in names}
    columns = (
        f"{'img/s':>7} {'crops/s':>8} {'CPU ms/img':>11} {'speed-up':>9} {'min-max':>12} {'by CPU time':>12}"
    )
    say(f"{'provider':26} {columns} {'memory MB':>10}")
    for name in PROVIDERS:
        why = missing[name]
        text = f"not measured: {why}" if why else line(summary[name], memory[name], 2 + local)
        say(f"{name:26} {text}")
    say(f"{contested} of {args.rounds} rounds contested")
    by_cpu = stages(setting, args.rounds)
    by_gpu = stages(setting, args.rounds, gpu=True) if torch.cuda.is_available() else None
    say(f"our stages, CPU time, {workers} threads\n{table(by_cpu)}")
    said = "not measured: there is no GPU" if by_gpu is None else "\n" + table(by_gpu)
    say(f"our stages on the GPU: {said}")
    demand, fed = (args.demand, None) if args.demand else step_rates(setting, args, say)
    for name in names:
        if name.startswith("fastdino"):
            say(verdict(name, summary[name]["images_per_second"], demand, local))
    say("")
    return {
        "local_crops_number": local,
        "workers": workers,
        "demand_images_per_second": demand,
        "fed_images_per_second": fed,
        "contested_rounds": contested,
        "summary": summary,
        "memory": memory,
        "stages_ms": {"cpu": by_cpu, "gpu": by_gpu},
        "not_measured": {name: why for name, why in missing.items() if why},
        "rounds": rounds,
    }


def line(row: Figures, memory: dict[str, int], views: int) -> str:
    """A provider's figures in one line of the table; ``views`` crops are made of each image."""
    rate = row["images_per_second"]
    speed = f"{rate:7.0f} {rate * views:8.0f} {row['cpu_ms_per_image']:11.2f} {row['speedup']:8.2f}x"
    spread = f"{row['speedup_min']:6.2f}-{row['speedup_max']:.2f}"
    on_gpu = f" + {memory['device_bytes'] / 1e6:.0f} on the GPU" if memory["device_bytes"] else ""
    return f"{speed} {spread:>12} {row['cpu_speedup']:11.2f}x {memory['host_bytes'] / 1e6:10.0f}{on_gpu}"


def step_rates(setting: Setting, args: argparse.Namespace, say: Transcript) -> tuple[float, float]:
    """Images per second that our training step takes, in its best type: alone, of one batch again and again,
    and fed by our loader."""
    gpu = device().type == "cuda"
    batch, number = args.step_batch or (64 if gpu else 8), 5 if gpu else 1
    case = Problem(batch, setting.local_crops_number, args.arch, toy=args.toy)
    (name, provider) = list(standard(None).items())[-1]
    step = provider.start(case, None)
    assert isinstance(step, EngineStep)
    times = interleave({name: steps(step, case.crops(), number)}, rounds=3)[name]
    alone = batch * number / statistics.median(times)
    say(f"the step alone: {case}, {name}: {alone:.1f} img/s")

    with ours(replace(setting, batch=batch), crops=case.config({}).crops, gpu=gpu) as batches:

        def feed() -> None:
            for _ in range(number):
                step.step.enqueue(batches, HYPER)
                step.step.ring.take()

        # The first ones find batches that were made ahead.
        times = interleave({name: feed}, rounds=5, warmup=WARM_UP)[name]
    fed = batch * number / statistics.median(times)
    say(f"the step fed by fastdino{', GPU' if gpu else ''}: {fed:.1f} img/s, {fed / alone:.0%} of that")
    return alone, fed


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
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="processes there, threads here"
    )
    parser.add_argument("--count", type=int, default=640, help="images per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--solo_learn", metavar="PATH", help="a checkout of vturrisi/solo-learn")
    parser.add_argument("--demand", type=float, metavar="IMG_S", help="of a step; else measured")
    parser.add_argument("--arch", default="vit_small", help="of that step, with 16 x 16 patches")
    parser.add_argument("--step_batch", type=int, help="images of that step; 64 on a GPU, 8 on a CPU")
    parser.add_argument("--toy", action="store_true", help="a tiny step: checks this file")
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    say = Transcript()

    if args.solo_learn:
        solo_learn.load(Path(args.solo_learn))  # a wrong path is told before anything is timed
    with tempfile.TemporaryDirectory() as folder:
        if not args.images:
            make_images(Path(folder), 320)
        images, n_batches = args.images or folder, max(1, args.count // args.batch)
        results = [
            compare(Setting(images, local, args.batch, workers, n_batches, args.solo_learn), args, say)
            for local in args.locals
            for workers in args.workers
        ]
    if args.save:
        print(save("loader", say, {"batch": args.batch, "results": results}))


if __name__ == "__main__":
    main()
