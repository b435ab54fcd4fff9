"""Where the time of our pipeline goes, stage by stage, in milliseconds per image.

Reading, decoding and drawing the parameters run alone. The stages of the finish are differences between runs
of it on the same decoded images: with the parameters as drawn, without blur, without colours too (jitter,
gray, solarize), and with boxes of one pixel instead, whose resize costs next to nothing: what is left is the
writing and normalising of the crops. On a CPU it is the CPU time of all threads, which other programs disturb
least; on a GPU the time until the GPU is done, and decoding includes the reading by other threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
from fastdino_kernels.multicrop import multicrop

from bench.harness import synchronize
from bench.loader_providers import Setting
from bench.official_crops import view_sizes
from fastdino.data.augment import GRAY, JITTER, SIGMA, SOLARIZE, H, W, crop_parameters
from fastdino.data.buffers import Image
from fastdino.data.decoding import ImageSource

STAGES = ("read", "decode", "parameters", "resize", "colour", "blur", "write")


def stages(setting: Setting, rounds: int, *, gpu: bool = False) -> dict[str, float]:
    """Milliseconds per image of every stage: medians over rounds of one batch, which take turns."""
    device = torch.device("cuda" if gpu else "cpu")
    manifest, crops, batch = setting.manifest, setting.crops, setting.batch
    count = min(batch, len(manifest))
    ids = np.arange(count)

    def read() -> None:
        for path in manifest.paths[:count]:
            with open(path, "rb") as file:
                file.read()

    where = device if gpu else None
    clock = time.perf_counter if gpu else time.process_time
    with closing(ImageSource(manifest, lambda _: ids, count, setting.workers, device=where)) as source:
        images = [_copy(image) for image in source.next()[0]]
        # By itself and in one go, because it works ahead while others would be timed.
        decoding = _times({"decode": lambda: [source.next() for _ in range(rounds)]}, 1, clock)["decode"]

    sizes = np.array([image.shape[:2] for image in images])
    whole = crop_parameters(0, 0, ids, sizes, crops)
    sharp, plain, tiny = whole.copy(), whole.copy(), whole.copy()
    sharp[..., SIGMA] = 0
    plain[..., [SIGMA, JITTER, GRAY, SOLARIZE]] = 0
    tiny[..., [SIGMA, JITTER, GRAY, SOLARIZE]] = 0
    tiny[..., H : W + 1] = 1
    out = [torch.empty(count, 3, size, size, device=device) for size in view_sizes(crops)]

    def finish(rows: np.ndarray) -> Callable[[], None]:
        return lambda: multicrop(images, rows, out=out, num_threads=setting.workers)

    calls: dict[str, Callable[[], object]] = {
        "read": read,
        "parameters": lambda: crop_parameters(0, 0, ids, sizes, crops),
        "write": finish(tiny),
        "and resize": finish(plain),
        "and colour": finish(sharp),
        "and blur": finish(whole),
    }
    ms = {name: 1000 * seconds / count for name, seconds in _times(calls, rounds, clock).items()}
    decoded = 1000 * decoding / rounds / count
    return {
        "read": ms["read"],
        "decode": decoded if gpu else decoded - ms["read"],
        "parameters": ms["parameters"],
        "resize": ms["and resize"] - ms["write"],
        "colour": ms["and colour"] - ms["and resize"],
        "blur": ms["and blur"] - ms["and colour"],
        "write": ms["write"],
    }


def _copy(image: Image) -> Image:
    """Out of DALI's memory."""
    return image.copy() if isinstance(image, np.ndarray) else image.clone()


def _times(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds per call by ``clock``."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(-2, rounds):
        for name, call in calls.items():
            synchronize()
            start = clock()
            call()
            synchronize()
            if r >= 0:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(ms: dict[str, float]) -> str:
    total = sum(ms.values())
    head = f"{'stage':12} {'ms/img':>8} {'share':>6}"
    rows = [f"{name:12} {ms[name]:8.3f} {ms[name] / total:6.0%}" for name in STAGES]
    return "\n".join([head, *rows, f"{'sum':12} {total:8.3f}"])
