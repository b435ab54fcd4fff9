"""Whatever the images lie in, the batches are the same: order, crops, resuming, sharding, bad input."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.config import CropConfig
from fastdino.data import decoding, runlist, samples
from fastdino.data.loader import Crops, MultiCropLoader, wants_cache
from fastdino.data.manifest import Manifest, build_manifest
from fastdino.data.prescan import decode, header_sizes, prescan

CROPS = CropConfig(global_crops_size=16, local_crops_size=8, local_crops_number=2)
N, BATCH, STEPS = 23, 4, 8  # five steps an epoch, three images left over
SOURCES = ["folder", "list", "tar", "tfrecord", "recordio", "lmdb", "remote"]
CONTAINERS = SOURCES[2:]


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (*rng.integers(12, 40, 2), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [encoded(i, ("JPEG", "PNG", "WEBP")[i % 3]) for i in range(N)]


def store(source: str, folder: Path, images: list[bytes], writers, labels: bool = False) -> str:
    """Write the images as `source` holds them, in two shards; the path to give as --data_path."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [i % 3 for i in range(len(images))] if labels else None
    if source in ("folder", "list"):
        for i, image in enumerate(images):
            (folder / f"{i:04}.jpg").write_bytes(image)
        if source == "folder":
            return str(folder)
        (folder / "list.txt").write_text("".join(f"{i:04}.jpg\n" for i in range(len(images))))
        return str(folder / "list.txt")
    if source == "lmdb":
        writers.lmdb(folder, images, numbers)
        return str(folder)
    kind = "tar" if source == "remote" else source
    half = len(images) // 2
    for i, part in enumerate((slice(None, half), slice(half, None))):
        ending = {"tar": ".tar", "tfrecord": "-00000-of-00002", "recordio": ".rec"}[kind]
        getattr(writers, kind)(folder / f"{i}{ending}", images[part], numbers and numbers[part])
    if source != "remote":
        return str(folder)
    import fsspec

    memory = fsspec.filesystem("memory")
    for i in range(2):
        memory.pipe(f"{folder}/{i}.tar", (folder / f"{i}.tar").read_bytes())
    return f"memory://{folder}/{{0..1}}.tar"


@pytest.fixture(scope="module")
def written(tmp_path_factory, writers) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sources")
    return {source: store(source, root / source, IMAGES, writers) for source in SOURCES}


def load(manifest: Manifest, micro_batches: int, **options) -> list[Crops]:
    options = {"seed": 3, "global_batch": BATCH, "micro_batch": BATCH, "num_threads": 1} | options
    with MultiCropLoader(manifest, CROPS, **options) as loader:
        return [
            Crops(batch.global_.clone(), batch.local.clone(), batch.ids.clone())
            for batch in (next(loader) for _ in range(micro_batches))
        ]


def assert_same(got: list[Crops], expected: list[Crops]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.global_, b.global_) and torch.equal(a.local, b.local)


def per_sample(batches: list[Crops]) -> Iterator[tuple[int, torch.Tensor]]:
    """Each image's id and all its crops, flattened into one row."""
    for batch in batches:
        views = batch.global_.unflatten(0, (2, -1)), batch.local.unflatten(0, (2, -1))  # [V, B, ...] each
        rows = torch.cat([view.transpose(0, 1).flatten(1) for view in views], 1)
        yield from zip(batch.ids.tolist(), rows, strict=True)


@pytest.fixture(scope="module")
def expected(written) -> list[Crops]:
    return load(build_manifest(written["folder"]), STEPS)


# ----------------------------------------------------------------------------------- the same for each source


@pytest.mark.parametrize("source", SOURCES)
def test_the_batches_do_not_depend_on_the_source(written, expected, source):
    manifest = build_manifest(written[source])
    assert_same(load(manifest, STEPS), expected)
    assert_same(load(manifest, STEPS, cache_decoded=True), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_a_loader_started_at_any_step_goes_on_to_the_bit(written, expected, source):
    manifest = build_manifest(written[source])
    for step in (1, 4, 5, 7):
        assert_same(load(manifest, STEPS - step, start_step=step), expected[step:])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("start", [0, 3])
def test_another_number_of_processes_shares_the_same_global_batches(written, expected, source, start):
    manifest = build_manifest(written[source])
    for world, micro in ((2, 2), (4, 1), (2, 1)):
        per_step = BATCH // (world * micro)
        ranks = [
            load(manifest, 3 * per_step, world_size=world, rank=rank, micro_batch=micro, start_step=start)
            for rank in range(world)
        ]
        for step in range(3):
            got = dict(s for rank in ranks for s in per_sample(rank[step * per_step : (step + 1) * per_step]))
            whole = dict(per_sample([expected[start + step]]))
            assert got.keys() == whole.keys()
            assert all(torch.equal(got[sample], whole[sample]) for sample in whole)


@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_visits_each_sample_at_most_once_and_all_but_a_remainder(written, source):
    manifest = build_manifest(written[source])
    steps = N // BATCH
    for world in (1, 2, 4):
        for epoch in range(2):
            seen: list[int] = []
            for rank in range(world):
                for batch in load(
                    manifest,
                    steps,
                    world_size=world,
                    rank=rank,
                    micro_batch=BATCH // world,
                    start_step=epoch * steps,
                ):
                    seen += batch.ids.tolist()
            assert len(seen) == len(set(seen)) == steps * BATCH == N - N % BATCH


@pytest.mark.parametrize("source", SOURCES)
def test_prescan_sizes_decoding_and_cache_work_on_each_source(written, source, tmp_path):
    manifest = build_manifest(written[source])
    sizes = [np.asarray(Image.open(io.BytesIO(image))).shape[:2] for image in IMAGES]
    for _ in range(2):  # afresh, then from the cache
        assert prescan(manifest, tmp_path, num_threads=1, progress=False).sizes.tolist() == [
            *map(list, sizes)
        ]
    assert header_sizes(manifest.paths, 1).tolist() == [*map(list, sizes)]
    assert decode(manifest.paths[1]).shape == (*sizes[1], 3)
    assert wants_cache(manifest, "auto", 1)


def test_a_folder_keeps_its_identity(written):
    """The names, of which a running training keeps a digest."""
    manifest = build_manifest(written["folder"])
    assert runlist.names(manifest) == [f"{i:04}.jpg" for i in range(N)]
    assert runlist.names(build_manifest(written["tar"]))[:2] == ["0.tar/0000.jpg", "0.tar/0001.jpg"]
    assert runlist.names(build_manifest(written["remote"]))[0] == "0.tar/0000.jpg"


@pytest.mark.parametrize(
    ("source", "spellings"),
    [
        ("tar", ("", "/{0..1}.tar", "/*.tar", "/[01].tar", "/../tar/{0,1}.tar")),
        ("lmdb", ("", "/data.mdb")),
        ("tfrecord", ("", "/?-00000-of-00002")),
    ],
)
def test_shards_keep_their_identity_however_they_are_spelled(written, source, spellings):
    names = [runlist.names(build_manifest(written[source] + spelling)) for spelling in spellings]
    assert all(found == names[0] for found in names) and len(names[0]) == N
    assert not any(name.startswith("..") for name in names[0])


# -------------------------------------------------------------------------------------------------- bad input


def bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def corrupted(image: bytes) -> bytes:
    """A JPEG with other bytes in the middle of its data, which decodes to other pixels."""
    content = bytearray(image)
    middle = len(content) * 3 // 4
    content[middle : middle + 8] = bytes(b & 0x7F for b in content[middle : middle + 8])
    return bytes(content)


BAD = {4: IMAGES[4][: len(IMAGES[4]) // 2], 5: b"<html>404</html>", 11: b"", 13: bomb(), 22: IMAGES[22][:20]}
SUBSTITUTES = {4: 6, 5: 6, 11: 12, 13: 14, 22: 0}
DAMAGED = [BAD.get(i, image) for i, image in enumerate(IMAGES)]


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "lmdb"])
@pytest.mark.parametrize("cache_decoded", [False, True])
def test_bad_images_are_replaced_named_and_listed(writers, tmp_path, caplog, expected, source, cache_decoded):
    manifest = build_manifest(store(source, tmp_path / source, DAMAGED, writers))
    listing = tmp_path / "bad_files.txt"
    batches = load(manifest, STEPS, cache_decoded=cache_decoded, bad_files=listing)
    for batch, clean in zip(batches, expected, strict=True):
        assert batch.ids.tolist() == [SUBSTITUTES.get(i, i) for i in clean.ids.tolist()]
        kept = torch.tensor([i not in SUBSTITUTES for i in clean.ids.tolist()]).repeat(2)
        assert torch.equal(batch.global_[kept], clean.global_[kept])
    lines = listing.read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(manifest.paths[i] for i in BAD)
    for sample in BAD:
        assert caplog.text.count(f"{manifest.paths[sample]}: ") == 1
    assert "65000 x 65000 pixels, more than the limit" in caplog.text
    assert_same(load(manifest, STEPS - 3, start_step=3), batches[3:])
    halves = [load(manifest, STEPS, world_size=2, rank=rank, micro_batch=2) for rank in range(2)]
    for step, batch in enumerate(batches):
        together = halves[0][step].ids.tolist() + halves[1][step].ids.tolist()
        assert sorted(together) == sorted(batch.ids.tolist())


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_what_the_header_tells_never_reaches_the_decoder(writers, tmp_path, monkeypatch, source):
    images = [image if i in (5, 11, 13) else IMAGES[i] for i, image in enumerate(DAMAGED)]
    manifest = build_manifest(store(source, tmp_path / source, images, writers))
    given: list[bytes] = []
    real = decoding.ImageSource._encoded

    def encoded(self, index):
        contents = real(self, index)
        given.extend(content.tobytes() for content in contents)
        return contents

    monkeypatch.setattr(decoding.ImageSource, "_encoded", encoded)
    load(manifest, STEPS)
    assert len(given) >= STEPS * BATCH and set(given) <= set(IMAGES)


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "lmdb"])
def test_prescan_leaves_bad_images_out_and_names_shard_and_key(writers, tmp_path, source):
    manifest = build_manifest(store(source, tmp_path / source, DAMAGED, writers))
    good = prescan(manifest, tmp_path / "run", num_threads=1, progress=False)
    assert list(good.paths) == [manifest.paths[i] for i in range(N) if i not in BAD]
    listed = (tmp_path / "run/bad_files.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == [manifest.paths[i] for i in sorted(BAD)]
    if source in CONTAINERS:
        assert all(
            f"{manifest.paths[i].shard.path}/" in line for i, line in zip(sorted(BAD), listed, strict=True)
        )


def test_lmdb_passes_over_what_is_no_image_and_replaces_what_is_damaged(writers, tmp_path):
    manifest = build_manifest(store("lmdb", tmp_path / "lmdb", DAMAGED, writers))
    assert len(manifest) == N - 2
    with MultiCropLoader(manifest, CROPS, seed=0, global_batch=7, micro_batch=7, num_threads=1) as loader:
        for _ in range(3):
            next(loader)
        assert sorted(loader.replaced) == sorted(manifest.paths[i] for i in (4, 11, 20))


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_a_corrupt_image_that_decodes_is_used_by_all_alike(writers, tmp_path, source):
    jpeg = encoded(100)
    images = [corrupted(jpeg) if i == 7 else image for i, image in enumerate(IMAGES)]
    assert images[7] != jpeg
    manifest = build_manifest(store(source, tmp_path / source, images, writers))
    whole = load(manifest, STEPS)
    assert_same(load(manifest, STEPS), whole)
    assert 7 in torch.cat([batch.ids for batch in whole])


@pytest.mark.parametrize("source", SOURCES)
def test_an_io_error_in_the_middle_of_an_epoch(written, expected, monkeypatch, source):
    """Once: tried again, nothing changes. For good: the image is replaced."""
    manifest = build_manifest(written[source])
    victim = expected[2].ids.tolist()[0]
    real, failures = samples._read, []

    def failing(path):
        if path == manifest.paths[victim] and failures:
            if failures[0] == "once":
                failures.clear()
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(samples, "_read", failing)
    failures.append("once")
    assert_same(load(manifest, 4), expected[:4])
    assert not failures
    failures.append("for good")
    batches = load(manifest, STEPS)
    used = [i if i != victim else (victim + 1) % N for batch in expected for i in batch.ids.tolist()]
    assert [i for batch in batches for i in batch.ids.tolist()] == used


@pytest.mark.parametrize("source", ["tar", "tfrecord", "recordio", "remote"])
def test_a_shard_that_vanishes_stops_the_run_with_the_list(writers, tmp_path, monkeypatch, source):
    path = store(source, tmp_path / "data", IMAGES * 5, writers)
    manifest = build_manifest(path)
    listing = tmp_path / "bad_files.txt"
    with MultiCropLoader(
        manifest, CROPS, seed=3, global_batch=BATCH, micro_batch=BATCH, num_threads=1, bad_files=listing
    ) as loader:
        next(loader)
        gone = manifest.paths[0].shard
        if source == "remote":
            import fsspec

            fsspec.filesystem("memory").rm(gone.path.partition("://")[2])
        else:
            os.rename(gone.path, tmp_path / "elsewhere")
        samples._handles.forget(gone)
        with pytest.raises(RuntimeError, match=r"--data_path: 12 of 115 images cannot be read") as caught:
            for _ in range(60):
                next(loader)
    assert str(caught.value).count(gone.path) >= 12 and len(listing.read_text().splitlines()) == 12


# --------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("source", ["folder", "tar", "remote"])
def test_a_run_keeps_its_list_when_some_of_it_is_missing(writers, tmp_path, source, expected):
    found = build_manifest(store(source, tmp_path / source, IMAGES, writers))
    file = tmp_path / "images.json"
    file.write_text(runlist.write(found))
    less = found.subset(np.array([i for i in range(N) if i not in (0, 9)]))
    again = runlist.reconcile(less, file)
    assert runlist.names(again) == runlist.names(found) and len(again) == N
    if source == "folder":  # as if the files were gone
        for i in (0, 9):
            os.remove(found.paths[i])
    batches = load(again, STEPS)
    for batch, clean in zip(batches, expected, strict=True):
        assert batch.ids.tolist() == [{0: 1, 9: 10}.get(i, i) for i in clean.ids.tolist()]


def test_a_shard_that_was_repacked_is_another_data_set(writers, tmp_path):
    path = store("tar", tmp_path / "data", IMAGES, writers)
    file = tmp_path / "images.json"
    file.write_text(runlist.write(build_manifest(path)))
    shutil.rmtree(path)
    more = build_manifest(store("tar", tmp_path / "data", [*IMAGES, encoded(99)], writers))
    assert runlist.reconcile(more, file) is more


# ---------------------------------------------------------------------------------------------------- reading


def test_reading_stays_a_bounded_number_of_batches_ahead(written, monkeypatch):
    asked: list[int] = []
    real = decoding.ReadAhead.take

    def take(self, index):
        asked.append(index)
        assert len(self._pending) <= decoding.READ_AHEAD + 1
        return real(self, index)

    monkeypatch.setattr(decoding.ReadAhead, "take", take)
    manifest = build_manifest(written["tar"])
    with MultiCropLoader(manifest, CROPS, seed=0, global_batch=4, micro_batch=4, prefetch=2) as loader:
        for _ in range(10):
            next(loader)
        assert asked == list(range(len(asked)))
        assert len(asked) <= 10 + 3 + decoding.DALI_AHEAD + 1
