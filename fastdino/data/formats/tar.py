"""WebDataset: tar files in which the members ``<key>.jpg`` and ``<key>.cls`` belong together.

A member is an image by its ending (`ENDINGS`). Its label is the text of ``<key>.cls``, or else the entry
"label" of ``<key>.json``; every other member is passed over, and so are links, devices, sparse and hidden
files. Nothing is ever extracted: names are names, and only headers and labels are read.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator

from fastdino.data.formats.window import MAX_HEADER, Entry, Malformed, Window

ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "img", "image")
MAX_LABEL, MAX_JSON = 256, 1 << 20


def index(window: Window) -> Iterator[Entry]:
    """The images of a tar file in its order. Raises Malformed for one that is damaged, cut or compressed."""
    if window.size >= 2 and window.at(0, 2) == b"\x1f\x8b":
        raise window.malformed(0, "an uncompressed tar file, which can be read by position", "gzip")
    images: list[tuple[str, bytes, int, int]] = []
    labels: dict[str, bytes] = {}
    for member in _members(window):
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if not stem or not member.isreg() or member.issparse():
            continue
        key, ending = folder + slash + stem, ending.lower()
        offset, size = member.offset_data, member.size
        if ending in ENDINGS:
            images.append((key, member.name.encode("utf-8", "surrogateescape"), offset, size))
        elif ending == "cls":
            if size > MAX_LABEL:
                raise window.malformed(offset, f"a label of at most {MAX_LABEL} bytes", f"{size} bytes")
            labels[key] = window.at(offset, size, "a label").strip()
        elif ending == "json" and key not in labels:
            label = _json_label(window, offset, size)
            if label is not None:
                labels[key] = label
    for key, name, offset, size in images:
        yield Entry(name, offset, size, labels.get(key))


def _members(window: Window) -> Iterator[tarfile.TarInfo]:
    """Headers of all members, each of whose data lies in the file."""
    last = -1
    file = _File(window)
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r", errorlevel=2)
        while (member := tar.next()) is not None:
            file.left = 2 * MAX_HEADER
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte of each
            if member.offset <= last or member.size < 0:
                raise window.malformed(member.offset, "a member after the one before", "one that leads back")
            last = member.offset
            # The size of a sparse member counts its holes, which the file does not hold.
            stored = member.isreg() and not member.issparse()
            if stored and member.offset_data + member.size > window.size:
                left = max(0, window.size - member.offset_data)
                raise window.malformed(
                    member.offset_data,
                    f"{member.size} bytes of {ascii(member.name[:100])}",
                    f"the end of the file after {left}",
                )
            yield member
    except (Malformed, OSError):
        raise
    except Exception as error:  # arbitrary bytes can fail in any operation of tarfile
        at = 0 if last < 0 else last
        raise window.malformed(at, "a tar file", f"{error} (in or after the member there)") from error
    # tarfile takes a damaged header for the end; the real end is a block of zeros.
    end = tar.offset
    if end + 512 > window.size or any(window.at(end, 512)):
        found = "other bytes" if end + 512 <= window.size else "the end of the file: it was cut short"
        raise window.malformed(end, "a member or the end mark of a tar file", found)


def _json_label(window: Window, offset: int, size: int) -> bytes | None:
    if size > MAX_JSON:
        raise window.malformed(offset, f"JSON of at most {MAX_JSON} bytes", f"{size} bytes")
    try:
        content = json.loads(window.at(offset, size, "JSON"))
    except (ValueError, RecursionError) as error:
        raise window.malformed(offset, "JSON", str(error)) from error
    label = content.get("label") if isinstance(content, dict) else None
    if not isinstance(label, int | str) or isinstance(label, bool):
        return None
    return str(label).encode("utf-8", "surrogatepass")[:MAX_LABEL]


class _File(io.RawIOBase):
    """What tarfile reads from; a size claimed in a header gets no memory, an endless header an end."""

    def __init__(self, window: Window) -> None:
        self._window, self._position = window, 0
        self.left = 2 * MAX_HEADER
        """Bytes that it may still read to find the next member."""

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence or offset < 0:
            raise self._window.malformed(self._position, "a member after this one", "one that leads back")
        self._position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._window.size - self._position)
        self.left -= tarfile.BLOCKSIZE  # also at the end of the file, where tarfile may ask for ever
        if self.left < 0:
            raise self._window.malformed(self._position, "a member", "headers without end")
        content = self._window.at(self._position, size if size < 0 else min(size, left), "a header")
        self._position += len(content)
        self.left -= len(content)
        return content
