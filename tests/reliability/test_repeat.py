"""A step computed twice gives the same bits; a flipped bit of a gradient ends the run before it is used."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastdino.config import ConfigError, config_from_flags
from fastdino.engine import exits, parallel
from fastdino.engine.build import build
from fastdino.engine.repeat import UnequalError
from fastdino.engine.schedules import Hyper
from fastdino.engine.step import TrainStep
from reliability import toy
from reliability.promises import cases_of, promise
from tests.engine.test_step import batches, digest

HYPER = Hyper(lr=0.01, weight_decay=0.1, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
KINDS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "accumulated": {},
    "batch norm": {"use_bn_in_head": "true"},
    "sinkhorn": {"teacher_op": "sinkhorn"},
    "queue": {"method": "mocov2", "queue_length": "32", "hidden_mlp": "16", "feat_dim": "8"},
    "queue of prototypes": {"method": "swav", "queue_length": "16", "epoch_queue_starts": "0"},
}


def engine(accumulate: int = 1, **changed: str) -> TrainStep:
    return build(toy.config(**changed), parallel.World(0, 1, torch.device("cpu")), accumulate=accumulate).step


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_computed_twice_is_the_step(kind):
    """Compared with itself, and what comes of it with a step computed once."""
    with promise(16, f"steps computed twice are equal, and those of a run without: {kind}") as cases:
        accumulate = 2 if kind == "accumulated" else 1
        once, twice = (engine(accumulate, **KINDS[kind]) for _ in range(2))
        twice.twice = True
        sources = batches(), batches()
        for number in range(cases_of(ci=2, nightly=40)):
            with cases.case(f"step {number}"):
                for step, source in zip((once, twice), sources, strict=True):
                    torch.manual_seed(number)
                    assert math.isfinite(step.run(source, HYPER).loss)
                assert digest(once) == digest(twice)


def flip_once(step: TrainStep, draw, *, in_pass: int):
    """One bit of one gradient, in the first or the second pass; the way back."""
    parameter = draw.choice(step.updater.parameters)
    calls = iter(range(10))

    def flip(gradient: torch.Tensor) -> torch.Tensor:
        if next(calls) != in_pass:
            return gradient
        gradient = gradient.clone()
        bits = gradient.view(-1).view(torch.int32)
        bits[draw.randrange(bits.numel())] ^= draw.choice([1 << n for n in range(31)] + [-(1 << 31)])
        return gradient

    return parameter.register_hook(flip)


def test_every_flipped_bit_is_found_before_the_weights_change():
    wanted = cases_of(ci=20, nightly=1000)
    step, source, draw = engine(), batches(), toy.seeded("flips")
    step.run(source, HYPER)
    step.twice = True
    with promise(16, "one bit of one gradient flipped") as cases:
        before = digest(step)
        for number in range(wanted):
            with cases.case(f"flip {number}"):
                hook = flip_once(step, draw, in_pass=number % 2)
                try:
                    with pytest.raises(UnequalError, match="different numbers: 1 of"):
                        step.run(source, HYPER)
                finally:
                    hook.remove()
                assert digest(step) == before


def flips_at(step_number: int, victim: int, rank: int) -> None:
    """On one rank a bit flips in the second pass of a step."""
    enqueue, begun = TrainStep.enqueue, []

    def flipped(self: TrainStep, *arguments) -> None:
        begun.append(1)
        wrong = rank == victim and len(begun) == step_number
        hook = flip_once(self, toy.seeded("run"), in_pass=1) if wrong else None
        enqueue(self, *arguments)
        if hook is not None:
            hook.remove()

    TrainStep.enqueue = flipped  # type: ignore[method-assign]


def test_a_wrong_rank_is_named_and_the_run_continues(images, tmp_path):
    flags = ("--save_every", "3", "--verify_every", "2", "--hang_timeout", "10")
    toy.train(images, tmp_path / "whole", "--save_every", "3", processes=2)
    with promise(16, "a flipped bit on one of two ranks: named, and continued bitwise") as cases:
        out = tmp_path / "run"
        with cases.case("found"):
            job = toy.start(images, out, *flags, processes=2, hook=partial(flips_at, 8, 1))
            assert job.wait()[1] == exits.UNEQUAL, job.text
            assert "step 8, rank 1: two equal computations gave different numbers" in job.text
            assert toy.newest(out) == 6
        with cases.case("not found in a step that is computed once"):
            job = toy.start(images, tmp_path / "other", *flags, processes=2, hook=partial(flips_at, 7, 1))
            assert job.wait() == [0, 0], job.text
        with cases.case("continued"):
            toy.train(images, out, *flags, processes=2)
            assert toy.state_hash(out) == toy.state_hash(tmp_path / "whole")


def test_a_gpu_is_not_promised_to_repeat():
    config = config_from_flags(
        data_path="x", output_dir="y", verify_every=5, attention="math", precision="fp32"
    )
    with pytest.raises(ConfigError, match="verify_every"):
        build(config, parallel.World(0, 1, torch.device("cuda")))
