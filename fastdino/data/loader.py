"""From files to normalised crops: DALI reads and decodes, the fused finish crops and augments, a thread keeps
ahead.

What a step sees is a pure function of (seed, step): `sampler` says which images, `augment` how their crops
are made. So the number of threads, processes and prefetched batches changes nothing in it, a resumed run
needs no saved state, and images may as well be kept in memory decoded.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from fastdino_kernels.multicrop import multicrop
from torch import Tensor

from fastdino.config import CropConfig
from fastdino.data import sampler
from fastdino.data.augment import crop_parameters
from fastdino.data.manifest import Manifest, printable
from fastdino.data.prescan import INSTALL_DALI, header_sizes, inspect

CACHE_LIMIT = 2 << 30
"""Largest decoded data set, in bytes, that ``--cache_decoded auto`` keeps in memory."""

log = logging.getLogger(__name__)


@dataclass
class Crops:
    """One micro-batch of B images; all images of view 0 first, then all of view 1, and so on."""

    global_: Tensor  # [2B, 3, Sg, Sg]
    local: Tensor | None  # [N*B, 3, Sl, Sl], None without local crops
    ids: Tensor  # int64 [B] on the CPU: manifest indices of the images


class MultiCropLoader:
    """Endless iterator over the micro-batches (`Crops`) of one process, from optimizer step `start_step` on.

    Each step of `global_batch` images is cut into ``global_batch / (world_size * micro_batch)`` micro-batches
    per process, in a fixed order. A batch on the CPU lives in a reused buffer: it stays valid until the next
    but `prefetch` one is asked for. On a GPU it is copied there from pinned memory while others are computed,
    and stays valid.

    `num_threads` (0: all cores) threads decode and as many finish. `cache_decoded` keeps all decoded images
    in memory (see `wants_cache`).

    A file that turns out to be unreadable is replaced for good by the next readable one of the manifest,
    logged and named in `replaced`; the number of steps stays the same. If that happens to more than a tenth
    of the files the run stops.

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
        images = ImageSource(manifest, schedule.ids, micro_batch, num_threads)
        device = torch.device(device)
        # Buffers that the consumer may still use: none on a GPU, where it gets a copy.
        self._keep = 0 if device.type == "cuda" else prefetch + 1
        self._held: deque[_Buffer] = deque()
        self._producer = _Producer(
            images=images,
            cache=cache_decoded,
            schedule=schedule,
            crops=crops,
            device=device,
            num_threads=num_threads,
            # Besides those in use: `prefetch` ready ones and one being filled.
            buffers=[_Buffer(crops, micro_batch, dtype, device) for _ in range(self._keep + prefetch + 1)],
        )
        # The thread knows the producer only, so that a forgotten loader can be collected and then stops it.
        thread = threading.Thread(target=self._producer.run, name="fastdino-data", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._producer, thread)
        atexit.register(self._finalizer)  # later than DALI's own handler, thus run before it
        thread.start()

    @property
    def replaced(self) -> list[str]:
        """Paths of the files found unreadable so far, each replaced by the next readable one."""
        return [self._producer.images.manifest.paths[i] for i in list(self._producer.images.replaced)]

    def __iter__(self) -> Iterator[Crops]:
        return self

    def __next__(self) -> Crops:
        if self._held and len(self._held) == self._keep:
            self._producer.free.put(self._held.popleft())
        buffer = self._producer.ready.get()
        if not isinstance(buffer, _Buffer):
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


class _Buffer:
    """Memory of one micro-batch: on the CPU, and with a GPU also the copy there that is under way."""

    def __init__(self, crops: CropConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        def allocate(views: int, size: int) -> Tensor:
            return torch.empty(views * batch, 3, size, size, dtype=dtype, pin_memory=device.type == "cuda")

        self._device = device
        self._global = allocate(2, crops.global_crops_size)
        self._local = None
        self.views = list(self._global.split(batch))  # [B, 3, S, S] each
        if crops.local_crops_number:
            self._local = allocate(crops.local_crops_number, crops.local_crops_size)
            self.views += self._local.split(batch)
        self._ids = torch.empty(0, dtype=torch.int64)
        self._copied: Any = None  # torch.cuda.Event
        self._on_device: tuple[Tensor, Tensor | None] = (self._global, self._local)

    def wait(self) -> None:
        """Return once the CPU memory may be written again."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, ids: np.ndarray, stream: Any) -> None:
        """Called by the producer when `views` are filled: keep the ids and start the copy to the GPU."""
        self._ids = torch.from_numpy(ids)
        if self._device.type == "cuda":
            with torch.cuda.stream(stream):
                self._on_device = (
                    self._global.to(self._device, non_blocking=True),
                    None if self._local is None else self._local.to(self._device, non_blocking=True),
                )
                self._copied = torch.cuda.Event()
                self._copied.record(stream)

    def hand_over(self) -> Crops:
        """Called by the consumer: the batch, ordered after its copy on the consumer's stream."""
        global_, local = self._on_device
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._copied)
            for tensor in (global_, local):
                if tensor is not None:
                    tensor.record_stream(stream)
            self._on_device = (self._global, self._local)  # the device copy belongs to the consumer now
        return Crops(global_, local, self._ids)


@dataclass
class _Producer:
    """Fills free buffers, in order, until told to stop."""

    images: ImageSource
    cache: bool
    schedule: Schedule
    crops: CropConfig
    device: torch.device
    num_threads: int
    buffers: list[_Buffer]
    free: queue.SimpleQueue[_Buffer | None] = field(default_factory=queue.SimpleQueue)
    ready: queue.SimpleQueue[_Buffer | BaseException] = field(default_factory=queue.SimpleQueue)
    stopping: bool = False

    def run(self) -> None:
        for buffer in self.buffers:
            self.free.put(buffer)
        try:
            self._fill()
        except BaseException as error:  # not swallowed: the consumer raises it
            self.ready.put(error)
        finally:
            self.images.close()

    def _fill(self) -> None:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        decoded = self.images.decode_all(lambda: self.stopping) if self.cache else None
        index = 0
        while not self.stopping and (buffer := self.free.get()) is not None:
            ids = self.schedule.ids(index)
            if decoded is None:
                images = self.images.next()
            else:
                images = [decoded[i] for i in ids]
            # The crops of an image that stands in for an unreadable one are drawn for the latter: they differ
            # from its own.
            sizes = np.array([image.shape[:2] for image in images])
            params = crop_parameters(self.schedule.seed, self.schedule.epoch(index), ids, sizes, self.crops)
            buffer.wait()
            multicrop(images, params, out=buffer.views, num_threads=self.num_threads)
            buffer.send(self.images.resolve(ids), stream)
            self.ready.put(buffer)
            index += 1


def _stop(producer: _Producer, thread: threading.Thread) -> None:
    producer.stopping = True
    producer.free.put(None)
    if thread is not threading.current_thread():  # the garbage collector may run in any thread
        thread.join()
    while not producer.ready.empty():
        producer.ready.get()
    producer.ready.put(RuntimeError("MultiCropLoader: asked for a batch after close()"))


# --------------------------------------------------------------------------------------------------- decoding


class ImageSource:
    """Decoded RGB images of a sequence of batches, read and decoded ahead by DALI.

    `batches(index)` gives the sample ids of batch `index` (at most `batch_size`), for index 0, 1, 2, ...
    without end.
    """

    def __init__(
        self, manifest: Manifest, batches: Callable[[int], np.ndarray], batch_size: int, num_threads: int
    ) -> None:
        self.manifest = manifest
        self.replaced: dict[int, int] = {}
        """Unreadable sample -> the readable one used in its place."""
        self._batches = batches
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._index = 0
        self._pipeline: Any = None

    def next(self) -> list[np.ndarray]:
        """The images of the next batch: uint8 [height, width, 3] each, views of DALI's memory."""
        retried = False
        while True:
            if self._pipeline is None:
                self._pipeline = self._build(self._index)
            try:
                (images,) = self._pipeline.run()
            except RuntimeError as error:
                # A pipeline that raised is not to be used again; the new one starts with this batch.
                self.close()
                ids = self.resolve(self._batches(self._index))
                if not self._replace_unreadable(ids):
                    if retried:
                        names = ", ".join(printable(self.manifest.paths[i]) for i in ids[:10])
                        raise RuntimeError(f"DALI fails on readable files: {names}, ...") from error
                    retried = True
            else:
                self._index += 1
                return [np.asarray(image) for image in images]

    def close(self) -> None:
        """Stop DALI's threads and free its memory."""
        # The pipeline refers to this object in turn. Left to the garbage collector, it may be taken apart in
        # a child that was forked meanwhile, which then waits for ever for threads that it does not have.
        self._pipeline = None

    def resolve(self, ids: np.ndarray) -> np.ndarray:
        """The samples really used for `ids` (int64 [B]): unreadable ones replaced."""
        ids = ids.copy()
        if self.replaced:
            for position, sample in enumerate(ids.tolist()):
                while sample in self.replaced:
                    sample = self.replaced[sample]
                ids[position] = sample
        return ids

    def decode_all(self, stop: Callable[[], bool]) -> list[np.ndarray]:
        """Every image of the manifest, decoded once. When `stop()` turns true, those so far."""
        started = time.perf_counter()
        n, batch_size = len(self.manifest), 64
        n_batches = -(-n // batch_size)

        def in_order(index: int) -> np.ndarray:
            first = index % n_batches * batch_size  # DALI asks for some batches beyond the last
            return np.arange(first, min(first + batch_size, n))

        decoded: list[np.ndarray] = []
        with closing(ImageSource(self.manifest, in_order, batch_size, self._num_threads)) as reader:
            reader.replaced = self.replaced
            while len(decoded) < n and not stop():
                decoded += [image.copy() for image in reader.next()]
        megabytes = sum(image.nbytes for image in decoded) / 2**20
        seconds = time.perf_counter() - started
        log.info("%d images decoded into %.0f MiB of memory in %.1f s", len(decoded), megabytes, seconds)
        return decoded

    def _build(self, first: int) -> Any:
        dali = import_dali()
        fn, types = dali.fn, dali.types

        def paths(index: int) -> list[np.ndarray]:
            ids = self.resolve(self._batches(first + index))
            return [np.frombuffer(os.fsencode(self.manifest.paths[i]), np.uint8) for i in ids]

        pipeline = dali.Pipeline(
            batch_size=self._batch_size, num_threads=self._num_threads, device_id=None, prefetch_queue_depth=2
        )
        with pipeline:
            names = fn.external_source(source=paths, batch_info=False, dtype=types.UINT8, ndim=1)
            # EXIF orientation is left alone, as ImageFolder leaves it.
            files = fn.io.file.read(names)
            images = fn.decoders.image(files, output_type=types.RGB, adjust_orientation=False)
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _replace_unreadable(self, ids: np.ndarray) -> bool:
        """Find the unreadable ones among `ids` and choose substitutes; whether there were any."""
        found = False
        for sample in np.unique(ids).tolist():
            reason = inspect(self.manifest.paths[sample]).reason
            if reason:
                found = True
                self._replace(sample, reason)
        return found

    def _replace(self, sample: int, reason: str) -> None:
        n, paths = len(self.manifest), self.manifest.paths
        substitute = next((j % n for j in range(sample + 1, sample + n) if self._readable(j % n)), None)
        if substitute is None or len(self.replaced) >= max(n // 10, 10):
            raise RuntimeError(
                f"--data_path: {len(self.replaced) + 1} of {n} images cannot be read, too many to replace; "
                f"the last one: {printable(paths[sample])}: {reason}"
            )
        self.replaced[sample] = substitute
        used = printable(paths[substitute])
        log.warning("%s: %s; %s takes its place", printable(paths[sample]), reason, used)

    def _readable(self, sample: int) -> bool:
        return sample not in self.replaced and not inspect(self.manifest.paths[sample]).reason


def import_dali() -> Any:
    """The nvidia.dali module; ImportError says how to install it."""
    try:
        import nvidia.dali as dali
    except ImportError as error:
        raise ImportError(f"NVIDIA DALI reads the images but is not installed: {INSTALL_DALI}") from error
    return dali


# ---------------------------------------------------------------------------------------------- decoded cache


def wants_cache(manifest: Manifest, choice: Literal["auto", "on", "off"], num_threads: int) -> bool:
    """Whether to keep all decoded images in memory; ``choice`` is the flag ``--cache_decoded``.

    "auto" does where they take at most `CACHE_LIMIT` and a quarter of the free memory, per process. Raises
    ValueError if the choice is "on" and they do not fit into the free memory.
    """
    if choice == "off":
        return False
    free = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # every process keeps its own
    limit = free if choice == "on" else min(free // 4, CACHE_LIMIT)
    needed = _decoded_bytes(manifest, limit, num_threads)
    if choice == "on" and needed > limit:
        raise ValueError(
            f"--cache_decoded on: the decoded images take at least {needed / 2**30:.1f} GiB per process, "
            f"expected at most the free {free / 2**30:.1f} GiB"
        )
    return needed <= limit


def _decoded_bytes(manifest: Manifest, limit: int, num_threads: int) -> int:
    """Bytes of all images decoded; of sets far beyond `limit` only that they are beyond it."""
    sizes = manifest.sizes
    if sizes is None:
        on_disk = 0
        for path in manifest.paths:
            on_disk += os.stat(path).st_size if os.path.exists(path) else 0
            if on_disk > limit:  # hardly any format is larger than its pixels: no need to open the files
                return on_disk
        sizes = header_sizes(manifest.paths, num_threads)
    return int(3 * sizes.astype(np.int64).prod(axis=1).sum())


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
