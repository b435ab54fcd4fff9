"""Descriptors of images of any size: files in, one vector each out, images of equal size in one batch."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastdino.evaluation.features import ImagePath, Progress, available_cores, normalize

_WAITING = 8  # batches of decoded images that may wait for others of their size

Item = TypeVar("Item")
Made = TypeVar("Made")


def describe(
    describer: Callable[[Tensor], Tensor],
    paths: Sequence[ImagePath],
    load: Callable[[int], np.ndarray],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    num_threads: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Tensor:
    """Descriptors float32 [len(paths), D] on the CPU, in the order of the files.

    ``load(i)`` gives the pixels of file i, uint8 [h, w, 3] of any size, and runs in one of ``num_threads``
    threads (0: one per core); ``describer`` maps normalised images [b, 3, h, w] on ``device`` to [b, D] and
    runs without autograd, under autocast for a ``dtype`` other than float32. At most ``batch_size`` images of
    one size form a batch. Raises ValueError naming the file when a descriptor is not finite or an image is
    smaller than a patch.
    """
    device = torch.device(device)
    if not len(paths):
        raise ValueError("describe: expected at least one image, got an empty list")
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = defaultdict(list)
    rows: list[Tensor | None] = [None] * len(paths)
    done = 0

    def run(group: list[tuple[int, np.ndarray]]) -> None:
        nonlocal done
        pixels = torch.from_numpy(np.stack([image for _, image in group])).to(device)
        try:
            batch = describer(normalize(pixels)).float().cpu()  # [b, D]
        except ValueError as error:
            raise ValueError(f"{os.fspath(paths[group[0][0]])}: {error}") from error
        for (i, _), row in zip(group, batch, strict=True):
            if not bool(torch.isfinite(row).all()):
                raise ValueError(f"the backbone's feature of {os.fspath(paths[i])} is not finite")
            rows[i] = row
        done += len(group)
        if progress is not None:
            progress(done, len(paths))

    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for i, pixels in enumerate(ahead(range(len(paths)), load, 2 * batch_size, num_threads)):
            waiting[pixels.shape].append((i, pixels))
            if len(waiting[pixels.shape]) == batch_size:
                run(waiting.pop(pixels.shape))
            elif sum(map(len, waiting.values())) >= _WAITING * batch_size:
                run(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
        for group in waiting.values():
            run(group)
    return torch.stack([row for row in rows if row is not None])


def ahead(
    items: Sequence[Item], make: Callable[[Item], Made], depth: int, num_threads: int = 0
) -> Iterator[Made]:
    """``make(item)`` for every item, in order; threads work on the next ``depth`` of them meanwhile."""
    with ThreadPoolExecutor(num_threads or available_cores(), thread_name_prefix="decode") as pool:
        pending: deque[Future[Made]] = deque(pool.submit(make, item) for item in items[:depth])
        submitted = len(pending)
        try:
            while pending:
                made = pending.popleft().result()
                for item in items[submitted : submitted + 1]:
                    pending.append(pool.submit(make, item))
                submitted += 1
                yield made
        finally:
            for future in pending:
                future.cancel()
