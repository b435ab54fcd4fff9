"""Two processes: sums of gradients in overlapping buckets against one process, and a stop on one of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastdino.data.loader import Crops
from fastdino.engine import parallel
from fastdino.engine.optim import Updater
from fastdino.engine.schedules import Schedule
from fastdino.engine.step import TrainStep
from fastdino.methods.dino import DINO
from runs import spawn
from tests.engine.test_step import B, assert_same, batches, digest, run, tiny_config

STEPS = 8  # the last layer begins after 5


def build(config, accumulate: int = 1) -> TrainStep:
    torch.manual_seed(0)
    method = DINO(config)
    updater = Updater(method.student, method.teacher, config.optim)
    reducer = parallel.GradientBuckets(updater.parameters) if dist.is_initialized() else None
    return TrainStep(method, updater, dtype=torch.float32, accumulate=accumulate, reducer=reducer)


def part(crops: Crops, rank: int, size: int) -> Crops:
    """Every size-th image, in all its views."""
    cut = lambda x: x.view(-1, size * B, *x.shape[1:])[:, rank::size].flatten(0, 1)  # noqa: E731
    return Crops(cut(crops.global_), cut(crops.local), crops.ids[rank::size])


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    parallel._BUCKET = 2000  # many buckets
    config = tiny_config()
    step = build(config)
    source = (part(crops, rank, size) for crops in batches(1, size=size * B))
    losses = [step.run(source, Schedule(config, 5, size * B)(s)).loss for s in range(STEPS)]
    assert len(step.reducer.buckets) > 5
    torch.save((losses, step.method.state_dict(), digest(step)), f"{folder}/{rank}.pt")

    for asked in range(7):  # the second process stops at one of five questions, or not at all
        step = build(config, accumulate=2)
        hyper = Schedule(config, 5, 2 * B)(6)
        before = digest(step)
        calls = itertools.count()
        result = step.run(batches(), hyper, stop=lambda n=asked, c=calls: rank == 1 and next(c) >= n)
        assert result.stop == (asked < 5), (rank, asked)
        assert (digest(step) == before) == result.stop
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(tmp_path: Path):
    spawn(worker, (2, str(tmp_path)), 2)
    (losses, state, digest0), (losses1, _, digest1) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert losses == losses1 and digest0 == digest1
    config = tiny_config()
    whole = build(config)
    schedule = Schedule(config, 5, 2 * B)
    source = batches(1, size=2 * B)
    assert losses == pytest.approx([whole.run(source, schedule(s)).loss for s in range(STEPS)], rel=1e-5)
    other = build(config)
    other.method.load_state_dict(state)
    assert_same(other, whole, rtol=1e-4, atol=2e-5)


def test_a_single_process_needs_no_reducer():
    assert build(tiny_config()).reducer is None and run(build(tiny_config()), tiny_config(), batches(), 1)
