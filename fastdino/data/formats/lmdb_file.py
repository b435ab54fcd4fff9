"""LMDB: the values are encoded images, or Caffe ``Datum`` messages that hold one.

Other values, such as the counts that some tools store, are passed over and named in one warning. Keys sort as
bytes, which is the order of the images.

    Datum {1: channels, 2: height, 3: width, 4: bytes data, 5: label, 6: float_data, 7: bool encoded}
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from fastdino.data.formats.tfrecord import fields
from fastdino.data.formats.window import Entry, Malformed, Window

_IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"P6", b"P5")
_LONGEST_MAGIC = 8

log = logging.getLogger(__name__)


_databases: dict[str, tuple[tuple[int, int, int], Any]] = {}
_lock = threading.Lock()


def index(path: str) -> Iterator[Entry]:
    """The images of the database file `path`; offsets count from the beginning of a value.

    Raises Malformed."""
    passed_over, first = 0, b""
    with database(path).begin(buffers=True) as transaction:
        for key, value in transaction.cursor():
            entry = _entry(path, bytes(key), value)
            if entry is not None:
                yield entry
            else:
                passed_over, first = passed_over + 1, first or bytes(key)
    if passed_over:
        log.warning(
            "%s: passed over %d values that hold no encoded image, the first one at key %r",
            path, passed_over, first,
        )  # fmt: skip


def database(path: str) -> Any:
    """The LMDB environment of a file (``data.mdb``), read-only; opened once, as LMDB demands of a process.

    Raises Malformed if the file is no database, or cut short."""
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(
            f"{path} is an LMDB, which the package lmdb reads: pip install 'fastdino[lmdb]'"
        ) from error
    with _lock:
        status = os.stat(path)
        state = status.st_ino, status.st_size, status.st_mtime_ns
        known = _databases.pop(os.path.realpath(path), None)
        if known is None or known[0] != state:
            del known  # the last user of a database that was replaced closes it
            try:
                opened = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                expected = f"an LMDB database in {status.st_size} bytes"
                raise Malformed(f"{path}: offset 0: expected {expected}, got: {error}") from error
            # The file is mapped into memory: a page beyond its end would end the process.
            needed = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
            if status.st_size < needed:
                raise Malformed(
                    f"{path}: offset {status.st_size}: expected {needed} bytes of database pages, got the "
                    "end of the file"
                )
            known = state, opened
        _databases[os.path.realpath(path)] = known
        return known[1]


def reader(path: str) -> Callable[[bytes, int, int], bytes]:
    """A function of (key, offset, length) that reads a part of a value; it raises OSError."""
    import lmdb

    try:
        opened = database(path)
    except Malformed as error:
        raise OSError(errno.EIO, str(error)) from error

    def read(key: bytes, offset: int, length: int) -> bytes:
        try:
            with opened.begin(buffers=True) as transaction:
                value = transaction.get(key)
                if value is None:
                    raise FileNotFoundError(errno.ENOENT, "no such key in the database")
                return bytes(value[offset : offset + length])
        except lmdb.Error as error:
            raise OSError(errno.EIO, f"LMDB: {error}") from error

    return read


def _entry(path: str, key: bytes, value: memoryview) -> Entry | None:
    if bytes(value[:_LONGEST_MAGIC]).startswith(_IMAGES):
        return Entry(key, 0, len(value), None)
    window = Window(path, len(value), lambda offset, length: bytes(value[offset : offset + length]), 64)
    found: dict[int, int | tuple[int, int]] = {}
    try:
        found = dict(fields(window, 0, len(value)))
    except Malformed:
        return None
    data, label = found.get(4), found.get(5)
    if not isinstance(data, tuple):
        return None
    if not found.get(7):
        raise Malformed(
            f"{path}: key {key!r}: expected an encoded image, got a Datum of bare pixels (not encoded)"
        )
    return Entry(key, data[0], data[1] - data[0], b"%d" % label if isinstance(label, int) else None)
