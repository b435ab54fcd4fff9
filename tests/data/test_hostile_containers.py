"""Containers that are damaged, or made to do harm: an error that names the place, and nothing else."""

from __future__ import annotations

import io
import os
import resource
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data.formats import tfrecord
from fastdino.data.manifest import build_manifest
from fastdino.data.samples import read

KINDS = {"tar": "a.tar", "tfrecord": "a.tfrecord", "recordio": "a.rec", "lmdb": "a_lmdb"}


def jpeg(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGES = [jpeg(i) for i in range(5)]
LABELS = [3, 0, 1, 3, 200]


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    return path


def malformed(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_manifest(path)
    assert str(caught.value).startswith("--data_path: ") and path.name in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_cut_anywhere_is_an_error_or_ends_at_a_record(writers, tmp_path, kind):
    path = getattr(writers, kind)(tmp_path / KINDS[kind], IMAGES[:3], LABELS[:3])
    (tmp_path / "a.idx").unlink(missing_ok=True)
    file = path / "data.mdb" if kind == "lmdb" else path
    content = file.read_bytes()
    loaded = errors = 0
    for end in sorted({*range(0, len(content), max(1, len(content) // 60)), len(content) - 1}):
        file.write_bytes(content[:end])
        os.utime(file, ns=(end, end))
        try:
            manifest = build_manifest(path)
        except ValueError as error:
            assert "offset" in str(error) and "expected" in str(error) or "no images in" in str(error)
            errors += 1
        else:
            assert [read(name) for name in manifest.paths] == IMAGES[: len(manifest)]
            loaded += 1
    assert errors > 20 and (loaded <= 3 or kind == "tar")  # the end mark of a tar is longer than it has to be


def test_messages_name_file_offset_expectation_and_finding(writers, tmp_path):
    tar = writers.tar(tmp_path / "a.tar", IMAGES)
    content = tar.read_bytes()
    tar.write_bytes(content[:700])
    malformed(
        tar, rf"a\.tar: offset 512: expected {len(IMAGES[0])} bytes of '0000\.jpg', got the end .* after 188"
    )
    second = 512 + len(IMAGES[0]) + -len(IMAGES[0]) % 512
    tar.write_bytes(content[: second + 10] + b"\xff" * 100 + content[second + 110 :])
    malformed(
        tar, rf"a\.tar: offset {second}: expected a member or the end mark of a tar file, got other bytes"
    )
    tar.write_bytes(content[:second])
    malformed(
        tar, f"offset {second}: expected a member or the end mark .*, got the end of the file: it was cut"
    )
    tar.write_bytes(b"\x1f\x8b" + bytes(600))
    malformed(tar, r"offset 0: expected an uncompressed tar file, .*, got gzip")
    tar.write_bytes(b"hello" * 200)
    malformed(tar, "a.tar: offset 0: expected a tar file, got")

    rec = writers.recordio(tmp_path / "a.rec", IMAGES)
    content = rec.read_bytes()
    rec.write_bytes(content[:-8])
    malformed(rec, r"a\.rec: offset \d+: expected a record of \d+ bytes, got the end of the file after")
    rec.write_bytes(b"\0" * 8 + content[8:])
    malformed(rec, r"offset 0: expected the magic number 0xced7230a of RecordIO, got 0x0")
    rec.write_bytes(content)
    (tmp_path / "a.idx").write_text("0\t0\n1\tx\n")
    with pytest.raises(ValueError, match=r"a\.idx line 2: expected a key, a tab and an offset, got b'1\\tx'"):
        build_manifest(rec)
    (tmp_path / "a.idx").write_text("0\t4\n")
    malformed(rec, "offset 4: expected the magic number")

    record = writers.tfrecord(tmp_path / "a.tfrecord", IMAGES)
    content = record.read_bytes()
    record.write_bytes(content[:-5])
    malformed(
        record, r"a\.tfrecord: offset \d+: expected a record of \d+ bytes and its checksum, got the end"
    )
    record.write_bytes(b"\1" + content[1:])
    malformed(record, "offset 0: expected a record's length with its checksum, got another one")
    length = struct.pack("<Q", 2)
    check = struct.pack("<I", tfrecord.masked(tfrecord.crc32c(length)))
    record.write_bytes(length + check + b"\x0a\x00" + bytes(4))
    malformed(record, "offset 12: expected a tf.train.Example with image/encoded, got features: none")
    record.write_bytes(length + check + b"\x0a\x7f" + bytes(4))
    malformed(record, "offset 14: expected a field of 127 bytes, got the end of its message after 0")


@pytest.fixture
def little_memory():
    """512 MiB more than now: a size claimed in a header must not become an allocation."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (512 << 20), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def tar_header(name: bytes, kind: bytes, size: bytes) -> bytes:
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S"])
@pytest.mark.parametrize(
    "size", [b"77777777777\0", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, b"\xff" * 11 + b"\x01"]
)
def test_a_tar_that_claims_or_leads_back_ends_with_an_error(tmp_path, little_memory, kind, size):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_header(b"a.jpg", kind, size) + bytes(2048))
    with pytest.raises(ValueError, match=r"a\.tar|no images"):
        build_manifest(path)


def test_a_long_header_is_refused_though_the_file_is_as_long(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_header(b"a.jpg", b"x", b"%011o\0" % (2 << 20)) + bytes(3 << 20))
    malformed(path, "offset 512: expected a header of at most 1048576 bytes, got a length of 2097152")


@pytest.mark.parametrize("name", ["a.rec", "a.tfrecord"])
def test_a_record_that_claims_ends_with_an_error(tmp_path, little_memory, name):
    path = tmp_path / name
    length = struct.pack("<Q", 2**62)
    check = struct.pack("<I", tfrecord.masked(tfrecord.crc32c(length)))
    rec = struct.pack("<II", 0xCED7230A, 2**29 - 1) + struct.pack("<IfQQ", 2**32 - 1, 0, 0, 0)
    path.write_bytes(length + check + b"x" * 100 if name == "a.tfrecord" else rec)
    malformed(path, "expected a record of")
    short = struct.pack("<II", 0xCED7230A, 24) + struct.pack("<IfQQ", 2**32 - 1, 0, 0, 0)
    if name == "a.rec":
        path.write_bytes(short)
        malformed(path, "expected 4294967295 labels, got a record of 24 bytes")


def test_random_damage_never_does_worse_than_an_error(writers, tmp_path, little_memory):
    rng = np.random.default_rng(0)
    for kind in ("tar", "tfrecord", "recordio"):
        path = getattr(writers, kind)(tmp_path / KINDS[kind], [b"\xff\xd8" + bytes(40)] * 4, LABELS[:4])
        (tmp_path / "a.idx").unlink(missing_ok=True)
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for i in range(150):
            damaged = content.copy()
            damaged[rng.integers(0, min(len(content), 3000), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            os.utime(path, ns=(i, i))
            try:
                manifest = build_manifest(path, progress=False)
            except ValueError as error:
                assert "a.t" in str(error) or "a.rec" in str(error)
            else:
                assert all(len(read(name)) <= len(content) for name in manifest.paths)


def test_indexing_and_reading_write_nothing_but_the_index(tmp_path, user_cache):
    members = {"../../up.jpg": IMAGES[0], f"{tmp_path}/absolute.jpg": IMAGES[1], "a.pkl": b"cos\nsystem\n."}
    path = tar_of(tmp_path / "a.tar", members)
    written: set[str] = set()
    active = True

    def hook(event: str, args: tuple) -> None:
        if active and event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            written.add(str(args[0]))

    sys.addaudithook(hook)
    try:
        manifest = build_manifest(path)
        assert [read(name) for name in manifest.paths] == IMAGES[:2]
    finally:
        active = False
    assert written and all(name.startswith(str(user_cache)) for name in written)
