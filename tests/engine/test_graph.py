"""Replayed steps against eager ones: on a GPU with CUDA graphs, elsewhere a replay runs its body."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from fastdino.config import ConfigError
from fastdino.data.loader import Crops
from fastdino.engine import graph
from fastdino.engine.build import build as build_engine
from fastdino.engine.graph import WARM_UP, GraphStep
from fastdino.engine.optim import Updater
from fastdino.engine.step import TrainStep
from fastdino.methods.dino import DINO
from tests.engine.test_step import assert_same, batches, run, tiny_config

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@pytest.fixture
def records(monkeypatch):
    """The bodies that were recorded."""
    bodies = []
    if CUDA:
        recorder = graph.record

        def spy(body, stream):
            bodies.append(body)
            return recorder(body, stream)

        monkeypatch.setattr(graph, "record", spy)
        return bodies

    def pretend(body, stream):
        bodies.append(body)
        return SimpleNamespace(replay=body)  # whatever the first recording closed over is all it will read

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(graph, "record", pretend)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return bodies


def build(kind, config, dtype=torch.float32, **options) -> TrainStep:
    torch.manual_seed(0)
    method = DINO(config).to(DEVICE)
    return kind(method, Updater(method.student, method.teacher, config.optim), dtype=dtype, **options)


def on_device(source):
    for c in source:
        yield Crops(c.global_.to(DEVICE), None if c.local is None else c.local.to(DEVICE), c.ids)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_steps_equal_eager_steps(records, accumulate):
    config = tiny_config()
    eager = build(TrainStep, config, accumulate=accumulate)
    replayed = build(GraphStep, config, accumulate=accumulate)
    want = run(eager, config, on_device(batches()), 14)  # the last layer begins after 5
    got = run(replayed, config, on_device(batches()), 14)
    assert [r.loss for r in got] == pytest.approx([r.loss for r in want], rel=1e-6)
    assert_same(replayed, eager, rtol=1e-6, atol=1e-6)
    assert len(records) == 4  # two graphs for each state of the last layer


def test_a_bad_step_changes_nothing_and_replay_goes_on(records):
    config = tiny_config()
    step = build(GraphStep, config)
    crops = list(itertools.islice(on_device(batches()), 2 * WARM_UP + 8))
    run(step, config, iter(crops), 5)
    run(step, config, iter(crops), WARM_UP + 2, first=5)
    before = {k: v.clone() for k, v in step.method.state_dict().items()}
    bad = Crops(crops[0].global_ * float("inf"), crops[0].local, crops[0].ids)
    assert run(step, config, iter([bad]), 1, first=12)[0].skipped
    assert all(torch.equal(v, before[k]) for k, v in step.method.state_dict().items())
    assert not run(step, config, iter(crops), 1, first=13)[0].skipped
    assert not torch.equal(step.method.center, before["center"])


def test_crops_of_another_shape_are_refused(records):
    config = tiny_config()
    step = build(GraphStep, config)
    run(step, config, on_device(batches()), WARM_UP + 1)
    with pytest.raises(ValueError, match=r"expected crops \[8, 3, 32, 32\], got \[6, 3, 32, 32\]"):
        run(step, config, on_device(batches(size=3)), 1, first=WARM_UP + 1)


@pytest.mark.skipif(CUDA, reason="needs a machine without a GPU")
def test_without_a_gpu_the_flag_is_refused():
    config = tiny_config()
    config.engine.cuda_graph = True
    with pytest.raises(ConfigError, match="--cuda_graph: expected false: this run has no CUDA device"):
        build_engine(config)
