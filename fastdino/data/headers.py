"""What the frame of an encoded image tells before it is decoded: bombs are named here, for little.

A file of 200 kB can keep a decoder busy for minutes: a JPEG that refines every pixel hundreds of times, a PNG
whose text or pixels inflate a thousandfold and are thrown away.
"""

from __future__ import annotations

import re
import struct
import zlib

MAX_PIXELS = 64 << 20
"""Largest image accepted, judged by its header: 64 Mi pixels, 192 MiB as RGB."""
CODECS = ("jpeg", "png", "webp", "bmp", "pnm", "tiff")
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
"""The same and GIF by the names of Pillow, which would take fifty others and start Ghostscript for one."""
KINDS = ("uint8", "uint16", "float32")
"""Pixels that DALI takes. It fails on signed ones; at others in a batch of 32 or more it gives up while its
threads go on with what it has freed, and the process ends.
"""
MAX_SCANS = 100
"""Of a JPEG; encoders write one to a dozen."""
MAX_TEXTS, MAX_METADATA, MAX_CHUNKS = 16, 16 << 20, 30_000
"""Of a PNG: compressed texts and profiles, bytes of all metadata, chunks."""
_INFLATED = 1 << 20  # bytes of compressed pixels below which a bomb costs about a second at most
_SLACK = 1 << 16

_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # within compressed pixels


def refusal(codec: str, kind: str, height: int, width: int, content: bytes) -> str:
    """Why an image of pixels of NumPy type ``kind`` is not decoded; empty for one that may be. Reads no
    compressed data of usual images.
    """
    if codec not in CODECS:
        return f"a {codec} image, expected one of {' '.join(CODECS)}"
    if kind not in KINDS:
        return f"a {codec} image of {kind or 'unknown'} pixels, expected one of {' '.join(KINDS)}"
    if not 0 < height * width <= MAX_PIXELS:
        if height * width == 0:
            return f"no pixels: {width} x {height}"
        return f"{width} x {height} pixels, more than the limit of {MAX_PIXELS:,}"
    if codec == "jpeg":
        # Two bytes that happen to stand in metadata are counted as well: only many are looked at.
        many = content.count(_SCAN) > MAX_SCANS and _scans(content) > MAX_SCANS
        return f"a JPEG of more than {MAX_SCANS} scans" if many else ""
    return _png(height, width, content) if codec == "png" else ""


def _scans(content: bytes) -> int:
    """Scans of a JPEG up to one more than `MAX_SCANS`."""
    scans, position = 0, 2
    while scans <= MAX_SCANS:
        if content[position : position + 1] != b"\xff" or position + 4 > len(content):
            return scans
        kind = content[position + 1]
        if kind == 0xFF:  # a fill byte
            position += 1
            continue
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if kind == _SCAN[1]:
            scans += 1
            following = _MARKER.search(content, position)
            if following is None or following[0] == b"\xff\xd9":  # the end of the image
                return scans
            position = following.start()
    return scans


def _png(height: int, width: int, content: bytes) -> str:
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(content[25], 4)
    raw = height * (1 + (width * samples * max(content[24], 1) + 7) // 8)
    raw += raw // 8 + _SLACK  # interlaced ones have more and shorter rows
    view, position, count = memoryview(content), 8, 0
    pixels: list[memoryview] = []
    texts = metadata = 0
    kind = b""
    while kind != b"IEND" and position + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        if position + 12 + length > len(content):  # decoders allocate it all the same
            return f"a PNG chunk of {length:,} bytes, the file ends after {len(content) - position - 8:,}"
        if kind == b"IDAT":
            pixels.append(view[position + 8 : position + 8 + length])
        else:
            texts += kind in (b"zTXt", b"iTXt", b"iCCP")
            metadata += length
        position, count = position + 12 + length, count + 1
        if texts > MAX_TEXTS or metadata > MAX_METADATA or count > MAX_CHUNKS:
            return (
                f"a PNG of more than {MAX_TEXTS} compressed texts, {MAX_METADATA >> 20} MiB of metadata or "
                f"{MAX_CHUNKS:,} chunks"
            )
    stored = sum(map(len, pixels))
    if stored > raw or (stored > _INFLATED and _inflates_beyond(pixels, raw)):
        return f"a PNG with data of more than its {width} x {height} pixels"
    return ""


def _inflates_beyond(pieces: list[memoryview], limit: int) -> bool:
    inflate, total = zlib.decompressobj(), 0
    try:
        for piece in pieces:
            data: memoryview | bytes = piece
            while data and not inflate.eof:
                total += len(inflate.decompress(data, 1 << 20))
                data = inflate.unconsumed_tail
                if total > limit:
                    return True
    except zlib.error:
        pass  # the decoder will say so
    return False
