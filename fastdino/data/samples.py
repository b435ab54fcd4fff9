"""Where the bytes of an encoded image are, and how they are read: a file, or a range of a container.

A sample is a path, a `str`, everywhere. That of an image in a container is a `Member`: it reads
``<shard>/<key>``, serves as a name wherever a path does, and `read` knows where its bytes lie. The members of
a data set are held as arrays (`Members`), 36 bytes and a key each, and made when they are asked for.

A shard is opened once and read by position (`os.pread`), from any number of threads.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np

from fastdino.data import remote
from fastdino.data.formats import recordio
from fastdino.data.headers import MAX_PIXELS

MAX_BYTES = 8 * MAX_PIXELS
"""Largest encoded image that is read: one of 16-bit RGBA, not compressed."""
_PAUSES = (0.0, 0.05)  # seconds before the second and the third try
MAX_OPEN = 256
"""Shards kept open at a time, far below the usual limit of 1024 files."""


@dataclass(frozen=True)
class Shard:
    """One container as it was when it was indexed."""

    path: str
    """File or URL."""
    kind: str
    """"tar", "tfrecord", "recordio" or "lmdb"."""
    size: int
    """Bytes."""
    stamp: str
    """Changes when the container does: its modification time, or what the object store has for one."""


class Member(str):
    """The path ``<shard>/<key>`` of an image inside a container, with the place of its bytes."""

    shard: Shard
    key: bytes
    offset: int
    """In the shard; in LMDB, in the value of `key`."""
    length: int
    """Bytes of the image; negative for a record in several parts (`recordio`): then those of the parts."""

    def __new__(cls, shard: Shard, key: bytes, offset: int, length: int) -> Member:
        member = super().__new__(cls, f"{shard.path}/{os.fsdecode(key)}")
        member.shard, member.key, member.offset, member.length = shard, key, offset, length
        return member

    def __getnewargs__(self) -> tuple[Shard, bytes, int, int]:  # type: ignore[override]
        return self.shard, self.key, self.offset, self.length


class Missing(str):
    """The path of an image that a container held when the run began and does not hold now."""


class Members(Sequence[str]):
    """The images of all shards of a data set, in order."""

    def __init__(
        self,
        shards: list[Shard],
        shard: np.ndarray,
        offsets: np.ndarray,
        lengths: np.ndarray,
        keys: bytes,
        key_spans: np.ndarray,
    ) -> None:
        self.shards = shards
        self._shard = shard  # int32 [n], index into `shards`
        self._offsets = offsets  # int64 [n]
        self._lengths = lengths  # int64 [n]
        self._keys = keys
        self._key_spans = key_spans  # int64 [n, 2]: where a key begins and ends in `_keys`

    def __len__(self) -> int:
        return len(self._shard)

    @overload
    def __getitem__(self, index: int) -> Member: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> Member | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self._key_spans[index]
        return Member(
            self.shards[self._shard[index]],
            self._keys[begin:end],
            int(self._offsets[index]),
            int(self._lengths[index]),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    def select(self, indices: np.ndarray) -> Members:
        """Those at `indices` (int [m]), in that order."""
        return Members(
            self.shards,
            self._shard[indices],
            self._offsets[indices],
            self._lengths[indices],
            self._keys,
            self._key_spans[indices],
        )

    def names(self, root: str) -> Iterator[str]:
        """``<shard relative to root>/<key>`` of each, the keys as they are: nothing in them is resolved."""
        folders = [os.path.relpath(shard.path, root) for shard in self.shards]
        for shard, (begin, end) in zip(self._shard, self._key_spans.tolist(), strict=True):
            yield f"{folders[shard]}/{os.fsdecode(self._keys[begin:end])}"

    def stored_bytes(self) -> int:
        """Bytes of all encoded images together."""
        return int(np.abs(self._lengths).sum())


# ---------------------------------------------------------------------------------------------------- reading


def read(path: str) -> bytes:
    """The encoded image at `path`, a file or a `Member`.

    What fails is tried twice more, a shard after it was opened anew: that mends what a restarted server or a
    stale handle breaks. Raises OSError, whose ``strerror`` says what is wrong.
    """
    for pause in _PAUSES:
        try:
            return _read(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
            raise
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EFBIG):  # what it is, not what happened to it
                raise
            if isinstance(path, Member):
                _handles.forget(path.shard)
            time.sleep(pause)
    return _read(path)


def stamp(path: str) -> tuple[int, int]:
    """Size and a number that changes with the content; (-1, -1) for a file that cannot be looked at."""
    if isinstance(path, Member):
        state = f"{path.shard.stamp} {path.offset}".encode()
        return path.length, int.from_bytes(hashlib.sha256(state).digest()[:7], "big")
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _read(path: str) -> bytes:
    if isinstance(path, Missing):
        raise FileNotFoundError(errno.ENOENT, "no longer in its container")
    if not isinstance(path, Member):
        return _read_file(path)
    _check_size(abs(path.length))
    content = _handles.get(path.shard).read(path.key, path.offset, abs(path.length))
    if len(content) != abs(path.length):
        raise OSError(
            errno.EIO,
            f"{path.shard.kind} shard cut short at offset {path.offset}: expected {abs(path.length)} bytes, "
            f"got {len(content)}",
        )
    if path.length >= 0:
        return content
    try:
        return recordio.image(content)
    except ValueError as error:
        raise OSError(errno.EIO, f"offset {path.offset} of the shard: {error}") from error


def _read_file(path: str) -> bytes:
    _check_kind(os.stat(path).st_mode)
    # Should it have become a pipe since: opening one waits for a writer, but not so.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        _check_kind(status.st_mode)
        _check_size(status.st_size)
        content = pread(descriptor, status.st_size, 0)
    finally:
        os.close(descriptor)
    if len(content) != status.st_size:
        raise OSError(
            errno.EIO, f"cut short while it was read: expected {status.st_size} bytes, got {len(content)}"
        )
    return content


def _check_kind(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{size:,} bytes, more than the limit of {MAX_BYTES:,}")


class Handle(Protocol):
    """An open shard; threads may share it."""

    def read(self, key: bytes, offset: int, length: int) -> bytes:
        """The bytes there, fewer if the shard ends before; OSError if they cannot be read."""


class _LocalFile:
    def __init__(self, shard: Shard) -> None:
        # Closed when the last thread that reads from it lets go.
        self._file = open(shard.path, "rb", buffering=0)  # noqa: SIM115
        status = os.fstat(self._file.fileno())
        if (status.st_size, str(status.st_mtime_ns)) != (shard.size, shard.stamp):
            raise OSError(
                errno.ESTALE,
                f"the shard has changed since it was indexed: expected {shard.size} bytes, got "
                f"{status.st_size}, or another modification time; start again to index it anew",
            )

    def read(self, key: bytes, offset: int, length: int) -> bytes:
        return pread(self._file.fileno(), length, offset)


class _RemoteFile:
    def __init__(self, shard: Shard) -> None:
        self._url = shard.path

    def read(self, key: bytes, offset: int, length: int) -> bytes:
        return remote.read(self._url, offset, length)


class _Database:
    def __init__(self, shard: Shard) -> None:
        from fastdino.data.formats import lmdb_file

        if str(os.stat(shard.path).st_mtime_ns) != shard.stamp:
            raise OSError(errno.ESTALE, "the database has changed since it was indexed; start again")
        self._read = lmdb_file.reader(shard.path)

    def read(self, key: bytes, offset: int, length: int) -> bytes:
        return self._read(key, offset, length)


def pread(descriptor: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`, or as many as there are; the kernel gives 2 GiB at most at once."""
    content = os.pread(descriptor, length, offset)
    while len(content) < length and (
        more := os.pread(descriptor, length - len(content), offset + len(content))
    ):
        content += more
    return content


class _Handles:
    """The shards read last, open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Shard, Handle] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: Shard) -> Handle:
        with self._lock:
            handle = self._open.get(shard)
            if handle is not None:
                self._open.move_to_end(shard)
                return handle
        # Slow file systems open slowly: outside the lock. Two threads may do it at once; one handle is kept.
        fresh: Any
        if remote.is_url(shard.path):
            fresh = _RemoteFile(shard)
        else:
            fresh = (_Database if shard.kind == "lmdb" else _LocalFile)(shard)
        with self._lock:
            handle = self._open.setdefault(shard, fresh)
            while len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        return handle

    def forget(self, shard: Shard) -> None:
        with self._lock:
            self._open.pop(shard, None)


_handles = _Handles()
