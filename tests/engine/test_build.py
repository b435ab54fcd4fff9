"""The step as the trainer builds it, with every speed option, against the paper's loop; all combinations of
flags; the whole of a sharded engine's state.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from fastdino.config import Config, ConfigError, validate, with_flags
from fastdino.engine.build import Engine, build
from fastdino.engine.parallel import World
from fastdino.engine.schedules import Schedule
from fastdino.models.batch_norm import SyncBatchNorm
from fastdino.models.vit import VisionTransformer
from tests.engine.test_step import B, assert_same, batches, paper_loop, tiny_config, without_key_bias

CPU = torch.device("cpu")


def configured(**flags) -> Config:
    return with_flags(tiny_config(), {"device": "cpu", "freeze_last_layer": 1} | flags)


def train(engine: Engine, config: Config, steps: int, source=None) -> list[float]:
    schedule, source = Schedule(config, 5, B), source or batches()
    return [engine.step.run(source, schedule(s)).loss for s in range(steps)]


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile stops before it writes C++: the graphs are the same, and hours shorter."""
    compile_blocks = VisionTransformer.compile_blocks
    monkeypatch.setattr(VisionTransformer, "compile_blocks", lambda vit: compile_blocks(vit, "aot_eager"))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_twenty_fast_steps_equal_the_papers_loop(attention, checkpointing, traced_only):
    config = configured(
        attention=attention, activation_checkpointing=checkpointing, compile="on", precision="fp32"
    )
    engine, oracle = build(config), build(configured(precision="fp32", compile="off"))
    losses = train(engine, config, 20)
    expected = paper_loop(oracle.method, config, batches(), 20, 5)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same(engine.step, oracle.step, rtol=1e-5, atol=1e-5)


def gradients(engine: Engine, dtype: torch.dtype, plain: bool) -> dict[str, torch.Tensor]:
    """Of the first step, by our step or by plain operations under autocast."""
    method, crops = engine.method, next(batches())
    for p in method.student.parameters():
        p.grad = None
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        if plain:
            loss = plain_loss(method, crops)
        else:
            loss = method(crops.global_, crops.local, teacher_temp=0.04, freeze_last_layer=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in method.student.named_parameters() if p.grad is not None}
    return {n: without_key_bias(n, g) for n, g in found.items()}


def plain_loss(method, crops) -> torch.Tensor:
    from bench.eager_step import vit_features

    def logits(model, images):
        v = model.head.last_layer.weight_v
        z = torch.nn.functional.normalize(model.head.mlp(vit_features(model.backbone, images)), dim=-1)
        return torch.nn.functional.linear(z, v / v.norm(dim=1, keepdim=True)).float()

    views = [*crops.global_.chunk(2), *crops.local.chunk(3)]
    with torch.no_grad():
        targets = [(logits(method.teacher, x) / 0.04).softmax(-1) for x in views[:2]]
    outputs = [(logits(method.student, x) / 0.1).log_softmax(-1) for x in views]
    pairs = [(i, j) for i in range(2) for j in range(len(views)) if i != j]
    return sum(-(targets[i] * outputs[j]).sum(-1).mean() for i, j in pairs) / len(pairs)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_bf16_gradients_are_as_exact_as_plain_autocast(checkpointing):
    config = configured(precision="bf16", activation_checkpointing=checkpointing)
    config.model.embed_dim, config.model.out_dim = 64, 256
    engine = build(config)
    exact = gradients(engine, torch.float32, plain=True)
    eager = gradients(engine, torch.bfloat16, plain=True)
    fast = gradients(engine, torch.bfloat16, plain=False)
    error = {
        name: [
            math.sqrt(sum(float((g[n] - exact[n]).square().sum()) for n in exact if n.startswith(name)))
            for g in (eager, fast)
        ]
        for name in ("backbone", "head.mlp", "head.last_layer")
    }
    assert all(fast <= 2 * eager for eager, fast in error.values()), error
    assert all(eager > 0 for eager, _ in error.values())


FLAGS = {
    "attention": ["auto", "sdpa", "xformers", "varlen", "math"],
    "compile": ["auto", "on", "off"],
    "cuda_graph": [False, True],
    "activation_checkpointing": ["none", "selective", "full"],
    "precision": ["fp32", "bf16", "fp16"],
}
REFUSED_ON_CPU = [("attention", "xformers"), ("attention", "varlen"), ("cuda_graph", True)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "lamb"])
def test_every_combination_of_flags_trains_or_is_refused(optimizer, traced_only):
    trained = 0
    for values in itertools.product(*FLAGS.values()):
        flags = dict(zip(FLAGS, values, strict=True))
        if flags["compile"] == "on":
            if optimizer != "adamw" or flags["precision"] != "bf16" or flags["attention"] in ("sdpa", "math"):
                continue  # the optimizer is outside of what is compiled; the rest compiled is tested above
            torch._dynamo.reset()  # one process compiles for one model
        refused = [name for name, value in REFUSED_ON_CPU if flags[name] == value]
        config = configured(optimizer=optimizer, drop_path_rate=0.2, **flags)
        config.model.depth = 1 if flags["compile"] == "on" else 2
        if refused:
            with pytest.raises(ConfigError) as error:
                build(config)
            assert error.value.flag in refused, flags
            continue
        engine = build(config)
        engine.step.scaler.load_state({"scale": 4.0, "good_steps": 0})  # 2^16 is too much for these layers
        before = copy.deepcopy(engine.method.student.state_dict())
        assert all(map(math.isfinite, train(engine, config, 2))), flags
        after = engine.method.student.state_dict()
        assert any(not torch.equal(before[n], after[n]) for n in before), flags
        trained += 1
    assert trained >= 18


@pytest.mark.parametrize(
    ("flags", "blamed"),
    [
        ({"mesh": "shards"}, "mesh"),
        ({"mesh": "2x2"}, "mesh"),
        ({"mesh": "shard", "optimizer": "lars"}, "optimizer"),
        ({"mesh": "1x2", "optimizer": "lamb"}, "optimizer"),
        ({"mesh": "shard", "use_bn_in_head": True}, "use_bn_in_head"),
        ({"mesh": "shard", "bottleneck_dim": 0}, "bottleneck_dim"),
        ({"mesh": "2x1", "cuda_graph": True}, "cuda_graph"),
    ],
)
def test_what_two_processes_cannot_do_is_refused(flags, blamed):
    with pytest.raises(ConfigError) as error:
        validate(configured(**flags), 2)
    assert error.value.flag == blamed


def test_several_processes_share_the_statistics_of_batch_norm():
    engine = build(configured(use_bn_in_head=True), World(0, 2, CPU))
    norms = [m for m in engine.method.modules() if isinstance(m, torch.nn.BatchNorm1d | SyncBatchNorm)]
    assert len(norms) == 4 and all(isinstance(m, SyncBatchNorm) for m in norms)
    assert not engine.step.may_abandon
    assert {id(p) for m in norms for p in m.parameters()} <= set(map(id, engine.method.parameters()))


def test_copies_follow_the_weights():
    config = configured(precision="bf16")
    engine = build(config)
    copies = engine.updater.copies
    assert len(copies) > 10
    train(engine, config, 7)
    assert all(torch.equal(c, p.bfloat16()) for p, c in copies.items())
    other = build(configured(precision="bf16", seed=1))
    other.load_state(engine.state())
    assert all(torch.equal(c, p.bfloat16()) for p, c in other.updater.copies.items())
    assert train(other, config, 1) == train(engine, config, 1)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    engine = build(configured())
    state = {k: v.clone() for k, v in engine.state().items()}
    wrong = {**state, "center": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"model state center: expected \(48,\), got \(3,\)"):
        engine.load_state(wrong)
    del wrong["center"]
    with pytest.raises(ValueError, match=r"model state center: expected \(48,\), got none"):
        engine.load_state(wrong)
    assert all(torch.equal(v, engine.state()[k]) for k, v in state.items())


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_kept() -> None:
    """A tensor as large as the one before it touches no page for the first time."""
    code = """
import resource, torch
from fastdino.engine.build import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(); usual = faults()
keep_freed_memory()
faults(); print(usual, faults())
"""
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    usual, kept = map(int, done.stdout.split())
    assert usual > 16000 and kept < 1000
