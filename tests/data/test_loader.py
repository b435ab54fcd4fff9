"""Batches are a pure function of (seed, step), whatever loads them and whatever goes wrong with a file."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdino_kernels.multicrop import multicrop_reference
from PIL import Image

from fastdino.config import CropConfig
from fastdino.data import loader as module
from fastdino.data.augment import crop_parameters
from fastdino.data.loader import Crops, ImageSource, MultiCropLoader, free_memory, wants_cache
from fastdino.data.manifest import Manifest, build_manifest
from fastdino.data.prescan import decode, prescan
from fastdino.data.sampler import step_ids

CROPS = CropConfig(global_crops_size=16, local_crops_size=8, local_crops_number=2)
N, BATCH = 30, 8  # three steps an epoch, six images left over


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(N):
        height, width = rng.integers(12, 40, 2)
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{i:02}.{('png', 'jpg', 'webp')[i % 3]}")
    return build_manifest(root)


def load(manifest: Manifest, micro_batches: int, crops: CropConfig = CROPS, **options) -> list[Crops]:
    """Copies of the first micro-batches."""
    options = {"seed": 3, "global_batch": BATCH, "micro_batch": BATCH, "num_threads": 2} | options
    with MultiCropLoader(manifest, crops, **options) as loader:
        return [copy(next(loader)) for _ in range(micro_batches)]


def copy(batch: Crops) -> Crops:
    local = None if batch.local is None else batch.local.clone()
    return Crops(batch.global_.clone(), local, batch.ids.clone())


def assert_same(got: list[Crops], expected: list[Crops]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.global_, b.global_)
        assert torch.equal(a.local, b.local)


def per_sample(batches: list[Crops]) -> Iterator[tuple[int, torch.Tensor]]:
    """Each image's id and all its crops, flattened into one row."""
    for batch in batches:
        views = (
            batch.global_.unflatten(0, (2, -1)),
            batch.local.unflatten(0, (-1, len(batch.ids))),
        )  # [V, B, ...]
        rows = torch.cat([v.transpose(0, 1).flatten(1) for v in views], 1)
        yield from zip(batch.ids.tolist(), rows, strict=True)


@pytest.fixture(scope="module")
def uninterrupted(manifest) -> list[Crops]:
    return load(manifest, 10)


# -------------------------------------------------------------------------------------- what the batches hold


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_crops_are_those_of_the_official_augmentation(manifest, dtype):
    batches = load(manifest, 5, dtype=dtype)
    for step, batch in enumerate(batches):
        ids = step_ids(3, step, N, BATCH)
        images = [np.asarray(Image.open(manifest.paths[i]).convert("RGB")) for i in ids]
        params = crop_parameters(3, step // 3, ids, np.array([image.shape[:2] for image in images]), CROPS)
        expected = [torch.empty(BATCH, 3, size, size, dtype=dtype) for size in (16, 16, 8, 8)]
        multicrop_reference(images, params, out=expected)
        assert batch.ids.tolist() == ids.tolist() and batch.ids.dtype == torch.int64
        assert torch.equal(batch.global_, torch.cat(expected[:2]))
        assert torch.equal(batch.local, torch.cat(expected[2:]))
        assert batch.global_.dtype == dtype


def test_without_local_crops(manifest, uninterrupted):
    (batch,) = load(manifest, 1, CropConfig(global_crops_size=16, local_crops_number=0))
    assert batch.local is None
    assert torch.equal(batch.global_, uninterrupted[0].global_)


@pytest.mark.parametrize(
    "options",
    [
        {"num_threads": 1},
        {"num_threads": 3, "prefetch": 5},
        {"prefetch": 1},
        {"cache_decoded": True},
        {"cache_decoded": False},
    ],
)
def test_threads_prefetching_and_cache_change_nothing(manifest, uninterrupted, options):
    assert_same(load(manifest, 10, **options), uninterrupted)


@pytest.mark.parametrize("cache_decoded", [True, False])
@pytest.mark.parametrize("start", [1, 3, 7])
def test_a_resumed_run_goes_on_to_the_bit(manifest, uninterrupted, start, cache_decoded):
    assert_same(
        load(manifest, 10 - start, start_step=start, cache_decoded=cache_decoded), uninterrupted[start:]
    )


@pytest.mark.parametrize("cache_decoded", [True, False])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_processes_and_accumulation_share_out_the_same_samples(
    manifest, uninterrupted, world_size, micro_batch, cache_decoded
):
    accum = BATCH // (world_size * micro_batch)
    parts = [
        load(
            manifest,
            4 * accum,
            world_size=world_size,
            rank=rank,
            micro_batch=micro_batch,
            cache_decoded=cache_decoded,
        )
        for rank in range(world_size)
    ]
    for step in range(4):
        expected = dict(per_sample(uninterrupted[step : step + 1]))
        got = dict(entry for part in parts for entry in per_sample(part[step * accum : (step + 1) * accum]))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[sample], expected[sample]) for sample in expected)


def test_seeds_and_epochs_give_other_crops(manifest):
    batches = load(manifest, 6)
    first, second = dict(per_sample(batches[:3])), dict(per_sample(batches[3:]))
    other = dict(per_sample(load(manifest, 3, seed=4)))
    for crops in (second, other):
        assert len(first.keys() & crops.keys()) >= 18  # each epoch leaves out 6 of 30
        assert all(not torch.equal(first[sample], crops[sample]) for sample in first.keys() & crops.keys())


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("cache_decoded", [True, False])
def test_a_batch_stays_valid_until_the_next_but_prefetch_one(manifest, prefetch, cache_decoded):
    with MultiCropLoader(
        manifest, CROPS, seed=0, global_batch=4, micro_batch=4, prefetch=prefetch, cache_decoded=cache_decoded
    ) as loader:
        alive: list[tuple[Crops, Crops]] = []
        for _ in range(12):
            batch = next(loader)
            alive = [*alive, (batch, copy(batch))][-(prefetch + 1) :]
            time.sleep(0.02)  # time to overwrite what may be
            assert_same([a for a, _ in alive], [b for _, b in alive])


def test_steps_per_epoch(manifest):
    with MultiCropLoader(manifest, CROPS, seed=0, global_batch=8, micro_batch=8) as loader:
        assert loader.steps_per_epoch == 3 and iter(loader) is loader


def test_names_of_any_bytes(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\n \xe9.png"
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", name)
    (batch,) = load(build_manifest(tmp_path), 1, global_batch=1, micro_batch=1, cache_decoded=False)
    assert torch.isfinite(batch.global_).all()


# ---------------------------------------------------------------------------------- files that cannot be read


@pytest.fixture
def damaged(manifest, tmp_path) -> Manifest:
    """The same images, of which number 4, 5 (neighbours), 11 (empty) and 29 (the last) are unreadable."""
    paths = []
    for i, path in enumerate(manifest.paths):
        content = Path(path).read_bytes()
        content = {4: content[: len(content) // 2], 5: b"GIF89a", 11: b"", 29: content[:40]}.get(i, content)
        paths.append(str(tmp_path / os.path.basename(path)))
        Path(paths[-1]).write_bytes(content)
    return Manifest(paths, None, [], str(tmp_path))


SUBSTITUTES = {4: 6, 5: 6, 11: 12, 29: 0}


@pytest.mark.parametrize("cache_decoded", [True, False])
def test_an_unreadable_file_is_replaced_by_the_next_readable_one(
    manifest, damaged, uninterrupted, caplog, cache_decoded
):
    batches = load(damaged, 10, cache_decoded=cache_decoded)
    for batch, clean in zip(batches, uninterrupted, strict=True):
        assert batch.ids.tolist() == [SUBSTITUTES.get(i, i) for i in clean.ids.tolist()]
        kept = torch.tensor([i not in SUBSTITUTES for i in clean.ids.tolist()])
        assert torch.equal(batch.global_[kept.repeat(2)], clean.global_[kept.repeat(2)])
        assert torch.equal(batch.local[kept.repeat(2)], clean.local[kept.repeat(2)])
    for sample, substitute in SUBSTITUTES.items():
        said = [
            r.getMessage()
            for r in caplog.records
            if r.levelno == logging.WARNING and r.getMessage().startswith(damaged.paths[sample])
        ]
        assert len(said) == 1 and said[0].endswith(f"{damaged.paths[substitute]} takes its place")


@pytest.mark.parametrize(
    "options", [{"cache_decoded": True}, {"num_threads": 1, "prefetch": 1}, {"prefetch": 4}]
)
def test_replacing_is_reproducible(damaged, options):
    expected = load(damaged, 10, cache_decoded=False)
    assert_same(load(damaged, 10, **options), expected)
    assert_same(load(damaged, 6, start_step=4, **options), expected[4:])


def test_all_processes_take_the_same_number_of_steps(damaged):
    whole = [sorted(batch.ids.tolist()) for batch in load(damaged, 6, cache_decoded=False)]
    parts = [
        load(damaged, 6, world_size=2, rank=rank, micro_batch=4, cache_decoded=False) for rank in range(2)
    ]
    assert [sorted(a.ids.tolist() + b.ids.tolist()) for a, b in zip(*parts, strict=True)] == whole


def test_replaced_lists_the_files(damaged):
    with MultiCropLoader(
        damaged, CROPS, seed=3, global_batch=BATCH, micro_batch=BATCH, cache_decoded=True
    ) as loader:
        next(loader)
        assert sorted(loader.replaced) == [damaged.paths[i] for i in sorted(SUBSTITUTES)]


def test_a_file_removed_during_training_is_replaced(manifest, damaged):
    images = {i: Path(path).read_bytes() for i, path in enumerate(manifest.paths)}
    for path, content in zip(damaged.paths, images.values(), strict=True):
        Path(path).write_bytes(content)
    with MultiCropLoader(
        damaged, CROPS, seed=3, global_batch=BATCH, micro_batch=BATCH, cache_decoded=False, prefetch=1
    ) as loader:
        first = copy(next(loader))
        victim = first.ids.tolist()[0]
        os.remove(damaged.paths[victim])
        ids = [next(loader).ids.tolist() for _ in range(12)]
        assert loader.replaced == [damaged.paths[victim]]
    assert victim not in sum(ids[8:], []) and (victim + 1) % N in sum(ids, [])


def test_too_many_unreadable_files_stop_the_run(damaged, tmp_path):
    for path in damaged.paths[10:]:
        Path(path).write_bytes(b"")
    listing = tmp_path / "bad_files.txt"
    with pytest.raises(RuntimeError, match="--data_path: 11 of 30 images cannot be read, too many") as caught:
        load(damaged, 10, cache_decoded=False, bad_files=listing)
    listed = listing.read_text().splitlines()
    assert len(listed) == 11 and all(f"\n  {entry}" in str(caught.value) for entry in listed)
    assert f"all listed in {listing}" in str(caught.value)
    with pytest.raises(RuntimeError, match="11 of 30 images cannot be read"):
        load(damaged, 10, cache_decoded=False, bad_files=listing)
    assert listing.read_text().splitlines() == listed  # each once
    for path in damaged.paths:
        Path(path).write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=r"of 30 images cannot be read, too many to replace:\n.*: empty file"
    ):
        load(damaged, 10, cache_decoded=True)


def test_of_many_unreadable_files_twenty_are_named_and_all_are_listed(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(300):
        (data / f"{i:03}.jpg").write_bytes(b"")
    listing = tmp_path / "bad_files.txt"
    with pytest.raises(RuntimeError, match="31 of 300 images cannot be read") as caught:
        load(build_manifest(data), 1, bad_files=listing)
    assert str(caught.value).count("empty file") == 20 and str(caught.value).endswith("\n  ...")
    assert len(set(listing.read_text().splitlines())) == 31


def test_a_failure_of_dali_on_readable_files_is_raised_with_their_names(manifest, monkeypatch):
    """After one more try: it may have been a passing fault."""
    builds = []

    class Broken:
        def run(self):
            raise RuntimeError("out of something")

    def build(self, first):
        builds.append(first)
        return Broken()

    monkeypatch.setattr(ImageSource, "_build", build)
    with pytest.raises(RuntimeError, match="DALI fails on readable files: .*png") as caught:
        load(manifest, 1, cache_decoded=False)
    assert builds == [0, 0] and "out of something" in str(caught.value.__cause__)


# ------------------------------------------------------------------------------------------ background thread


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastdino-data"]


def test_an_error_in_the_background_is_raised_with_its_traceback(manifest, monkeypatch):
    calls = []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("in the background")

    monkeypatch.setattr(module, "multicrop", fail)
    with MultiCropLoader(manifest, CROPS, seed=0, global_batch=4, micro_batch=4) as loader:
        next(loader), next(loader)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="in the background") as caught:
                next(loader)
            assert "_fill" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not data_threads()


def test_close_joins_the_thread_and_ends_the_iteration(manifest):
    loader = MultiCropLoader(manifest, CROPS, seed=0, global_batch=4, micro_batch=4)
    assert len(data_threads()) == 1
    next(loader)
    loader.close()
    loader.close()
    assert not data_threads()
    with pytest.raises(RuntimeError, match="after close"):
        next(loader)


@pytest.mark.parametrize("cache_decoded", [True, False])
def test_after_close_nothing_of_dali_is_left_to_a_forked_child(manifest, cache_decoded):
    """Such as a worker of torch's DataLoader: taken apart there, a pipeline hangs or crashes."""
    gc.collect()
    gc.disable()  # until the child does it
    try:
        load(manifest, 1, cache_decoded=cache_decoded)
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
    finally:
        gc.enable()
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert ended[1] == 0


def test_close_before_the_first_batch(manifest):
    for _ in range(5):
        MultiCropLoader(manifest, CROPS, seed=0, global_batch=4, micro_batch=4).close()
    assert not data_threads()


def test_a_forgotten_loader_stops_its_thread(manifest):
    loader = MultiCropLoader(manifest, CROPS, seed=0, global_batch=4, micro_batch=4)
    next(loader)
    del loader
    gc.collect()
    assert not data_threads()


def test_the_producer_stays_a_bounded_number_of_batches_ahead(manifest, monkeypatch):
    made = []
    monkeypatch.setattr(module, "multicrop", lambda images, params, **options: made.append(1))
    with MultiCropLoader(manifest, CROPS, seed=0, global_batch=4, micro_batch=4, prefetch=2) as loader:
        for _ in range(20):
            next(loader)
        deadline = time.monotonic() + 60
        while len(made) < 22 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert 22 <= len(made) <= 26


# ---------------------------------------------------------------------------------------- sizes and the cache


def test_sizes_that_do_not_fit_are_refused(manifest):
    with pytest.raises(
        ValueError, match="--data_path: 30 usable images, expected at least one global batch of 31"
    ):
        load(manifest, 1, global_batch=31, micro_batch=31)
    with pytest.raises(
        ValueError,
        match="--batch_size: expected a multiple of 2 processes x 3 images per forward pass, got 8",
    ):
        load(manifest, 1, world_size=2, micro_batch=3)
    with pytest.raises(ValueError, match="prefetch: expected at least 1, got 0"):
        load(manifest, 1, prefetch=0)
    assert not data_threads()


def test_missing_dali_is_an_error_that_says_what_to_install(manifest, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(
        ImportError, match=r"NVIDIA DALI .* not installed: pip install 'fastdino\[dali-cu13\]'"
    ):
        load(manifest, 1)


def test_the_cache_is_taken_when_the_images_fit(manifest, tmp_path, monkeypatch):
    needed = sum(3 * np.prod(Image.open(path).size) for path in manifest.paths)
    scanned = prescan(manifest, tmp_path, progress=False)
    for known in (manifest, scanned):
        monkeypatch.setattr(module, "free_memory", lambda: 4 * needed)
        assert (
            wants_cache(known, "auto", 1) and wants_cache(known, "on", 1) and not wants_cache(known, "off", 1)
        )
        monkeypatch.setattr(module, "free_memory", lambda: 4 * needed - 4)
        assert not wants_cache(known, "auto", 1) and wants_cache(known, "on", 1)
        monkeypatch.setattr(module, "free_memory", lambda: needed - 1)
        with pytest.raises(ValueError, match="--cache_decoded on: the decoded images take at least"):
            wants_cache(known, "on", 1)
    monkeypatch.setattr(module, "free_memory", lambda: 8 * needed)
    monkeypatch.setattr(module, "CACHE_LIMIT", needed - 1)
    assert not wants_cache(scanned, "auto", 1)
    monkeypatch.setattr(module, "CACHE_LIMIT", needed)
    assert wants_cache(scanned, "auto", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert not wants_cache(scanned, "auto", 1)


def test_the_memory_that_counts_is_that_of_the_gpu_that_finishes(manifest, monkeypatch):
    gpu, free = torch.device("cuda", 1), {}
    needed = sum(decode(path).nbytes for path in manifest.paths)
    monkeypatch.setattr(module, "free_memory", lambda: pytest.fail("asked for the host's memory"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 1 << 40))
    free[gpu] = 4 * needed
    assert wants_cache(manifest, "auto", 1, gpu) and not wants_cache(manifest, "off", 1, gpu)
    free[gpu] = 4 * needed - 4
    assert not wants_cache(manifest, "auto", 1, gpu) and wants_cache(manifest, "on", 1, gpu)
    free[gpu] = needed - 1
    with pytest.raises(ValueError, match="--cache_decoded on: .* expected at most the free .* of cuda:1"):
        wants_cache(manifest, "on", 1, gpu)


def test_a_large_data_set_is_not_opened_to_decide(manifest, monkeypatch):
    monkeypatch.setattr(module, "header_sizes", lambda *args: pytest.fail("opened the files"))
    monkeypatch.setattr(module, "CACHE_LIMIT", 5000)
    assert not wants_cache(manifest, "auto", 1)


def test_the_memory_of_the_cache_is_said(manifest, caplog):
    with caplog.at_level(logging.INFO, "fastdino.data.decoding"):
        load(manifest, 1, cache_decoded=True)
    assert "30 images decoded into 0 MiB of memory" in caplog.text


def test_free_memory_is_that_of_the_machine():
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory() <= physical
