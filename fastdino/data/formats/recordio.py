"""MXNet RecordIO of images (``.rec``), with or without its ``.idx``.

A part is (dmlc-core, include/dmlc/recordio.h)

    uint32 magic, uint32 kind << 29 | length, length bytes, zeros up to a multiple of four

and a record is one part (kind 0), or several (1, 2 ..., 3) where the content holds the magic number: the
writer leaves it out between two parts, the reader puts it back. The content is a header (flag, label, two
ids; MXNet, python/mxnet/recordio.py), ``flag`` more labels if that is not 0, and the encoded image. Of
several labels the first counts. A record with labels and no image, as some tools put first, is passed over.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from fastdino.data.formats.window import Entry, Window

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_HEADER = struct.Struct("<IfQQ")


def index(window: Window, listed: dict[int, bytes] | None = None) -> Iterator[Entry]:
    """The images of a ``.rec`` file: those at the offsets in `listed` (from the ``.idx``, offset -> key),
    else all, whose key is the number of the record. Raises Malformed."""
    if listed is not None:
        for offset, key in listed.items():
            entry, _ = _record(window, offset, key)
            if entry is not None:
                yield entry
        return
    position, number = 0, 0
    while position < window.size:
        entry, position = _record(window, position, b"%08d" % number)
        if entry is not None:
            yield entry
        number += 1


def read_idx(name: str, text: bytes) -> dict[int, bytes]:
    """The offsets and keys of an ``.idx`` file: lines of a key, a tab and an offset."""
    listed: dict[int, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        key, tab, offset = line.partition(b"\t")
        if not tab or not offset.strip().isdigit():
            raise ValueError(f"{name} line {number}: expected a key, a tab and an offset, got {line[:60]!r}")
        listed[int(offset)] = key
    return listed


def image(record: bytes) -> bytes:
    """The image in a record of several parts (or of one), headers and all. Raises ValueError."""
    window = Window(
        "record", len(record), lambda offset, length: record[offset : offset + length], len(record)
    )
    content, position = [], 0
    while position < len(record):
        _, length, begin = _part(window, position)
        content.append(record[begin : begin + length])
        position = _padded(begin + length)
    whole = _MAGIC_BYTES.join(content)
    if len(whole) < _HEADER.size:
        raise window.malformed(0, f"an image header of {_HEADER.size} bytes", f"a record of {len(whole)}")
    flag = _HEADER.unpack_from(whole)[0]
    return whole[_HEADER.size + 4 * flag :]


def _record(window: Window, start: int, key: bytes) -> tuple[Entry | None, int]:
    """The image of the record at `start`, None without one, and where the next record begins."""
    kind, length, begin = _part(window, start)
    if kind == 0:
        skipped, label = _labels(window, begin, length)
        size = length - skipped
        entry = Entry(key, begin + skipped, size, label) if size or not skipped > _HEADER.size else None
        return entry, _padded(begin + length)
    if kind != 1:
        raise window.malformed(start, "the beginning of a record", f"a part of kind {kind}")
    label = _labels(window, begin, length)[1] if length >= _HEADER.size else None
    while kind != 3:
        position = _padded(begin + length)
        kind, length, begin = _part(window, position)
        if kind not in (2, 3):
            raise window.malformed(position, "another part of the record", f"a part of kind {kind}")
    end = begin + length
    return Entry(key, start, start - end, label), _padded(end)


def _part(window: Window, position: int) -> tuple[int, int, int]:
    """Kind, length and beginning of the data of the part at `position`."""
    magic, word = struct.unpack("<II", window.at(position, 8, "a record's header"))
    if magic != MAGIC:
        raise window.malformed(position, f"the magic number {MAGIC:#x} of RecordIO", f"{magic:#x}")
    kind, length, begin = word >> 29, word & (1 << 29) - 1, position + 8
    if begin + length > window.size:
        left = window.size - begin
        raise window.malformed(begin, f"a record of {length} bytes", f"the end of the file after {left}")
    return kind, length, begin


def _labels(window: Window, begin: int, length: int) -> tuple[int, bytes | None]:
    """Bytes before the image, and the label."""
    if length < _HEADER.size:
        raise window.malformed(begin, f"an image header of {_HEADER.size} bytes", f"a record of {length}")
    flag, label, _, _ = _HEADER.unpack(window.at(begin, _HEADER.size))
    skipped = _HEADER.size + 4 * flag
    if skipped > length:
        raise window.malformed(begin, f"{flag} labels", f"a record of {length} bytes")
    if flag:
        (label,) = struct.unpack("<f", window.at(begin + _HEADER.size, 4))
    whole = math.isfinite(label) and label == int(label)
    return skipped, b"%d" % int(label) if whole else None


def _padded(position: int) -> int:
    return position + -position % 4
