"""Images in containers: the index that is kept, reading by position, object stores."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from fastdino.data import containers, indexing, samples
from fastdino.data.indexing import cache_file
from fastdino.data.manifest import build_manifest
from fastdino.data.samples import read
from tests.data.test_containers import IMAGES, KINDS

# --------------------------------------------------------------------------------------------- the kept index


def indexed(monkeypatch) -> list[str]:
    """Names of the shards that are indexed from now on."""
    done: list[str] = []
    real = indexing.index_shard

    def record(shard):
        done.append(os.path.basename(shard.path))
        return real(shard)

    monkeypatch.setattr(indexing, "index_shard", record)
    return done


@pytest.mark.parametrize("kind", ["tar", "tfrecord", "recordio", "lmdb"])
def test_a_shard_is_indexed_once_and_again_when_it_changes(writers, tmp_path, monkeypatch, user_cache, kind):
    suffix = KINDS[kind][1:]
    write = getattr(writers, kind)
    pattern = tmp_path / (f"s{{0,1}}{suffix}" + ("/data.mdb" if kind == "lmdb" else ""))
    for i in range(2):
        write(tmp_path / f"s{i}{suffix}", IMAGES[i : i + 2], [i, i])
    first = build_manifest(pattern)
    assert cache_file(str(pattern)).parent == user_cache and cache_file(str(pattern)).exists()
    done = indexed(monkeypatch)
    again = build_manifest(pattern)
    assert (
        done == []
        and again.paths == first.paths
        and [read(p) for p in again.paths] == [read(p) for p in first.paths]
    )
    np.testing.assert_array_equal(again.labels, first.labels)
    if kind == "lmdb":
        import shutil

        shutil.rmtree(tmp_path / f"s1{suffix}")
    write(tmp_path / f"s1{suffix}", IMAGES[2:], [5, 5, 5])
    os.utime(tmp_path / f"s1{suffix}", (1e9, 1e9))  # two writes may come within one tick of its clock
    changed = build_manifest(pattern)
    assert len(done) == 1 and [read(p) for p in changed.paths] == [*IMAGES[:2], *IMAGES[2:]]
    assert changed.labels.tolist() == [0, 0, 5, 5, 5]


def test_an_interrupted_indexing_goes_on_where_it_stopped(writers, tmp_path, monkeypatch):
    for i in range(4):
        writers.tar(tmp_path / f"{i}.tar", IMAGES)
    real = indexing.index_shard
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "THREADS", 1)

        def interrupted(shard):
            if shard.path.endswith("2.tar"):
                raise KeyboardInterrupt
            return real(shard)

        patch.setattr(indexing, "index_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_manifest(tmp_path)
    done = indexed(monkeypatch)
    assert len(build_manifest(tmp_path)) == 20 and sorted(done) == ["2.tar", "3.tar"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04broken"])
def test_a_damaged_index_is_said_and_replaced(writers, tmp_path, caplog, content):
    path = writers.tar(tmp_path / "a.tar", IMAGES)
    build_manifest(path)
    cache_file(str(path)).write_bytes(content)
    assert len(build_manifest(path)) == 5 and "cannot read the index" in caplog.text
    caplog.clear()
    assert len(build_manifest(path)) == 5 and not caplog.text


def test_an_index_that_cannot_be_kept_is_no_error(writers, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(build_manifest(writers.tar(tmp_path / "a.tar", IMAGES))) == 5
    assert "cannot keep the index in" in caplog.text


# ---------------------------------------------------------------------------------------------------- reading


def test_a_transient_error_is_tried_twice_more(writers, tmp_path, monkeypatch):
    manifest = build_manifest(writers.tar(tmp_path / "a.tar", IMAGES))
    real, failures = os.pread, [OSError(5, "Input/output error")]

    def pread(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(os, "pread", pread)
    assert read(manifest.paths[0]) == IMAGES[0]
    failures += [OSError(5, "Input/output error"), *[OSError(116, "Stale file handle")] * 2]
    with pytest.raises(OSError, match="Input/output error"):
        read(manifest.paths[0])


def test_a_shard_that_shrank_vanished_or_changed_is_an_error_of_its_images(writers, tmp_path):
    path = writers.tar(tmp_path / "a.tar", IMAGES)
    manifest = build_manifest(path)
    read(manifest.paths[0])
    os.truncate(path, 600)
    with pytest.raises(
        OSError, match="the shard has changed since it was indexed: expected .* bytes, got 600"
    ):
        read(manifest.paths[4])
    path.unlink()
    samples._handles.forget(manifest.paths[0].shard)
    with pytest.raises(FileNotFoundError):
        read(manifest.paths[0])


def test_what_is_no_file_or_too_large_is_not_read(writers, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match="not a regular file"):  # nobody writes to it: reading would wait
        read(str(tmp_path / "pipe.jpg"))
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(OSError, match="4,398,046,511,104 bytes, more than the limit of 536,870,912"):
        read(str(tmp_path / "huge.jpg"))
    monkeypatch.setattr(samples, "MAX_BYTES", len(IMAGES[1]) - 1)
    with pytest.raises(OSError, match="more than the limit"):
        read(build_manifest(writers.tar(tmp_path / "a.tar", IMAGES)).paths[1])


def test_no_more_shards_are_open_than_allowed(writers, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MAX_OPEN", 3)
    for i in range(9):
        writers.tar(tmp_path / f"{i}.tar", IMAGES[:1])
    manifest = build_manifest(tmp_path)
    for _ in range(2):
        assert [read(name) for name in manifest.paths] == IMAGES[:1] * 9
    opened = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert sum(str(tmp_path) in name for name in opened) <= 3


def test_many_images_stay_cheap():
    """What is kept of each: 36 bytes and the key."""
    n = 100_000
    shard = samples.Shard("a.tar", "tar", 1 << 40, "0")
    ends = np.arange(1, n + 1, dtype=np.int64) * 12
    index = indexing.Index(
        np.arange(n, dtype=np.int64),
        np.full(n, 100, np.int64),
        b"00000000.jpg" * n,
        ends,
        b"",
        np.zeros(n, np.int64),
    )
    manifest = containers._manifest([shard], [index], "a.tar")
    paths = manifest.paths
    held = paths._shard, paths._offsets, paths._lengths, paths._key_spans
    assert sum(array.nbytes for array in held) == 36 * n and len(manifest) == n
    assert paths[n - 1].offset == n - 1 and paths.stored_bytes() == 100 * n
    assert next(iter(paths.names("."))) == "a.tar/00000000.jpg"


# ---------------------------------------------------------------------------------------------- object stores


def test_shards_in_an_object_store(writers, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for kind in ("tar", "tfrecord", "recordio"):
        folder, suffix = f"memory://{kind}-bucket", KINDS[kind][1:]
        for i, chunk in enumerate((IMAGES[:2], IMAGES[2:])):
            local = getattr(writers, kind)(tmp_path / f"s{i}{suffix}", chunk, [1] * len(chunk))
            memory.pipe(f"/{kind}-bucket/s{i}{suffix}", local.read_bytes())
        for url in (f"{folder}/s{{0,1}}{suffix}", f"{folder}/s*{suffix}", f"{folder}/s?{suffix}", folder):
            manifest = build_manifest(url)
            assert [read(name) for name in manifest.paths] == IMAGES and manifest.labels.tolist() == [1] * 5
            assert manifest.paths[0].startswith("memory://")
    done = indexed(monkeypatch)
    build_manifest("memory://tar-bucket/s{0,1}.tar")
    assert done == []
    memory.rm("/tar-bucket/s1.tar")
    with pytest.raises(FileNotFoundError, match="memory://tar-bucket/s1.tar"):
        read(build_manifest("memory://tar-bucket/s{0,1}.tar").paths[4])


def test_a_range_of_an_object_is_all_that_is_read(writers, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/ranged/a.tar", writers.tar(tmp_path / "a.tar", IMAGES).read_bytes())
    manifest = build_manifest("memory://ranged/a.tar")
    asked = []
    real = type(memory).cat_file

    def cat_file(self, path, start=None, end=None, **options):
        asked.append((start, end))
        return real(self, path, start, end, **options)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    assert read(manifest.paths[2]) == IMAGES[2] and asked == [
        (manifest.paths[2].offset, manifest.paths[2].offset + len(IMAGES[2]))
    ]
    monkeypatch.setattr(type(memory), "cat_file", lambda *args, **options: IMAGES[2][:7])
    with pytest.raises(
        OSError, match=f"tar shard cut short at offset .*: expected {len(IMAGES[2])} bytes, got 7"
    ):
        read(manifest.paths[2])


def test_a_server_that_ignores_ranges_is_refused(writers, tmp_path, monkeypatch):
    """It would send the whole object for each image, and the wrong bytes."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/whole/a.tar", writers.tar(tmp_path / "a.tar", IMAGES).read_bytes())
    real = type(memory).cat_file
    monkeypatch.setattr(indexing, "_REMOTE_BLOCK", 1 << 12)
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, *_, **__: real(self, path))
    with pytest.raises(OSError, match=r"memory://whole/a.tar: asked for 4096 bytes, the server sent \d+: "):
        build_manifest("memory://whole/a.tar")


def test_without_the_package_or_the_store_the_error_says_what_to_install(monkeypatch):
    with pytest.raises(ValueError, match="nosuchstore"):
        build_manifest("nosuchstore://bucket/a.tar")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdino\[object-store\]'"):
        build_manifest("s3://user:secret@bucket/a.tar")
    with pytest.raises(ImportError) as caught:
        build_manifest("https://user:secret@host/a.tar?X-Signature=hidden")
    assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)


def test_an_lmdb_without_its_package_is_an_error_that_says_what_to_install(writers, tmp_path, monkeypatch):
    path = writers.lmdb(tmp_path / "db", IMAGES)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r"is an LMDB, .* pip install 'fastdino\[lmdb\]'"):
        build_manifest(path)
