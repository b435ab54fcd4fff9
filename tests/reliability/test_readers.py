"""Disks that fail for a moment, for ever, or never answer: the run goes on with the same images, or ends."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.config import CropConfig
from fastdino.data import samples
from fastdino.data.loader import MultiCropLoader
from fastdino.data.manifest import Manifest, build_manifest, printable
from reliability.audit import ROOT
from reliability.promises import NIGHTLY, cases_of, promise

CROPS = CropConfig(global_crops_size=16, local_crops_size=8, local_crops_number=2)
N, BATCH, STEPS = 24, 8, 6
PREAD = samples.pread


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Manifest]:
    """The same images as files and in a shard."""
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(N):
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{i:02}.png")
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        for path in sorted(root.iterdir()):
            file.add(path, path.name)
    return {"files": build_manifest(root), "shard": build_manifest(tmp_path / "photos.tar")}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    samples._handles._open.clear()  # shards of another test may have the same names


def load(manifest: Manifest, **options: object) -> tuple[torch.Tensor, list[int], list[str]]:
    """All crops of some steps, the samples they are of, and the paths of those that were replaced."""
    pixels, ids = [], []
    settings = {"seed": 3, "global_batch": BATCH, "micro_batch": BATCH, "num_threads": 1} | options
    with MultiCropLoader(manifest, CROPS, **settings) as loader:  # type: ignore[arg-type]
        for _ in range(STEPS):
            batch = next(loader)
            assert batch.local is not None
            pixels += [batch.global_.flatten().clone(), batch.local.flatten().clone()]
            ids += batch.ids.tolist()
        return torch.cat(pixels), ids, loader.replaced


def failing(seed: int, fault: Callable[[bytes], bytes], most: int = 2) -> Callable[[int, int, int], bytes]:
    """`samples.pread` that goes wrong up to ``most`` times in a row in a thread, for a third of all reads."""
    rng, lock, mine = np.random.default_rng(seed), threading.Lock(), threading.local()

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        if getattr(mine, "left", 0) == 0:
            with lock:
                mine.left = int(rng.integers(1, most + 1)) + 1 if rng.random() < 1 / 3 else 1
        mine.left -= 1
        content = PREAD(descriptor, length, offset)
        return fault(content) if mine.left else content

    return pread


def raising(number: int) -> Callable[[bytes], bytes]:
    def fault(content: bytes) -> bytes:
        raise OSError(number, os.strerror(number))

    return fault


TRANSIENT = {
    "EIO": raising(errno.EIO),
    "ESTALE": raising(errno.ESTALE),
    "ETIMEDOUT": raising(errno.ETIMEDOUT),
    "EAGAIN": raising(errno.EAGAIN),
    "half of it": lambda content: content[: len(content) // 2],
    "nothing of it": lambda content: b"",
    "a stall": lambda content: (time.sleep(0.05), content)[1],
}


def test_what_passes_changes_nothing(photos: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(photos["files"])
    assert torch.equal(load(photos["shard"])[0], expected[0])
    with promise(19, "reads that fail for a moment: same batches to the bit") as cases:
        for name, fault in TRANSIENT.items():
            for kind, manifest in photos.items():
                for seed in range(cases_of(ci=1, nightly=20)):
                    monkeypatch.setattr(samples, "pread", failing(seed, fault))
                    with cases.case(f"{name} of {kind}, seed {seed}"):
                        found = load(manifest)
                        assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


def broken(path: Path) -> dict[str, Callable[[], object]]:
    """What may become of a file while a run goes on."""

    def again(make: Callable[[], object]) -> Callable[[], object]:
        return lambda: (path.unlink(), make())

    return {
        "vanished": path.unlink,
        "emptied": lambda: path.write_bytes(b""),
        "cut": lambda: os.truncate(path, 100),
        "overwritten": lambda: path.write_bytes(os.urandom(500)),
        "a pipe": again(lambda: os.mkfifo(path)),
        "a folder": again(path.mkdir),
        "a broken link": again(lambda: path.symlink_to("nowhere")),
        "a link to itself": again(lambda: path.symlink_to(path.name)),
        "a link to /dev/zero": again(lambda: path.symlink_to("/dev/zero")),
        "huge": lambda: os.truncate(path, 1 << 40),
    }


@pytest.mark.parametrize("what", list(broken(Path())))
def test_what_stays_broken_is_replaced_by_the_next_image_and_told(
    what: str, photos: dict[str, Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    manifest, victim = photos["files"], 7
    path = Path(manifest.paths[victim])
    expected = load(manifest)
    broken(path)[what]()
    with promise(19, "file that breaks while a run goes on: the next one takes its place") as cases:
        with cases.case(what), caplog.at_level(logging.WARNING, "fastdino"):
            first = load(manifest)
            assert first[2] == [str(path)]
            assert first[1] == [victim + 1 if i == victim else i for i in expected[1]]
            told = [message for message in caplog.messages if printable(str(path)) in message]
            assert told and all(f"{victim + 1:02}.png takes its place" in message for message in told)
        with cases.case(f"{what}, by two processes"):
            halves = [load(manifest, rank=rank, world_size=2, micro_batch=BATCH // 2) for rank in (0, 1)]
            assert sorted(halves[0][1] + halves[1][1]) == sorted(first[1])


def test_a_shard_that_is_replaced_is_not_read_as_the_one_that_was_indexed(
    photos: dict[str, Manifest],
) -> None:
    manifest = photos["shard"]
    path = Path(manifest.root)
    content = path.read_bytes()

    def replaced() -> None:
        path.write_bytes(content[:-512] + bytes(512))
        os.utime(path, (1e9, 1e9))  # two writes may come within one tick of the file system's clock

    with promise(19, "shard replaced or gone while a run goes on: its images are refused by name") as cases:
        for name, change in (
            ("replaced by another", replaced),
            ("cut", lambda: path.write_bytes(content[:3000])),
            ("gone", path.unlink),
        ):
            samples._handles._open.clear()
            change()
            with cases.case(name), pytest.raises(OSError) as caught:
                samples.read(manifest.paths[20])
            with cases.case(f"{name}: the message"):
                assert str(caught.value.strerror)


BLOCKED = """
import os, sys, threading, time
from pathlib import Path
from fastdino.data import samples
from fastdino.data.manifest import build_manifest
from reliability.test_readers import CROPS, MultiCropLoader

reader, writer = os.pipe()
reading = threading.Event()

def pread(*_):  # as of a server that has gone: it never comes back
    reading.set()
    return os.read(reader, 1)

def tell():  # Python itself may drop a KeyboardInterrupt that meets a callback: the main thread waits first
    reading.wait()
    main = threading.main_thread().ident
    while kind == "interrupted" and sys._current_frames()[main].f_code.co_name != "__next__":
        time.sleep(0.01)
    print("reading", flush=True)

samples.pread = pread
kind = sys.argv[2]
threading.Thread(target=tell, daemon=True).start()
manifest = build_manifest(sys.argv[1])
if kind == "prescan":
    from fastdino.data.prescan import prescan
    prescan(manifest, Path(sys.argv[1]).parent / "cache", num_threads=2, progress=False)
else:
    loader = MultiCropLoader(manifest, CROPS, seed=0, global_batch=8, micro_batch=8, num_threads=1,
                             cache_decoded=kind == "cache")
    if kind == "interrupted":
        next(loader)
    reading.wait()
    loader.close()
    print("closed", flush=True)
"""


@pytest.mark.parametrize("kind", ["closed", "interrupted", "prescan", *["cache"] * NIGHTLY])
def test_a_read_that_never_ends_does_not_keep_a_run_from_ending(
    kind: str, photos: dict[str, Manifest], tmp_path: Path
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, photos["files"].root, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    with promise(19, "shutdown while a read never ends") as cases, cases.case(kind):
        try:
            assert child.stdout is not None and child.stdout.readline() == "reading\n"
            begun = time.monotonic()
            if kind in ("prescan", "interrupted"):
                child.send_signal(signal.SIGINT)
            out, errors = child.communicate(timeout=60)
            seconds = time.monotonic() - begun
            assert seconds < 15, f"{seconds:.1f} s"  # 5 s on a machine that has nothing else to do
            if kind in ("prescan", "interrupted"):
                assert "KeyboardInterrupt" in errors
            else:
                assert out == "closed\n" and child.returncode == 0, errors
        finally:
            child.kill()
            child.wait()
