"""The check of all images before training: what is dropped, what is said, and what the cache saves."""

from __future__ import annotations

import io
import logging
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data import prescan as module
from fastdino.data.manifest import Manifest, build_manifest
from fastdino.data.prescan import decode, header_sizes, inspect, prescan


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, which JPEG keeps well."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb_png() -> bytes:
    """A PNG whose header claims 30000 x 30000 pixels."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


JPEG = encoded(photo(40, 60), "JPEG")
BAD = {
    "zero.jpg": (b"", "empty file"),
    "text.jpg": (b"<html>404</html>", "not an image, or cut short (the file starts with"),
    "zeros.png": (bytes(1000), "not an image, or cut short (the file starts with"),
    "half.jpg": (JPEG[:-100], "damaged jpeg image"),
    "header.jpg": (JPEG[:30], "not an image, or cut short (the file starts with"),
    "half.png": (encoded(photo(40, 60), "PNG")[:800], "not an image, or cut short"),
    "half.webp": (encoded(photo(40, 60), "WEBP")[:150], "damaged webp image"),
    "movie.jpg": (encoded(photo(40, 60), "GIF"), "not an image, or cut short (the file starts with"),
    "bomb.png": (bomb_png(), "30000 x 30000 pixels, more than the limit of 67,108,864"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four good images in two classes, and one bad file of each kind."""
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    for i, name in enumerate(("a/1.jpg", "a/2.png", "b/3.webp", "b/4.bmp")):
        photo(20 + i, 30 + i, seed=i).save(root / name)
    for name, (content, _) in BAD.items():
        (root / "b" / name).write_bytes(content)
    return root


@pytest.mark.parametrize("name", BAD)
def test_each_kind_of_bad_file_is_found_with_its_reason(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    verdict = inspect(str(tmp_path / name))
    assert verdict.reason.startswith(reason) and verdict[:2] == (0, 0)
    with pytest.raises(ValueError, match=f"{name}: "):
        decode(str(tmp_path / name))


def test_a_missing_or_forbidden_file_is_bad(tmp_path):
    assert inspect(str(tmp_path / "none.jpg")).reason == "cannot be read: No such file or directory"
    assert inspect(str(tmp_path)).reason == "cannot be read: Is a directory"


def test_good_images_stay_with_labels_and_sizes(folder, tmp_path):
    manifest = prescan(build_manifest(folder), tmp_path / "run", num_threads=2, progress=False)
    assert [os.path.basename(path) for path in manifest.paths] == ["1.jpg", "2.png", "3.webp", "4.bmp"]
    np.testing.assert_array_equal(manifest.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(manifest.sizes, [[20, 30], [21, 31], [22, 32], [23, 33]])
    assert manifest.class_names == ["a", "b"] and manifest.root == str(folder)


def test_one_warning_names_ten_and_a_file_names_all(folder, tmp_path, caplog):
    for i in range(5):
        (folder / "a" / f"more{i}.jpg").write_bytes(b"")
    prescan(build_manifest(folder), tmp_path / "run", progress=False)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    message = record.getMessage()
    assert "14 of 18 images cannot be used" in message and "bad_files.txt" in message
    assert message.count("\n  ") == 11 and message.endswith("...")
    lines = (tmp_path / "run/bad_files.txt").read_text().splitlines()
    assert len(lines) == 14 and f"{folder}/b/zero.jpg: empty file" in lines


def test_the_second_scan_opens_no_file(folder, tmp_path, monkeypatch):
    first = prescan(build_manifest(folder), tmp_path, progress=False)

    def fail(path):
        raise AssertionError(f"opened {path}")

    monkeypatch.setattr(module, "inspect", fail)
    second = prescan(build_manifest(folder), tmp_path, progress=False)
    assert second.paths == first.paths
    np.testing.assert_array_equal(second.sizes, first.sizes)


def test_only_new_and_changed_files_are_opened(folder, tmp_path, monkeypatch):
    prescan(build_manifest(folder), tmp_path, progress=False)
    photo(9, 9).save(folder / "a/new.png")
    (folder / "b/zero.jpg").write_bytes(JPEG)
    (folder / "b/4.bmp").write_bytes(b"")
    opened = []

    def record(path):
        opened.append(os.path.basename(path))
        return inspect(path)

    monkeypatch.setattr(module, "inspect", record)
    manifest = prescan(build_manifest(folder), tmp_path, progress=False)
    assert sorted(opened) == ["4.bmp", "new.png", "zero.jpg"]
    assert [os.path.basename(path) for path in manifest.paths] == [
        "1.jpg",
        "2.png",
        "new.png",
        "3.webp",
        "zero.jpg",
    ]


def test_a_file_rewritten_in_place_with_the_same_size_is_opened_again(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/a.jpg"
    path.write_bytes(JPEG)
    os.utime(path, ns=(0, 1_000_000_000))
    assert len(prescan(build_manifest(tmp_path / "data"), tmp_path, progress=False)) == 1
    path.write_bytes(bytes(len(JPEG)))
    os.utime(path, ns=(0, 1_000_000_001))
    with pytest.raises(ValueError, match="none of the 1 images"):
        prescan(build_manifest(tmp_path / "data"), tmp_path, progress=False)


def test_an_interrupted_scan_goes_on_where_it_stopped(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for i in range(200):
        photo(8, 8, seed=i).save(tmp_path / f"data/{i:03}.png")
    opened = []

    def interrupted(path):
        opened.append(path)
        if len(opened) == 150:
            raise KeyboardInterrupt
        return inspect(path)

    monkeypatch.setattr(module, "inspect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prescan(build_manifest(tmp_path / "data"), tmp_path, num_threads=1, progress=False)
    before = len(opened)
    assert before < 200
    assert len(prescan(build_manifest(tmp_path / "data"), tmp_path, num_threads=1, progress=False)) == 200
    assert 50 <= len(opened) - before <= 200 - 100
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04broken"])
def test_a_damaged_cache_is_said_and_replaced(folder, tmp_path, caplog, content):
    (tmp_path / "prescan.npz").write_bytes(content)
    assert len(prescan(build_manifest(folder), tmp_path, progress=False)) == 4
    assert "cannot read" in caplog.text and "prescan.npz" in caplog.text
    assert len(np.load(tmp_path / "prescan.npz")["sizes"]) == 4 + len(BAD)


def test_a_clean_scan_removes_the_old_list(folder, tmp_path):
    prescan(build_manifest(folder), tmp_path, progress=False)
    for name in BAD:
        (folder / "b" / name).unlink()
    prescan(build_manifest(folder), tmp_path, progress=False)
    assert not (tmp_path / "bad_files.txt").exists()


def test_no_good_image_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"--data_path: none of the 1 images of .*/data can be used; .*a\.jpg: empty file"
    ):
        prescan(build_manifest(tmp_path / "data"), tmp_path, progress=False)


def test_names_of_any_bytes(tmp_path, caplog):
    root = os.path.join(os.fsencode(tmp_path), b"\xff data")
    os.mkdir(root)
    for name, content in ((b"\xe9.jpg", JPEG), (b"new\nline.jpg", b"")):
        with open(os.path.join(root, name), "wb") as file:
            file.write(content)
    for _ in range(2):  # afresh, then from the cache
        manifest = prescan(build_manifest(os.fsdecode(root)), tmp_path, progress=False)
        assert [os.path.basename(os.fsencode(path)) for path in manifest.paths] == [b"\xe9.jpg"]
    assert (tmp_path / "bad_files.txt").read_text().count("\n") == 1
    assert r"new\nline.jpg: empty file" in caplog.text


def test_sizes_ignore_the_exif_orientation_as_training_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter turn
    photo(20, 30).save(tmp_path / "a.jpg", exif=exif)
    assert inspect(str(tmp_path / "a.jpg"))[:2] == (20, 30)
    assert decode(str(tmp_path / "a.jpg")).shape == (20, 30, 3)
    np.testing.assert_array_equal(header_sizes([str(tmp_path / "a.jpg")]), [[20, 30]])


def test_header_sizes_of_bad_files_are_zero(folder):
    paths = [str(folder / "a/2.png"), str(folder / "b/zero.jpg"), str(folder / "b/none.jpg")]
    np.testing.assert_array_equal(header_sizes(paths, 2), [[21, 31], [0, 0], [0, 0]])


def test_a_missing_decoder_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(
        ImportError, match=r"NVIDIA DALI .* not installed: pip install 'fastdino\[dali-cu13\]'"
    ):
        prescan(Manifest([str(tmp_path / "a.jpg")], None, [], str(tmp_path)), tmp_path, progress=False)
