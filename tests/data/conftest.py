"""Containers written by hand, as small as their formats allow."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import pytest

from fastdino.data.formats.recordio import MAGIC
from fastdino.data.formats.tfrecord import crc32c, masked


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch) -> Path:
    """Indices are kept here instead of in the user's own folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "fastdino"


class Writers:
    """Each takes a file and its images (with labels), and writes them in order."""

    @staticmethod
    def tar(path: Path, images: list[bytes], labels: list[int] | None = None, ending: str = "jpg") -> Path:
        with tarfile.open(path, "w") as file:
            for i, image in enumerate(images):
                members = {ending: image}
                if labels is not None:
                    members["cls"] = str(labels[i]).encode()
                for name, content in members.items():
                    header = tarfile.TarInfo(f"{i:04}.{name}")
                    header.size = len(content)
                    file.addfile(header, io.BytesIO(content))
        return path

    @staticmethod
    def tfrecord(path: Path, images: list[bytes], labels: list[int] | None = None, ending: str = "") -> Path:
        def field(number: int, content: bytes) -> bytes:
            return varint(number << 3 | 2) + varint(len(content)) + content

        def feature(name: bytes, kind: int, values: bytes) -> bytes:
            return field(1, field(1, name) + field(2, field(kind, values)))

        records = []
        for i, image in enumerate(images):
            features = feature(b"image/format", 1, field(1, b"JPEG"))
            if labels is not None:
                features += feature(b"image/class/label", 3, field(1, varint(labels[i])))
            features += feature(b"image/encoded", 1, field(1, image))
            records.append(field(1, features))
        path.write_bytes(b"".join(map(record, records)))
        return path

    @staticmethod
    def recordio(path: Path, images: list[bytes], labels: list[int] | None = None, ending: str = "") -> Path:
        content, offsets = b"", []
        for i, image in enumerate(images):
            offsets.append(len(content))
            header = struct.pack("<IfQQ", 0, 0.0 if labels is None else labels[i], i, 0)
            content += parts(header + image)
        path.write_bytes(content)
        path.with_suffix(".idx").write_text("".join(f"{i}\t{offset}\n" for i, offset in enumerate(offsets)))
        return path

    @staticmethod
    def lmdb(path: Path, images: list[bytes], labels: list[int] | None = None, ending: str = "") -> Path:
        """Plain values without labels, else Caffe's Datum; `path` is a folder."""
        import lmdb

        with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
            for i, image in enumerate(images):
                value = image
                if labels is not None:
                    value = varint(4 << 3 | 2) + varint(len(image)) + image
                    value += varint(5 << 3) + varint(labels[i]) + varint(7 << 3) + varint(1)
                transaction.put(b"%04d" % i, value)
        return path


@pytest.fixture(scope="session")
def writers() -> Writers:
    return Writers()


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def record(content: bytes) -> bytes:
    """A TFRecord."""
    length = struct.pack("<Q", len(content))
    return (
        length
        + struct.pack("<I", masked(crc32c(length)))
        + content
        + struct.pack("<I", masked(crc32c(content)))
    )


def parts(content: bytes) -> bytes:
    """A RecordIO record, cut where the magic number stands at a multiple of four."""
    magic = struct.pack("<I", MAGIC)
    pieces, begin = [], 0
    for at in range(0, len(content) - 3, 4):
        if content[at : at + 4] == magic:
            pieces.append(content[begin:at])
            begin = at + 4
    pieces.append(content[begin:])
    kinds = [0] if len(pieces) == 1 else [1] + [2] * (len(pieces) - 2) + [3]
    out = b""
    for kind, piece in zip(kinds, pieces, strict=True):
        out += magic + struct.pack("<I", kind << 29 | len(piece)) + piece + bytes(-len(piece) % 4)
    return out
