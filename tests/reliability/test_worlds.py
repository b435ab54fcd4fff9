"""The number of processes changes neither what a step sees nor, but for rounding, what it learns; threads and
batches ahead change no bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import partial

import fastdino_kernels
import numpy as np
import pytest
import torch
from fastdino_kernels.multicrop import multicrop

from fastdino.config import CropConfig
from fastdino.data.augment import crop_parameters
from fastdino.data.loader import MultiCropLoader, Schedule
from fastdino.data.manifest import build_manifest
from fastdino.engine import checkpoint
from reliability import toy
from reliability.promises import cases_of, promise

N, BATCH, SEED, STEPS = 500, 24, 3, 45  # 20 steps per epoch


def digest(*arrays: np.ndarray) -> str:
    h = hashlib.sha256()
    for array in arrays:
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()


def seen(step: int, world: int, micro: int, start: int, sizes: np.ndarray) -> str:
    """Hash of a step's samples and crop parameters in their global order, put together from what the
    processes of a run that began at ``start`` compute.
    """
    crops = CropConfig(local_crops_number=3)
    parts = BATCH // (world * micro)
    ids, params = np.empty(BATCH, np.int64), np.empty((BATCH, 5, 16), np.float32)
    for rank in range(world):
        schedule = Schedule(N, SEED, BATCH, micro, rank, world, start)
        own = range((step - start) * parts, (step - start + 1) * parts)
        assert {schedule.step(index) for index in own} == {step}
        mine = [schedule.ids(index) for index in own]
        ids[rank::world] = np.concatenate(mine)
        params[rank::world] = np.concatenate(
            [
                crop_parameters(SEED, schedule.epoch(i), x, sizes[x], crops)
                for i, x in zip(own, mine, strict=True)
            ]
        )
    return digest(ids, params)


def test_any_sequence_of_worlds_sees_the_same_samples_and_crops(tmp_path):
    sizes = np.random.default_rng(0).integers(50, 500, (N, 2))
    worlds = {world: [BATCH // world // parts for parts in (1, 3)] for world in (1, 2, 4, 8)}
    expected = [seen(step, 1, BATCH, 0, sizes) for step in range(STEPS)]
    assert len(set(expected)) == STEPS
    with promise(7, "random plans of processes: samples and crop parameters of every step") as cases:
        for plan in range(cases_of(ci=20, nightly=200)):
            draw, start, name = toy.seeded("worlds", plan), 0, []
            found: list[str] = []
            while start < STEPS:
                world = draw.choice(sorted(worlds))
                micro, stop = draw.choice(worlds[world]), min(STEPS, start + draw.randint(1, 30))
                found += [seen(step, world, micro, start, sizes) for step in range(start, stop)]
                name.append(f"{world}x{micro} from {start}")
                start = stop
            with cases.case(", ".join(name)):
                assert found == expected


def noting(rank: int, notes) -> None:
    toy.note_batches(notes.with_name(f"{notes.name}.{rank}"))


def relative_difference(one, two) -> float:
    """||a - b|| / ||b|| over all tensors, but for the keys' bias, whose gradient is rounding noise."""
    names = [name for name in one if not name.endswith("qkv.bias")]
    a, b = (torch.cat([x[name].double().flatten() for name in names]) for x in (one, two))
    return float((a - b).norm() / b.norm())


def test_a_run_on_one_two_four_and_one_processes(images, tmp_path):
    flags = ("--batch_size", "16", "--drop_path_rate", "0", "--batch_size_per_gpu")
    toy.train(images, tmp_path / "whole", *flags, "16", hook=partial(noting, notes=tmp_path / "whole.ids"))
    whole = [json.loads(line) for line in (tmp_path / "whole.ids.0").read_text().splitlines()]
    out, start = tmp_path / "elastic", 0
    with promise(7, "gloo: 1 -> 2 -> 4 -> 1 processes with a fixed global batch") as cases:
        for piece, (world, stop) in enumerate(((1, 2), (2, 5), (4, 8), (1, 12))):
            with cases.case(f"{world} processes, steps {start} to {stop}"):
                notes, size = tmp_path / f"ids{piece}", ("--max_steps", str(stop))
                toy.train(
                    images,
                    out,
                    *flags,
                    str(16 // world),
                    *size,
                    processes=world,
                    hook=partial(noting, notes=notes),
                )
                ranks = [notes.with_name(f"{notes.name}.{r}").read_text().splitlines() for r in range(world)]
                assert {len(lines) for lines in ranks} == {stop - start}
                for step, parts in enumerate(zip(*ranks, strict=True), start):
                    ids = np.empty(16, np.int64)
                    for rank, part in enumerate(parts):
                        ids[rank::world] = json.loads(part)
                    assert ids.tolist() == whole[step]
            start = stop
        with cases.case("weights"):
            (a, _, _), (b, _, _) = (
                checkpoint.load(checkpoint.latest(x / "checkpoints")) for x in (out, tmp_path / "whole")
            )
            difference = relative_difference(a, b)
            print(f"relative difference of the weights: {difference:.2e}")
            assert difference < 1e-6
        with cases.case("3 processes refused at the start"):
            job = toy.start(images, tmp_path / "three", *flags, "4", processes=3)
            assert job.wait() == [2, 2, 2] and "--batch_size" in job.text and "Traceback" not in job.text
            assert not (tmp_path / "three" / "checkpoints").exists()


def test_loader_threads_batches_ahead_and_the_cache_change_no_byte(images):
    manifest = build_manifest(str(images))
    crops = CropConfig(local_crops_number=2, global_crops_size=32, local_crops_size=16)

    def batches(threads: int, prefetch: int, cached: bool) -> str:
        loader = MultiCropLoader(
            manifest, crops, seed=1, global_batch=16, micro_batch=8, num_threads=threads, prefetch=prefetch,
            cache_decoded=cached,
        )  # fmt: skip
        with loader:
            found = [(c.global_.numpy(), c.local.numpy(), c.ids) for c in itertools.islice(loader, 1)]
            h = [digest(*arrays) for arrays in found]
            h += [digest(c.global_.numpy(), c.local.numpy(), c.ids) for c in itertools.islice(loader, 15)]
        return " ".join(h)

    expected = batches(1, 1, False)
    with promise(8, "loader threads x batches ahead x cache, identical bytes") as cases:
        for threads, prefetch, cached in itertools.product((1, 2, 4), (1, 2, 4), (False, True)):
            if cases_of(ci=1, nightly=2) == 1 and prefetch == 2 and threads != 2:
                continue
            with cases.case(f"{threads} threads, {prefetch} ahead, cached {cached}"):
                assert batches(threads, prefetch, cached) == expected


def kernels(threads: int) -> dict[str, str]:
    """Hashes of what the CPU kernels of training compute. Matrix products are left out: they are torch's, and
    from three threads on other bits.
    """
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    out = {}
    logits = rand(48, 517).requires_grad_()
    result = fastdino_kernels.dino_loss(logits, rand(16, 517), rand(517), student_temp=0.1, teacher_temp=0.04)
    result.loss.backward()
    out["dino loss"] = digest(result.loss.detach().numpy(), logits.grad.numpy())
    p = [torch.nn.Parameter(rand(257, 65)), torch.nn.Parameter(rand(70_001))]
    t = [x.detach().clone() for x in p]
    optimizer = fastdino_kernels.AdamWEMA(p, lr=1e-3, teacher_params=t, max_grad_norm=0.5)
    for _ in range(3):
        for x in p:
            x.grad = rand(*x.shape)
        optimizer.step(momentum=0.99)
    out["adamw and ema"] = digest(*(x.detach().numpy() for x in (*p, *t)))
    out["sinkhorn"] = digest(fastdino_kernels.sinkhorn_knopp(rand(64, 515), temp=0.05, n_iters=3).numpy())
    images = [np.random.default_rng(i).integers(0, 256, (50 + i, 61, 3), np.uint8) for i in range(9)]
    crops = CropConfig(local_crops_number=2, global_crops_size=32, local_crops_size=16)
    sizes = np.array([x.shape[:2] for x in images])
    params = crop_parameters(0, 0, np.arange(9), sizes, crops)
    views = [torch.empty(9, 3, s, s) for s in (32, 32, 16, 16)]
    multicrop(images, params, out=views, num_threads=threads)
    out["multicrop"] = digest(*(x.numpy() for x in views))
    return out


def test_kernels_give_the_same_bits_for_one_to_four_threads():
    before = torch.get_num_threads()
    try:
        expected = kernels(1)
        with promise(8, "CPU kernels, 1 to 4 threads, bitwise") as cases:
            for threads in (1, 2, 3, 4):
                found = kernels(threads)
                for name, value in expected.items():
                    with cases.case(f"{name}, {threads} threads"):
                        assert found[name] == value
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("world", [5, 7])
def test_a_world_that_does_not_divide_the_batch_has_no_schedule(world, images):
    manifest = build_manifest(str(images))
    with pytest.raises(ValueError, match="--batch_size: expected a multiple"):
        MultiCropLoader(manifest, CropConfig(), seed=0, global_batch=48, micro_batch=1, world_size=world)
