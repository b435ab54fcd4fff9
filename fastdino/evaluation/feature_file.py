"""Features in a file instead of memory: float32 rows that ``torch.load`` reads, written batch by batch.

``PATH`` appears when the last row is in it. Until then there are ``PATH.part``, the same file with holes, and
``PATH.done``, a byte for every batch that is safely in it; ``PATH.json`` says what the rows are. Any number
of processes that share the disk fill one file, each its own batches, and a run that was killed continues with
the batches that are missing, also with another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdino.data.samples import Member, stamp
from fastdino.engine.logs import write_text

if TYPE_CHECKING:
    from fastdino.engine.parallel import World

SECONDS = 10.0
"""Work that a killed process loses at most, about."""


def digest_of_weights(backbone: nn.Module) -> str:
    """SHA-256 of the class, and of names, types, shapes and bytes of all parameters and buffers."""
    found = hashlib.sha256(type(backbone).__qualname__.encode())
    for name, tensor in backbone.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_of_images(paths: Iterable[str | os.PathLike[str]], labels: Iterable[int] = ()) -> str:
    """SHA-256 of the list of files by absolute path, size and time of the last change, and of their labels;
    the files are not opened.
    """
    found = hashlib.sha256()
    for given in paths:
        path = os.fspath(given)
        whole = path if isinstance(path, Member) else os.path.abspath(path)
        found.update(os.fsencode(whole) + f"\0{stamp(path)}\0".encode())
    found.update(np.fromiter(labels, np.int64).tobytes())
    return found.hexdigest()


class FeatureFile:
    """The file of ``rows`` features of ``width`` numbers; ``key`` is what they depend on.

    A file of another key, complete or not, is begun anew. All processes of ``world`` open it, write their
    batches inside a ``with`` statement, which keeps what is finished also when it ends with an error, and
    call :meth:`load`. ``path`` must be on a disk that they share.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        key: dict[str, Any],
        rows: int,
        width: int,
        batch_size: int,
        world: World | None = None,
    ) -> None:
        self.path, self.shared = Path(path), world is not None and world.size > 1
        self.rows, self.width, self.batch_size = rows, width, batch_size
        self.part, self.flags, self.record = (
            self.path.with_name(self.path.name + ending) for ending in (".part", ".done", ".json")
        )
        self.main = world is None or world.main
        if self.main:
            self._prepare({**key, "rows": rows, "width": width, "batch_size": batch_size})
        self._barrier()
        self.complete = not self.part.exists()
        batches = -(-rows // batch_size)
        self.finished = np.ones(batches, bool) if self.complete else np.fromfile(self.flags, np.uint8) > 0
        """Which batches are in the file, as it was found: bool [batches]."""
        self._waiting: list[int] = []
        self._saved = time.monotonic()

    def _prepare(self, key: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = None
        if self.record.exists():
            try:
                known = json.loads(self.record.read_text())
            except ValueError:
                pass
        there = self.flags.exists() if self.part.exists() else self.path.exists()
        if known == key and there:
            return
        # The record goes first and comes last: it never speaks of a file that is not there. What PATH holds
        # stays until there is something to take its place.
        self.record.unlink(missing_ok=True)
        with torch.serialization.skip_data():  # room for the rows, which cost no memory and no time yet
            torch.save(torch.empty(self.rows, self.width), self.part)
        np.zeros(-(-self.rows // self.batch_size), np.uint8).tofile(self.flags)
        write_text(self.record, json.dumps(key, indent=1) + "\n")

    def __enter__(self) -> FeatureFile:
        if not self.complete:
            self._offset = _data_offset(self.part)
            self._data, self._done = (os.open(p, os.O_WRONLY) for p in (self.part, self.flags))
        return self

    def __exit__(self, *error: object) -> None:
        if not self.complete:
            self._save()
            os.close(self._data)
            os.close(self._done)

    def write(self, rows: slice, features: Tensor) -> None:
        """A whole batch, fp32 [r, width] on the CPU; ``rows`` says where."""
        content = features.contiguous().numpy().data.cast("B")
        place = self._offset + rows.start * self.width * 4
        while content:
            written = os.pwrite(self._data, content, place)
            content, place = content[written:], place + written
        self._waiting.append(rows.start // self.batch_size)
        if time.monotonic() - self._saved > SECONDS:
            self._save()

    def _save(self) -> None:
        # A batch is called finished only once the disk has it.
        os.fsync(self._data)
        for batch in self._waiting:
            os.pwrite(self._done, b"\1", batch)
        os.fsync(self._done)
        self._waiting, self._saved = [], time.monotonic()

    def load(self) -> Tensor:
        """All rows, fp32 [rows, width], mapped from the disk: they take memory only while they are used."""
        self._barrier()
        if self.main and not self.complete:
            missing = int((np.fromfile(self.flags, np.uint8) == 0).sum())
            if missing:
                raise RuntimeError(f"{self.part}: {missing} batches were not written")
            os.replace(self.part, self.path)
            self.flags.unlink()
        self._barrier()
        return load_mapped(self.path)

    def _barrier(self) -> None:
        if self.shared:
            dist.barrier()


def load_mapped(path: Path) -> Tensor:
    """The tensor that a file of ``torch.save`` holds, mapped from the disk where its format allows it.

    Raises OSError, or ValueError if the file holds something else.
    """
    import pickle

    from fastdino.interop.screening import screen, weigh

    try:
        with open(path, "rb") as file:
            mapped = screen(file)  # files of PyTorch 1.5 and before cannot be
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        weigh(found)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"{path} does not hold a tensor: {error}") from error
    if not isinstance(found, Tensor):
        raise ValueError(f"{path} does not hold a tensor but a {type(found).__name__}")
    return found


def _data_offset(path: Path) -> int:
    """Where the bytes of the only tensor of a file of ``torch.save`` begin: it is a zip archive, and they are
    its uncompressed member ``data/0``.
    """
    with zipfile.ZipFile(path) as archive:
        (member,) = (m for m in archive.infolist() if m.filename.endswith("/data/0"))
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)  # local header: the lengths of name and extra field are its last two numbers
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return member.header_offset + 30 + name + extra
