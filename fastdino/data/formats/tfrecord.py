"""TFRecord files of tf.train.Example messages with "image/encoded" and, if there are labels,
"image/class/label".

A record is (TensorFlow, core/lib/io/record_writer.h)

    uint64 length, uint32 masked crc32c(length), length bytes, uint32 masked crc32c(bytes)

and the bytes are a protobuf message of which only the frame around the image is read:

    Example {1: Features {1: repeated entry {1: name, 2: Feature {1: BytesList | 3: Int64List {1: value}}}}}
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from fastdino.data.formats.window import Entry, Window

IMAGE, LABEL = b"image/encoded", b"image/class/label"
_MAX_NAME = 1024


def index(window: Window) -> Iterator[Entry]:
    """The images in order; the key of an image is the number of its record. Raises Malformed."""
    position, number = 0, 0
    while position < window.size:
        header = window.at(position, 12, "a record's header")
        length, check = struct.unpack("<QI", header)
        if masked(crc32c(header[:8])) != check:
            found = "gzip" if header[:2] == b"\x1f\x8b" else "another one"
            raise window.malformed(position, "a record's length with its checksum", found)
        begin = position + 12
        position = begin + length + 4
        if position > window.size:
            left = window.size - begin
            raise window.malformed(
                begin, f"a record of {length} bytes and its checksum", f"the end of the file after {left}"
            )
        yield _example(window, begin, begin + length, number)
        number += 1


def _example(window: Window, begin: int, end: int, number: int) -> Entry:
    image: tuple[int, int] | None = None
    label: bytes | None = None
    names = []
    for features in _nested(window, begin, end, 1):
        for entry in _nested(window, *features, 1):
            name = b"".join(window.at(a, min(b - a, _MAX_NAME)) for a, b in _nested(window, *entry, 1))
            names.append(name)
            for feature in _nested(window, *entry, 2):
                if name == IMAGE:
                    for values in _nested(window, *feature, 1):
                        image = next(_nested(window, *values, 1), image)
                elif name == LABEL:
                    for values in _nested(window, *feature, 3):
                        label = next(_integers(window, *values), label)
    if image is None:
        found = ", ".join(ascii(name)[2:-1] for name in names[:10]) or "none"
        raise window.malformed(begin, f"a tf.train.Example with {IMAGE.decode()}", f"features: {found}")
    return Entry(b"%08d" % number, image[0], image[1] - image[0], label)


# --------------------------------------------------------------------------------------------------- protobuf


def fields(window: Window, begin: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Number and value of each field: an integer, or where the bytes begin and end."""
    while begin < end:
        tag, begin = _varint(window, begin, end)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, begin = _varint(window, begin, end)
            yield number, value
            continue
        if wire == 2:
            size, begin = _varint(window, begin, end)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise window.malformed(begin, "a protobuf field", f"one of type {wire}")
        if begin + size > end:
            raise window.malformed(
                begin, f"a field of {size} bytes", f"the end of its message after {end - begin}"
            )
        yield number, (begin, begin + size)
        begin += size


def _nested(window: Window, begin: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
    for number, value in fields(window, begin, end):
        if number == wanted and isinstance(value, tuple):
            yield value


def _integers(window: Window, begin: int, end: int) -> Iterator[bytes]:
    """The values of an Int64List, packed or not."""
    for number, value in fields(window, begin, end):
        if number != 1:
            continue
        if isinstance(value, int):
            yield b"%d" % _signed(value)
        else:
            position, stop = value
            while position < stop:
                plain, position = _varint(window, position, stop)
                yield b"%d" % _signed(plain)


def _varint(window: Window, position: int, end: int) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(window.at(position, min(10, end - position), "a protobuf number")):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position + count + 1
    raise window.malformed(position, "a protobuf number", "one without end")


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


# --------------------------------------------------------------------------------------------------- checksum


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """As TFRecord stores it, so that checksums of data that hold checksums stay good."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
