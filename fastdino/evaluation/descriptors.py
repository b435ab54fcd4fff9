"""Descriptors of images of any size: files in, one vector each out, images of equal size in one batch."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdino.evaluation.features import ImagePath, Progress, gather, in_threads, normalize, share

if TYPE_CHECKING:
    from fastdino.engine.parallel import World

_WAITING = 8  # batches of decoded images that may wait for others of their size


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
    world: World | None = None,
) -> Tensor:
    """Descriptors float32 [len(paths), D] on the CPU, in the order of the files.

    ``load(i)`` gives the pixels of file i, uint8 [h, w, 3] of any size, and runs in one of ``num_threads``
    threads (0: one per core); ``describer`` maps normalised images [b, 3, h, w] on ``device`` to [b, D] and
    runs without autograd, under autocast for a ``dtype`` other than float32. At most ``batch_size`` images of
    one size form a batch. The processes of a ``world`` share the files, and all return everything.

    Raises ValueError naming the file when a descriptor is not finite or an image is smaller than a patch.
    """
    device = torch.device(device)
    if not len(paths):
        raise ValueError("describe: expected at least one image, got an empty list")
    own = share(len(paths), batch_size, world)
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = defaultdict(list)
    rows: dict[int, Tensor] = {}

    def run(group: list[tuple[int, np.ndarray]]) -> None:
        pixels = torch.from_numpy(np.stack([image for _, image in group])).to(device)
        try:
            batch = describer(normalize(pixels)).float().cpu()  # [b, D]
        except ValueError as error:
            raise ValueError(f"{os.fspath(paths[group[0][0]])}: {error}") from error
        for (i, _), row in zip(group, batch, strict=True):
            if not bool(torch.isfinite(row).all()):
                raise ValueError(f"the backbone's feature of {os.fspath(paths[i])} is not finite")
            rows[i] = row
        if progress is not None:
            progress(min(len(rows), own.stop - own.start), own.stop - own.start)

    wanted = range(own.start, own.stop) or range(1)  # more processes than batches: one row tells the width
    parts = (wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size))
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for i, pixels in zip(wanted, chain.from_iterable(in_threads(load, parts, num_threads)), strict=True):
            waiting[pixels.shape].append((i, pixels))
            if len(waiting[pixels.shape]) == batch_size:
                run(waiting.pop(pixels.shape))
            elif sum(map(len, waiting.values())) >= _WAITING * batch_size:
                run(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
        for group in waiting.values():
            run(group)
    made = torch.stack([rows[i] for i in wanted])
    if world is None or world.size == 1:
        return made
    return gather(made[: own.stop - own.start], len(paths), batch_size, world)
