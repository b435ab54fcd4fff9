"""From samples to normalised crops: DALI decodes, the fused finish crops and augments, a thread keeps ahead.

What a step sees is a pure function of (seed, step): `sampler` says which images, `augment` how their crops
are made. So the number of threads, processes and prefetched batches changes nothing in it, a resumed run
needs no saved state, and images may as well be kept in memory decoded.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from fastdino_kernels.multicrop import multicrop

from fastdino.config import CropConfig
from fastdino.data import sampler
from fastdino.data.augment import crop_parameters
from fastdino.data.buffers import Buffer, Crops, DeviceBuffer, HostBuffer
from fastdino.data.decoding import ImageSource, Replacements, import_dali
from fastdino.data.manifest import Manifest
from fastdino.data.prescan import header_sizes
from fastdino.data.samples import Members

AUGMENTATION_VERSION = 1
"""Goes up with every change of what a step sees: order, crops, decoding. A run continues with its own."""

CACHE_LIMIT = 2 << 30
"""Largest decoded data set, in bytes, that ``--cache_decoded auto`` keeps in memory."""

log = logging.getLogger(__name__)


class MultiCropLoader:
    """Endless iterator over the micro-batches (`Crops`) of one process, from optimizer step `start_step` on.

    Each step of `global_batch` images is cut into ``global_batch / (world_size * micro_batch)`` micro-batches
    per process, in a fixed order. In every epoch every sample is seen at most once over all processes, and
    all are but the remainder of the last global batch, whatever the source and the number of processes.

    A batch on the CPU lives in a reused buffer: it stays valid until the next but `prefetch` one is asked
    for. On a GPU, with ``augment_on`` "cpu", it is copied there from pinned memory while others are computed,
    and stays valid. With "gpu" images are decoded and finished on the GPU and no pixels pass through the
    host; the batch lives in a reused buffer until the next one is asked for (work queued on it by then is
    waited for). "auto" is "gpu" where that can be done (`finishes_on_gpu`).

    `num_threads` (0: all cores) threads decode and as many finish. `cache_decoded` keeps all decoded images
    in memory, of the GPU if it finishes them: then a step uploads its crops' parameters alone (see
    `wants_cache`).

    A sample that turns out to be unreadable is replaced for good by the next readable one of the manifest,
    logged and named in `replaced`, and listed in the file `bad_files`; the number of steps stays the same. If
    more than a tenth of the samples are unreadable the run stops and names them.

    Memory, for `micro_batch` B, p = `prefetch`, C bytes of all crops of one image, D bytes of a decoded and E
    of an encoded one: B * ((2p + 2) * C + 3 * D + 6 * E) on the CPU (2p + 2 is p + 1 of pinned memory if the
    crops go to a GPU, which holds as many copies as the consumer keeps and one more). Finished on the GPU:
    B * ((p + 2) * (C + D) + 3 * D) there and B * 6 * E on the CPU.

    Errors of the background thread are raised by ``next()`` with their traceback. Use as a context manager,
    or `close()`.

    Raises ValueError for sizes that do not fit together, ImportError without DALI.
    """

    def __init__(
        self,
        manifest: Manifest,
        crops: CropConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_threads: int = 0,
        cache_decoded: bool = False,
        prefetch: int = 2,
        augment_on: Literal["auto", "cpu", "gpu"] = "auto",
        bad_files: Path | None = None,
    ) -> None:
        self.steps_per_epoch = sampler.steps_per_epoch(len(manifest), global_batch)
        if micro_batch < 1 or global_batch % (world_size * micro_batch):
            raise ValueError(
                f"--batch_size: expected a multiple of {world_size} processes x {micro_batch} images per "
                f"forward pass, got {global_batch}"
            )
        if prefetch < 1:
            raise ValueError(f"prefetch: expected at least 1, got {prefetch}")
        import_dali()
        num_threads = num_threads or len(os.sched_getaffinity(0))
        schedule = Schedule(len(manifest), seed, global_batch, micro_batch, rank, world_size, start_step)
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:  # the current device is another in the thread
            device = torch.device("cuda", torch.cuda.current_device())
        on_gpu = finishes_on_gpu(augment_on, device)
        images = ImageSource(
            manifest,
            schedule.ids,
            micro_batch,
            num_threads,
            device=device if on_gpu else None,
            replacements=Replacements(manifest, bad_files),
        )
        # Buffers that the consumer may still use: none where it gets a copy.
        self._keep = 1 if on_gpu else 0 if device.type == "cuda" else prefetch + 1
        make = DeviceBuffer if on_gpu else HostBuffer
        self._held: deque[Buffer] = deque()
        self._producer = _Producer(
            images=images,
            cache=cache_decoded,
            schedule=schedule,
            crops=crops,
            device=device,
            num_threads=num_threads,
            # Besides those in use: `prefetch` ready ones and one being filled.
            buffers=[make(crops, micro_batch, dtype, device) for _ in range(self._keep + prefetch + 1)],
        )
        # The thread knows the producer only, so that a forgotten loader can be collected and then stops it.
        thread = threading.Thread(target=self._producer.run, name="fastdino-data", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._producer, thread)
        atexit.register(self._finalizer)  # later than DALI's own handler, thus run before it
        thread.start()

    @property
    def replaced(self) -> list[str]:
        """Paths of the samples found unreadable so far, each replaced by the next readable one."""
        images = self._producer.images
        return [images.manifest.paths[i] for i in list(images.replacements.replaced)]

    def __iter__(self) -> Iterator[Crops]:
        return self

    def __next__(self) -> Crops:
        if self._held and len(self._held) == self._keep:
            released = self._held.popleft()
            released.release()
            self._producer.free.put(released)
        buffer = self._producer.ready.get()
        if isinstance(buffer, BaseException):
            self._producer.ready.put(buffer)  # asked again, answers the same
            raise buffer
        batch = buffer.hand_over()
        if self._keep:
            self._held.append(buffer)
        else:
            self._producer.free.put(buffer)
        return batch

    def close(self) -> None:
        """Stop and join the background thread. Safe to call twice."""
        self._finalizer()

    def __enter__(self) -> MultiCropLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ------------------------------------------------------------------------------------------ background thread


@dataclass(frozen=True)
class Schedule:
    """Which images the micro-batches of one process hold, counted from its first one."""

    n: int
    seed: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    start_step: int

    def step(self, index: int) -> int:
        """The optimizer step that micro-batch `index` belongs to."""
        return self.start_step + index * self.world_size * self.micro_batch // self.global_batch

    def epoch(self, index: int) -> int:
        """The epoch of micro-batch `index`."""
        return self.step(index) // sampler.steps_per_epoch(self.n, self.global_batch)

    def ids(self, index: int) -> np.ndarray:
        """Samples of micro-batch `index`: int64 [micro_batch]."""
        ids = sampler.step_ids(self.seed, self.step(index), self.n, self.global_batch)
        part = index % (self.global_batch // (self.world_size * self.micro_batch))
        first = part * self.micro_batch
        return sampler.local_ids(ids, self.rank, self.world_size)[first : first + self.micro_batch]


@dataclass
class _Producer:
    """Fills free buffers, in order, until told to stop."""

    images: ImageSource
    cache: bool
    schedule: Schedule
    crops: CropConfig
    device: torch.device
    num_threads: int
    buffers: Sequence[Buffer]
    free: queue.SimpleQueue[Buffer | None] = field(default_factory=queue.SimpleQueue)
    ready: queue.SimpleQueue[Buffer | BaseException] = field(default_factory=queue.SimpleQueue)
    stopping: bool = False

    def run(self) -> None:
        for buffer in self.buffers:
            self.free.put(buffer)
        try:
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            try:
                with torch.cuda.stream(stream):
                    self._fill()
            finally:
                if stream is not None:
                    stream.synchronize()  # what it still does with the buffers, which are freed next
        except BaseException as error:  # not swallowed: the consumer raises it
            self.ready.put(error)
        finally:
            self.images.close()

    def _fill(self) -> None:
        decoded = self.images.decode_all(lambda: self.stopping) if self.cache else None
        index = 0
        while not self.stopping and (buffer := self.free.get()) is not None:
            ids = self.schedule.ids(index)
            if decoded is None:
                images, used = self.images.next()
            else:
                images, used = [decoded[i] for i in ids], self.images.replacements.resolve(ids)
            # The crops of an image that stands in for an unreadable one are drawn for the latter: they differ
            # from its own.
            sizes = np.array([image.shape[:2] for image in images])
            params = crop_parameters(self.schedule.seed, self.schedule.epoch(index), ids, sizes, self.crops)
            buffer.wait()
            multicrop(images, params, out=buffer.views, num_threads=self.num_threads)
            buffer.send(used, images)
            self.ready.put(buffer)
            index += 1


def _stop(producer: _Producer, thread: threading.Thread) -> None:
    producer.stopping = True
    producer.free.put(None)
    if thread is not threading.current_thread():  # the garbage collector may run in any thread
        thread.join(0.5)
        if thread.is_alive():  # in the middle of a batch, or of a read that never ends
            producer.images.interrupt()
            thread.join(5.0)
    while not producer.ready.empty():
        producer.ready.get()
    producer.ready.put(RuntimeError("MultiCropLoader: asked for a batch after close()"))


def finishes_on_gpu(choice: Literal["auto", "cpu", "gpu"], device: torch.device) -> bool:
    """Whether images are decoded and finished on the GPU; `choice` is the flag ``--augment_on``.

    "auto" does so on a GPU that DALI's build has code for. Raises ValueError if the choice is "gpu" and that
    cannot be done.
    """
    if choice == "cpu":
        return False
    lacking = _lacks_for_gpu(device)
    if choice == "gpu" and lacking:
        raise ValueError(f"--augment_on gpu: expected a GPU that DALI can use, {lacking}")
    return not lacking


def _lacks_for_gpu(device: torch.device) -> str:
    """What is missing to decode and finish on `device`; empty if nothing is."""
    if device.type != "cuda":
        return f"got the device {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "and Triton for the kernels there, which is not installed"
    toolkit = import_dali().backend.__cuda_version__ // 1000
    # CUDA 13 ended the support of GPUs before 7.5 (V100 is 7.0): the builds for CUDA 12 have code for them.
    oldest = (7, 5) if toolkit >= 13 else (5, 0)
    found = torch.cuda.get_device_capability(device)
    if found < oldest:
        needed, got = (".".join(map(str, version)) for version in (oldest, found))
        return f"got compute capability {got}, DALI's build for CUDA {toolkit} needs {needed}"
    return ""


# ---------------------------------------------------------------------------------------------- decoded cache


def wants_cache(
    manifest: Manifest,
    choice: Literal["auto", "on", "off"],
    num_threads: int,
    gpu: torch.device | None = None,
) -> bool:
    """Whether to keep all decoded images in memory, that of ``gpu`` if one finishes them; ``choice`` is the
    flag ``--cache_decoded``.

    "auto" does where they take at most `CACHE_LIMIT` and a quarter of the free memory, per process. Raises
    ValueError if the choice is "on" and they do not fit into the free memory.
    """
    if choice == "off":
        return False
    if gpu is None:
        free = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # every process keeps its own
    else:
        free = torch.cuda.mem_get_info(gpu)[0]
    limit = free if choice == "on" else min(free // 4, CACHE_LIMIT)
    needed = _decoded_bytes(manifest, limit, num_threads)
    if choice == "on" and needed > limit:
        raise ValueError(
            f"--cache_decoded on: the decoded images take at least {needed / 2**30:.1f} GiB per process, "
            f"expected at most the free {free / 2**30:.1f} GiB{'' if gpu is None else f' of {gpu}'}"
        )
    return needed <= limit


def _decoded_bytes(manifest: Manifest, limit: int, num_threads: int) -> int:
    """Bytes of all images decoded; of sets far beyond `limit` only that they are beyond it."""
    sizes = manifest.sizes
    if sizes is None:
        stored = _stored_bytes(manifest.paths, limit)
        if stored > limit:  # hardly any format is larger than its pixels: no need to open the images
            return stored
        sizes = header_sizes(manifest.paths, num_threads)
    return int(3 * sizes.astype(np.int64).prod(axis=1).sum())


def _stored_bytes(paths: Sequence[str], limit: int) -> int:
    """Bytes of all encoded images; of sets beyond `limit` only that they are."""
    if isinstance(paths, Members):
        return paths.stored_bytes()
    total = 0
    for path in paths:
        total += os.stat(path).st_size if os.path.exists(path) else 0
        if total > limit:
            break
    return total


def free_memory() -> int:
    """Bytes this process may still allocate, by the machine's memory and its container's limit."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),  # cgroups, version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        group = Path("/sys/fs/cgroup")
        try:
            granted, used = (group / limit).read_text().strip(), int((group / usage).read_text())
            lines = (group / usage).with_name("memory.stat").read_text().splitlines()
        except OSError:
            continue  # this version is not mounted here, or nothing is limited
        if granted != "max":
            reclaimable = int(dict(line.split() for line in lines)[cached])  # cached files give way
            free = min(free, max(0, int(granted) - used + reclaimable))
    return free
