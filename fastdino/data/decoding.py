"""From samples to decoded images: threads read ahead, DALI decodes, what cannot be used is replaced."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdino.data.buffers import Image, resident
from fastdino.data.manifest import Manifest, printable
from fastdino.data.prescan import INSTALL_DALI, decode, fetch, inspect, line
from fastdino.data.remote import is_url
from fastdino.data.samples import Members
from fastdino.data.threads import Pool

READERS, REMOTE_READERS = 8, 32
"""Threads that read; an object store answers late, but many at once."""
READ_AHEAD = 2
"""Batches they are ahead of DALI."""
DALI_AHEAD = 2
"""Batches DALI decodes ahead."""

log = logging.getLogger(__name__)


class TooManyUnreadable(RuntimeError):
    """More than a tenth of the images cannot be used."""


class Replacements:
    """The samples found unusable, and those used in their place: each by the next usable one of the manifest,
    which depends on nothing else, so that all processes and a resumed run choose the same."""

    def __init__(self, manifest: Manifest, listing: Path | None = None) -> None:
        self.replaced: dict[int, int] = {}
        """Unusable sample -> the one used in its place."""
        self.reasons: dict[int, str] = {}
        """Every sample known to be unusable, with the reason."""
        self._manifest = manifest
        self._listing = None if listing is None else Listing(listing)
        self._limit = max(len(manifest) // 10, 10)

    def resolve(self, ids: np.ndarray) -> np.ndarray:
        """The samples really used for `ids` (int64 [B])."""
        ids = ids.copy()
        if self.replaced:
            for position, sample in enumerate(ids.tolist()):
                while sample in self.replaced:
                    sample = self.replaced[sample]
                ids[position] = sample
        return ids

    def replace(self, sample: int, reason: str) -> int:
        """Note that `sample` cannot be used, and return what to use for it.

        Raises TooManyUnreadable beyond a tenth of the images (at least ten), naming the first twenty."""
        n, paths = len(self._manifest), self._manifest.paths
        self._note(sample, reason)
        for substitute in (j % n for j in range(sample + 1, sample + n)):
            if substitute in self.reasons:
                continue
            wrong = inspect(paths[substitute]).reason
            if not wrong:
                self.replaced[sample] = substitute
                used = printable(paths[substitute])
                log.warning("%s; %s takes its place", line(paths[sample], reason), used)
                return substitute
            self._note(substitute, wrong)
        raise self._too_many()

    def _note(self, sample: int, reason: str) -> None:
        self.reasons[sample] = reason
        if self._listing is not None:
            self._listing.add(line(self._manifest.paths[sample], reason))
        if len(self.reasons) > self._limit:
            raise self._too_many()

    def _too_many(self) -> TooManyUnreadable:
        paths, found = self._manifest.paths, list(self.reasons.items())
        first = "".join(f"\n  {line(paths[sample], reason)}" for sample, reason in found[:20])
        listed = "" if self._listing is None else f" (all listed in {printable(str(self._listing.file))})"
        return TooManyUnreadable(
            f"--data_path: {len(found)} of {len(paths)} images cannot be read, too many to replace"
            f"{listed}:{first}" + ("\n  ..." if len(found) > 20 else "")
        )


class Listing:
    """A file of lines that several processes add to, each line once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: set[bytes] = set()
        self._read = 0  # bytes of the file that are known

    def add(self, text: str) -> None:
        """Append a line unless it is there. Reads only what was added since: when a disk goes, there are
        many."""
        line = text.encode() + b"\n"
        try:
            with open(self.file, "a+b") as file:
                file.seek(self._read)
                added = file.read()
                self._read += len(added)
                self._known.update(added.splitlines(keepends=True))
                if line not in self._known:
                    file.write(line)
        except OSError as error:
            log.warning("cannot write %s: %s", printable(str(self.file)), error.strerror)


class ReadAhead:
    """The encoded images of a sequence of batches, read by a few threads before they are asked for.

    Holds at most `READ_AHEAD` + 1 batches."""

    def __init__(self, paths: Sequence[str], ids: Callable[[int], np.ndarray]) -> None:
        self._paths, self._ids = paths, ids
        far = isinstance(paths, Members) and is_url(paths.shards[0].path)
        self._pool = Pool(REMOTE_READERS if far else READERS, "fastdino-read")
        self._pending: dict[int, tuple[np.ndarray, list[Future[tuple[bytes, str]]]]] = {}

    def take(self, index: int) -> tuple[np.ndarray, list[tuple[bytes, str]]]:
        """Samples of batch `index`, and the bytes of each or what is wrong with it. CancelledError if another
        thread closes it meanwhile."""
        for ahead in range(index, index + READ_AHEAD + 1):
            if ahead not in self._pending:
                ids = self._ids(ahead)
                futures = [self._pool.submit(fetch, self._paths[i]) for i in ids.tolist()]
                self._pending[ahead] = ids, futures
        ids, futures = self._pending.pop(index)
        return ids, [future.result() for future in futures]

    def close(self) -> None:
        self._pool.close()
        self._pending.clear()


class ImageSource:
    """Decoded RGB images of a sequence of batches, read and decoded ahead.

    `batches(index)` gives the sample ids of batch `index` (at most `batch_size`), for index 0, 1, 2, ...
    without end. On a CUDA `device` DALI decodes there (nvJPEG and the hardware decoder, the rest on the CPU).
    """

    def __init__(
        self,
        manifest: Manifest,
        batches: Callable[[int], np.ndarray],
        batch_size: int,
        num_threads: int,
        *,
        device: torch.device | None = None,
        replacements: Replacements | None = None,
    ) -> None:
        self.manifest = manifest
        self.replacements = replacements or Replacements(manifest)
        self._batches = batches
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._device = device or torch.device("cpu")
        self._index = 0
        self._pipeline: Any = None
        self._reader: ReadAhead | None = None
        self._inner: ImageSource | None = None  # of decode_all
        self._interrupted = False
        self._used: deque[np.ndarray] = deque()  # samples of the batches that DALI was given

    def next(self) -> tuple[list[Image], np.ndarray]:
        """The images of the next batch, uint8 [height, width, 3] each, and the samples they are: int64 [B].

        Arrays are views of DALI's memory, and so are tensors on a GPU, which are ordered after torch's
        current stream and must be kept until that stream has read them.
        """
        retried = False
        while True:
            if self._pipeline is None:
                self._pipeline = self._build(self._index)
            try:
                images = self._run()
            except TooManyUnreadable:
                raise
            except RuntimeError as error:
                # A pipeline that raised is not to be used again; the new one starts with this batch.
                self.close()
                ids = self.replacements.resolve(self._batches(self._index))
                if not self._replace_unreadable(ids):
                    if retried and self._device.type == "cpu":
                        names = ", ".join(printable(self.manifest.paths[i]) for i in ids[:10])
                        raise RuntimeError(f"DALI fails on readable files: {names}, ...") from error
                    if retried:
                        self._index += 1
                        return self._by_the_other_decoder(ids, error), ids
                    retried = True
            else:
                self._index += 1
                return images, self._used.popleft()

    def close(self) -> None:
        """Stop DALI's threads and those that read, and free their memory."""
        # The pipeline refers to this object in turn. Left to the garbage collector, it may be taken apart in
        # a child that was forked meanwhile, which then waits for ever for threads that it does not have.
        self._pipeline = None
        self._used.clear()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def interrupt(self) -> None:
        """From another thread: make what waits for a read raise CancelledError, now and from now on."""
        self._interrupted = True
        for waiting in (self._reader, self._inner):
            if isinstance(waiting, ReadAhead):
                waiting.close()
            elif waiting is not None:
                waiting.interrupt()

    def decode_all(self, stop: Callable[[], bool]) -> list[Image]:
        """Every image of the manifest, decoded once, by the CPU, and kept on the source's device. When
        `stop()` turns true, those so far."""
        started = time.perf_counter()
        n, batch_size = len(self.manifest), 64
        n_batches = -(-n // batch_size)

        def in_order(index: int) -> np.ndarray:
            first = index % n_batches * batch_size  # some batches beyond the last are asked for
            return np.arange(first, min(first + batch_size, n))

        decoded: list[Image] = []
        reader = ImageSource(
            self.manifest, in_order, batch_size, self._num_threads, replacements=self.replacements
        )
        self._inner = reader
        with closing(reader):
            while len(decoded) < n and not stop():
                decoded += resident([np.asarray(image) for image in reader.next()[0]], self._device)
        megabytes = sum(image.nbytes for image in decoded) / 2**20
        seconds = time.perf_counter() - started
        where = "memory" if self._device.type == "cpu" else f"memory of {self._device}"
        log.info("%d images decoded into %.0f MiB of %s in %.1f s", len(decoded), megabytes, where, seconds)
        return decoded

    def _run(self) -> list[Image]:
        if self._device.type == "cpu":
            (images,) = self._pipeline.run()
            return [np.asarray(image) for image in images]
        (images,) = self._pipeline.run(torch.cuda.current_stream(self._device))
        return [torch.from_dlpack(image) for image in images]

    def _build(self, first: int) -> Any:
        dali = import_dali()
        fn, types = dali.fn, dali.types
        self._reader = ReadAhead(
            self.manifest.paths, lambda index: self.replacements.resolve(self._batches(index))
        )
        if self._interrupted:
            self._reader.close()
        on_gpu = self._device.type == "cuda"
        # Chroma as the CPU decoder makes it; the part of the hardware decoder is DALI's advice.
        options = {"jpeg_fancy_upsampling": True, "hw_decoder_load": 0.65} if on_gpu else {}

        def encoded(index: int) -> list[np.ndarray]:
            return self._encoded(first + index)

        pipeline = dali.Pipeline(
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=self._device.index or 0 if on_gpu else None,
            prefetch_queue_depth=DALI_AHEAD,
        )
        with pipeline:
            contents = fn.external_source(source=encoded, batch_info=False, dtype=types.UINT8, ndim=1)
            # EXIF orientation is left alone, as ImageFolder leaves it.
            images = fn.decoders.image(
                contents,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                **options,
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _encoded(self, index: int) -> list[np.ndarray]:
        """Encoded images of batch `index`; what is no image, or cannot be read, is replaced."""
        assert self._reader is not None
        ids, fetched = self._reader.take(index)
        used, contents = self.replacements.resolve(ids), []
        for position, (content, reason) in enumerate(fetched):
            if used[position] != ids[position]:  # replaced after it was read
                content, reason = fetch(self.manifest.paths[used[position]])
            while reason:
                used[position] = self.replacements.replace(int(used[position]), reason)
                content, reason = fetch(self.manifest.paths[used[position]])
            contents.append(np.frombuffer(content, np.uint8))
        self._used.append(used)
        return contents

    def _replace_unreadable(self, ids: np.ndarray) -> bool:
        """Find the unreadable ones among `ids` and choose substitutes; whether there were any."""
        found = False
        for sample in np.unique(ids).tolist():
            known = self.replacements.reasons.get(sample)
            reason = known or inspect(self.manifest.paths[sample]).reason
            if reason:
                found = True
                self.replacements.replace(sample, reason)
        return found

    def _by_the_other_decoder(self, ids: np.ndarray, error: RuntimeError) -> list[Image]:
        """The images of a batch that the GPU refuses and the CPU takes, on the host."""
        names = ", ".join(printable(self.manifest.paths[i]) for i in ids[:3])
        log.warning("the GPU fails to decode a batch (%s, ...), the CPU does it: %s", names, error)
        return [decode(self.manifest.paths[i]) for i in ids]


def import_dali() -> Any:
    """The nvidia.dali module; ImportError says how to install it."""
    try:
        import nvidia.dali as dali
    except ImportError as error:
        raise ImportError(f"NVIDIA DALI reads the images but is not installed: {INSTALL_DALI}") from error
    return dali
