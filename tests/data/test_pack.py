"""Packing: what is written, that other readers take it, and that interruptions leave no trace."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data import indexing
from fastdino.data import pack as module
from fastdino.data.manifest import build_manifest
from fastdino.data.pack import main, pack, size
from fastdino.data.samples import read


def encoded(seed: int, kind: str = "JPEG", shape: tuple[int, int] = (30, 24)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


KINDS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve images in two classes, of which number 4 and the last are damaged."""
    root = tmp_path / "photos"
    for i in range(12):
        content = encoded(i, KINDS[i % 6])
        path = root / ("cat" if i < 5 else "old dog") / f"{i:02}.{KINDS[i % 6].lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".jpg").write_bytes(content[:40] if i in (4, 11) else content)
    return root


def digests(output: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(output.glob("*.tar"))}


def test_bytes_labels_and_class_names_are_kept(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(folder), str(out), "--shard_size", "6K"]) == 0
    assert "10 images in" in capsys.readouterr().out
    source, packed = build_manifest(folder), build_manifest(out)
    kept = [i for i in range(12) if i not in (4, 11)]
    assert [read(path) for path in packed.paths] == [read(source.paths[i]) for i in kept]
    assert packed.class_names == ["cat", "old dog"] == source.class_names
    np.testing.assert_array_equal(packed.labels, source.labels[kept])
    lines = (out / "left_out.txt").read_text().splitlines()
    assert len(lines) == 2 and "04.jpg: " in lines[0] and "11.jpg: " in lines[1]
    shards = sorted(path.name for path in out.glob("*.tar"))
    assert shards == [f"shard-{i:06}.tar" for i in range(len(shards))] and len(shards) > 1
    assert all((out / name).stat().st_size >= 6 << 10 for name in shards[:-1])
    names = [name for shard in shards for name in tarfile.open(out / shard).getnames()]
    assert names[:4] == ["00000000.jpg", "00000000.cls", "00000001.png", "00000001.cls"]
    assert {name.rpartition(".")[2] for name in names} == {"jpg", "png", "webp", "bmp", "ppm", "tif", "cls"}
    assert not list(out.glob("*.tmp"))


def test_dali_reads_the_shards(folder, tmp_path):
    from nvidia.dali import fn, pipeline_def

    manifest = pack(str(folder), tmp_path / "out", progress=False)

    @pipeline_def(batch_size=len(manifest), num_threads=1, device_id=None)
    def graph():
        shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
        return tuple(fn.readers.webdataset(paths=shards, ext=["jpg;png;webp;bmp;ppm;tif", "cls"]))

    images, labels = graph().run()
    assert [bytes(np.asarray(image)) for image in images] == [read(path) for path in manifest.paths]
    assert [int(bytes(np.asarray(label))) for label in labels] == manifest.labels.tolist()


def test_the_index_beside_the_shards_is_used(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(str(folder), out, progress=False)
    monkeypatch.setattr(indexing, "index_shard", lambda shard: pytest.fail("indexed again"))
    assert len(build_manifest(out)) == 10
    shutil.copytree(out, tmp_path / "copy")  # with its times
    assert len(build_manifest(tmp_path / "copy" / "shard-*.tar")) == 10
    monkeypatch.undo()
    os.utime(out / "shard-000000.tar", (1, 1))
    done = []
    real = indexing.index_shard
    monkeypatch.setattr(indexing, "index_shard", lambda shard: (done.append(1), real(shard))[1])
    assert len(build_manifest(out)) == 10 and done == [1]


def test_the_index_in_an_object_store_is_used(folder, tmp_path, monkeypatch):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    pack(str(folder), tmp_path / "out", progress=False)
    for path in (tmp_path / "out").iterdir():
        memory.pipe(f"/packed/{path.name}", path.read_bytes())
    monkeypatch.setattr(indexing, "index_shard", lambda shard: pytest.fail("indexed again"))
    manifest = build_manifest("memory://packed/")
    assert len(manifest) == 10 and manifest.class_names == ["cat", "old dog"]


@pytest.mark.parametrize("source", ["tar", "tfrecord", "recordio", "lmdb", "flat"])
def test_every_source_can_be_packed(writers, tmp_path, source):
    images = [encoded(i) for i in range(4)]
    path = tmp_path / {"tar": "a.tar", "tfrecord": "a.tfrecord", "recordio": "a.rec"}.get(source, source)
    if source == "flat":
        path.mkdir()
        for i, image in enumerate(images):
            (path / f"{i}.jpg").write_bytes(image)
    else:
        getattr(writers, source)(path, images, [2, 0, 1, 2])
    packed = pack(str(path), tmp_path / "out", progress=False)
    assert [read(name) for name in packed.paths] == images
    assert packed.labels is None if source == "flat" else packed.labels.tolist() == [2, 0, 1, 2]


def test_larger_images_are_shrunk_and_others_copied(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    contents = [encoded(0, "PNG", (40, 80)), encoded(1, "PNG", (20, 16)), encoded(2, "JPEG", (90, 30))]
    for i, content in enumerate(contents):
        (root / f"{i}.png").write_bytes(content)
    packed = pack(str(root), tmp_path / "out", max_side=40, quality=70, progress=False)
    images = [Image.open(io.BytesIO(read(path))) for path in packed.paths]
    assert [image.size for image in images] == [(40, 20), (16, 20), (13, 40)]
    assert read(packed.paths[1]) == contents[1]
    original = Image.open(io.BytesIO(contents[0])).resize((40, 20), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    original.save(buffer, "JPEG", quality=70)
    assert read(packed.paths[0]) == buffer.getvalue()


def test_the_bytes_do_not_depend_on_workers_or_interruptions(folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    pack(str(folder), whole, shard_size=3000, num_workers=1, progress=False)
    assert len(digests(whole)) >= 4
    pack(str(folder), tmp_path / "again", shard_size=3000, num_workers=3, progress=False)
    assert digests(tmp_path / "again") == digests(whole)
    real = module._Shard.add
    for stop in range(1, 10):
        out, seen = tmp_path / f"stopped{stop}", []

        def add(self, sample, image, label, seen=seen, stop=stop):
            seen.append(sample)
            if len(seen) == stop:
                raise KeyboardInterrupt
            real(self, sample, image, label)

        with monkeypatch.context() as patch:
            patch.setattr(module._Shard, "add", add)
            with pytest.raises(KeyboardInterrupt):
                pack(str(folder), out, shard_size=3000, num_workers=2, progress=False)
        finished = digests(out)
        assert finished.items() <= digests(whole).items()
        times = {name: (out / name).stat().st_mtime_ns for name in finished}
        assert len(pack(str(folder), out, shard_size=3000, progress=False)) == 10
        assert digests(out) == digests(whole)
        assert times == {name: (out / name).stat().st_mtime_ns for name in finished}  # kept, not made again
        for name in ("left_out.txt", "pack.json", "classes.txt"):
            assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert len(pack(str(folder), whole, shard_size=3000, progress=False)) == 10  # nothing left to do


@pytest.mark.parametrize("done", [False, True])
def test_stopped_before_or_after_any_file_appears(folder, tmp_path, monkeypatch, done):
    whole = tmp_path / "whole"
    pack(str(folder), whole, shard_size=3000, progress=False)
    real, left = os.replace, [0]

    def replace(source, target):
        left[0] -= 1
        if left[0] >= 0 or done:
            real(source, target)
        if left[0] < 0:
            raise KeyboardInterrupt

    for stop in range(50):
        out = tmp_path / f"{done}{stop}"
        left[0] = stop
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                pack(str(folder), out, shard_size=3000, progress=False)
            except KeyboardInterrupt:
                interrupted = True
            else:
                interrupted = False
        assert len(pack(str(folder), out, shard_size=3000, progress=False)) == 10
        assert digests(out) == digests(whole)
        for name in ("left_out.txt", "pack.json", "classes.txt"):
            assert (out / name).read_bytes() == (whole / name).read_bytes()
        if not interrupted:
            break
    assert not interrupted and stop > 2 * len(digests(whole))


def test_ctrl_c_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(module._Shard, "finish", lambda self: signal.raise_signal(signal.SIGINT))
        assert main([str(folder), str(tmp_path / "out")]) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "out")]) == 0


def test_a_finished_shard_that_is_missing_is_said(folder, tmp_path, capsys):
    words = [str(folder), str(tmp_path / "out"), "--shard_size", "3000"]
    assert main(words) == 0
    (tmp_path / "out/shard-000001.tar").unlink()
    assert main(words) == 2
    assert "shard-000001.tar was finished and is missing; choose another folder" in capsys.readouterr().err


def test_a_killed_run_continues(folder, tmp_path):
    for i in range(200):
        (folder / "cat" / f"more{i:03}.jpg").write_bytes(encoded(i, shape=(200, 200)))
    words = [str(folder), str(tmp_path / "killed"), "--shard_size", "100K", "--num_workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "fastdino.data.pack", *words])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*.tar"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(words) == 0
    assert main([words[0], str(tmp_path / "whole"), *words[2:]]) == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_other_arguments_another_source_or_a_folder_in_use_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    pack(str(folder), out, progress=False)
    assert main([str(folder), str(out), "--shard_size", "5M"]) == 2
    said = capsys.readouterr().err
    assert f"OUTPUT {out} was begun with other arguments" in said
    assert "shard_size: begun with 1073741824, now 5242880" in said
    (folder / "cat/00.jpg").rename(folder / "cat/0.jpg")
    assert main([str(folder), str(out)]) == 2 and "source: begun with" in capsys.readouterr().err
    (tmp_path / "used").mkdir()
    (tmp_path / "used/a.tar").write_bytes(b"mine")
    assert main([str(folder), str(tmp_path / "used")]) == 2
    assert "expected an empty folder or one that this command began, found a.tar" in capsys.readouterr().err
    assert (tmp_path / "used/a.tar").read_bytes() == b"mine"


def test_nothing_usable_is_an_error(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jpg").write_bytes(b"")
    assert main([str(tmp_path / "data"), str(tmp_path / "out")]) == 2
    assert "none of the 1 images can be used" in capsys.readouterr().err
    assert "a.jpg: empty file" in (tmp_path / "out/left_out.txt").read_text()
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out2")]) == 2
    assert "SOURCE: no such file or folder" in capsys.readouterr().err


def test_sizes_and_flags():
    assert [size(text) for text in ("1G", "500M", "64K", "123", "2GiB", "1kb")] == [
        1 << 30, 500 << 20, 64 << 10, 123, 2 << 30, 1024,
    ]  # fmt: skip
    for words in (
        ["a", "b", "--shard_size", "x"],
        ["a", "b", "--max_side", "0"],
        ["a", "b", "--quality", "99"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2


def test_what_is_done_is_kept_in_a_readable_file(folder, tmp_path):
    pack(str(folder), tmp_path / "out", shard_size=3000, progress=False)
    state = json.loads((tmp_path / "out/pack.json").read_text())
    assert state["arguments"]["images"] == 12 and state["shards"][-1]["end"] == 12
