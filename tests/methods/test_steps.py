"""Every method and switch through the engine's step: bad steps, saved states, micro-batches, two processes,
and no wait for the device.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fastdino.data.loader import Crops
from fastdino.engine import graph
from fastdino.engine.build import Engine, build
from fastdino.engine.graph import GraphStep
from fastdino.engine.optim import Updater
from fastdino.engine.parallel import World
from fastdino.engine.schedules import Schedule
from fastdino.engine.step import Scaler, TrainStep
from fastdino.methods import build_method
from runs import spawn
from tests.engine.test_parallel import part
from tests.engine.test_step import HOST_READS, B, Reads, batches, digest
from tests.methods.oracles import SIBLINGS, SWITCHES, configured, crops

ALL = SIBLINGS | SWITCHES
CPU = torch.device("cpu")


def trained(engine: Engine, config, steps: range, source=None) -> list[float]:
    """Four steps per epoch."""
    schedule, seen = Schedule(config, 4, B), []
    for s in steps:
        seen.append(engine.step.run(source or batches(s), schedule(s)).loss)
    return seen


@pytest.mark.parametrize("name", ALL)
def test_a_bad_step_changes_no_byte_and_a_saved_state_continues_bitwise(name):
    config = configured(**ALL[name])
    engine = build(config)
    trained(engine, config, range(5))
    before = digest(engine.step)
    bad = crops(9)
    bad.local[1, 0, 3, 3] = float("inf")
    assert engine.step.run(iter([bad]), Schedule(config, 4, B)(5)).skipped
    assert digest(engine.step) == before

    other = build(configured(**ALL[name], seed=5))
    other.load_state({k: v.clone() for k, v in engine.state().items()})
    other.updater.load_state({k: v.clone() for k, v in engine.updater.state().items()})
    assert digest(other.step) == before
    assert trained(engine, config, range(5, 9)) == trained(other, config, range(5, 9))
    assert digest(engine.step) == digest(other.step) != before


@pytest.mark.parametrize("name", ["infonce", "mocov2", "swav-queue"])
def test_micro_batches_enter_the_queue_in_order(name):
    flags = ALL[name] | {"queue_length": 64, "batch_size": 2 * B, "batch_size_per_gpu": B}
    config = configured(**flags)
    engine = build(config, accumulate=2)
    queue, added = engine.method.queue, []
    add = queue.add
    queue.add = lambda rows: (added.append(rows.clone()), add(rows))
    source = iter(list(itertools.islice(batches(3), 6)))
    for s in range(3):
        assert not engine.step.run(source, Schedule(config, 4, 2 * B)(s)).skipped
    assert len(added) == 6
    rows = torch.cat(added)
    assert torch.equal(queue.columns[:, : len(rows)].T, rows)
    assert queue.ptr == len(rows) % 64


def test_a_step_that_was_abandoned_leaves_nothing_for_the_next():
    config = configured(**SIBLINGS["mocov2"])
    engine = build(config, accumulate=2)
    source = batches()
    trained(engine, config, range(2), source)
    before = digest(engine.step)
    for asked in range(5):
        calls = itertools.count()
        stop = lambda n=asked, c=calls: next(c) >= n  # noqa: E731
        assert engine.step.run(source, Schedule(config, 4, B)(2), stop=stop).stop
        assert digest(engine.step) == before and engine.method.queue.pending == []


TOGETHER = ["byol", "mocov2", "swav-queue", "sinkhorn", "infonce", "prev_iter", "predictor"]
SHARDED = ["copy", "copy-sinkhorn", "prev_epoch"]


def micro_batches(name: str) -> int:
    """Of a step."""
    return 2 if name == "infonce" else 1


def together(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    results = {}
    for name in TOGETHER + SHARDED:
        config = configured(**ALL[name], lr=0.005)
        config.engine.mesh = "shard" if name in SHARDED else "replicate"
        engine = build(config, World(rank, size, CPU), accumulate=micro_batches(name))
        added: list[torch.Tensor] = []
        queue = getattr(engine.method, "queue", None)
        if queue is not None:
            add = queue.add
            queue.add = lambda rows, add=add, added=added: (added.append(rows.clone()), add(rows))
        assert not (engine.method.communicates and engine.step.may_abandon)
        source = (part(c, rank, size) for c in batches(1, size=size * B))
        losses = trained(engine, config, range(6), source)
        if queue is not None:
            everyone: list = [None] * size
            dist.all_gather_object(everyone, added)
            rows = torch.cat([rows for micro_batch in zip(*everyone, strict=True) for rows in micro_batch])
            width = queue.columns.shape[1]
            expected = {i % width: row for i, row in enumerate(rows)}
            for place, row in expected.items():
                assert torch.equal(queue.columns[:, place], row), (name, place)
        results[name] = (losses, None if name in SHARDED else digest(engine.step))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    del engine, queue  # sharded models hold groups, which are not to outlive the interpreter
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_share_queues_statistics_and_targets(tmp_path: Path):
    spawn(together, (2, str(tmp_path)), 2)
    one, two = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert one == two
    for name in TOGETHER + SHARDED:
        config = configured(**ALL[name], lr=0.005)
        whole = build(config, accumulate=micro_batches(name))
        losses = trained(whole, config, range(6), batches(1, size=2 * B))
        assert one[name][0] == pytest.approx(losses, rel=2e-3), name


SMALLEST = {"depth": 1, "embed_dim": 8, "num_heads": 1, "head_hidden_dim": 8, "out_dim": 16}


@pytest.mark.parametrize("name", ["mocov2", "swav-queue", "sinkhorn", "mse", "esvit"])
def test_no_step_waits_for_the_device(name, triton_device, monkeypatch):
    config = configured(**ALL[name] | SMALLEST | ({"teacher": "prev_iter"} if name == "mse" else {}))
    torch.manual_seed(0)
    method = build_method(config).to(triton_device)
    updater = Updater(method.student, method.teacher, config.optim, lagging=name == "mse")
    step = TrainStep(method, updater, dtype=torch.bfloat16, scaler=Scaler(triton_device, True, 1024.0))
    schedule = Schedule(config, 4, B)
    source = (Crops(c.global_.to(triton_device), c.local.to(triton_device), c.ids) for c in batches())
    source = iter(list(itertools.islice(source, 3)))
    step.enqueue(source, schedule(4))  # states and tables are made in the first steps
    step.enqueue(source, schedule(5))
    list(step.ring.take(every=True))
    with Reads() as reads, monkeypatch.context() as patch:
        for read in HOST_READS:  # also inside operators, where the mode does not look
            patch.setattr(torch.Tensor, read, lambda x, n=read: reads.found.append(n))
        if triton_device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            step.enqueue(source, schedule(6))
        finally:
            if triton_device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert reads.found == []
    assert not list(step.ring.take(every=True))[-1].skipped


RECORDED = [name for name, flags in ALL.items() if "queue_length" not in flags]


@pytest.mark.parametrize("name", RECORDED)
def test_replayed_steps_equal_eager_steps(name, monkeypatch):
    """Without a GPU a replay runs the first recording's body again, with whatever that closed over."""
    if torch.cuda.is_available():
        pytest.skip("tests/engine/test_graph.py records on a GPU")
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(graph, "record", lambda body, stream: SimpleNamespace(replay=body))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    config, results = configured(**ALL[name]), []
    for kind in (TrainStep, GraphStep):
        torch.manual_seed(0)
        method = build_method(config)
        updater = Updater(method.student, method.teacher, config.optim, lagging=name == "prev_iter")
        step = kind(method, updater, dtype=torch.float32, accumulate=2)
        schedule, source = Schedule(config, 5, 2 * B), batches()
        results.append([step.run(source, schedule(s)).loss for s in range(12)])
    assert results[1] == pytest.approx(results[0], rel=1e-6)
