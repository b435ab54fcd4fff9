"""NaN and infinity, wherever they come from, on whichever process: the step is skipped everywhere and changes
no byte; a run in which they do not cease stops with its last good state.
"""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdino.engine import checkpoint, parallel
from fastdino.engine.build import build
from fastdino.engine.schedules import Hyper
from fastdino.engine.step import TrainStep
from fastdino.methods.method import LossOutput
from reliability import toy
from reliability.promises import NIGHTLY, promise
from tests.engine.test_step import batches, digest

SITES = ("pixels", "activation", "loss", "gradient", "center", "teacher", "moment")
VALUES = (math.nan, math.inf, -math.inf) if NIGHTLY else (math.nan, math.inf)


def broken(step: TrainStep, site: str, value: float, crops):
    """Break one thing of this process; the way back."""
    method = step.method
    hook, place = None, None
    if site == "pixels":
        crops.global_[0, 1, 3, 3] = value
    elif site == "activation":
        hook = method.student.backbone.register_forward_hook(lambda m, a, out: out * value)
    elif site == "loss":
        hook = method.register_forward_hook(
            lambda m, a, out: LossOutput(out.loss * value, out.statistics, out.signs)
        )
    elif site == "gradient":
        hook = method.student.backbone.norm.weight.register_hook(lambda g: g * value)
    elif site == "center":
        place = method.center
    elif site == "teacher":
        place = method.teacher.backbone.blocks[0].mlp.fc1.weight
    else:
        state = step.updater.optimizer.state[step.updater.rows[method.student.backbone.cls_token]]
        place = state["exp_avg_sq"]
    if place is not None:
        before = place.flatten()[0].item()
        with torch.no_grad():
            place.view(-1)[0] = value

    def mend() -> None:
        if hook is not None:
            hook.remove()
        if place is not None:
            with torch.no_grad():
                place.view(-1)[0] = before

    return mend


def every_site(rank: int, results: Path) -> None:
    outcomes = []
    for precision in ("fp32", "bf16"):
        step = build(
            toy.config(precision=precision), parallel.World(rank, parallel.size(), torch.device("cpu"))
        ).step
        source = batches(rank)
        hyper = Hyper(lr=0.001, weight_decay=0.04, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)
        for _ in range(3):
            assert not step.run(source, hyper).skipped
        for site, victim, value in itertools.product(SITES, range(parallel.size()), VALUES):
            crops = next(source)
            mend = broken(step, site, value, crops) if rank == victim else (lambda: None)
            step.updater.refresh_copies()
            before = digest(step)
            skipped = [step.run(iter([crops]), hyper).skipped for _ in range(3)]
            unchanged = digest(step) == before
            mend()
            step.updater.refresh_copies()
            after = step.run(source, hyper)
            name = f"{site} {value} on rank {victim} in {precision}"
            outcomes.append((name, all(skipped), unchanged, not after.skipped and math.isfinite(after.loss)))
    results.with_name(f"{rank}.json").write_text(json.dumps(outcomes))


def test_a_value_that_is_not_finite_is_skipped_by_all_processes_at_every_site(tmp_path):
    toy.together(every_site, 2, tmp_path, tmp_path / "results")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    with promise(14, "NaN or infinity at 7 sites, 2 ranks, fp32 and bf16: skipped, no byte changed") as cases:
        for both in zip(*ranks, strict=True):
            with cases.case(both[0][0]):
                for _, skipped, unchanged, recovered in both:
                    assert skipped and unchanged and recovered, (skipped, unchanged, recovered)
    assert len(ranks[0]) == 2 * 2 * 7 * len(VALUES)


def nan_from(rank: int, first: int, victim: int) -> None:
    """From step ``first`` on an activation of rank ``victim`` is NaN."""
    forward, calls = nn.LayerNorm.forward, itertools.count()
    begin = TrainStep.begin
    step = {"now": -1}

    def counted(self: TrainStep, frozen: bool) -> None:
        step["now"] = next(calls)
        begin(self, frozen)

    def poisoned(self, x):
        return forward(self, x) * (math.nan if rank == victim and step["now"] >= first else 1.0)

    TrainStep.begin, nn.LayerNorm.forward = counted, poisoned


@pytest.mark.parametrize("victim", [0, 1])
def test_endless_nan_stops_all_processes_with_the_last_good_state(images, tmp_path, victim):
    with promise(14, "3 bad steps in a row stop the run with its last good state") as cases:
        with cases.case(f"rank {victim}"):
            toy.train(images, tmp_path / "good", "--max_steps", "5", processes=2)
            out, hook = tmp_path / "bad", partial(nan_from, first=5, victim=victim)
            job = toy.train(images, out, "--max_bad_steps", "3", processes=2, code=1, hook=hook)
            assert "--max_bad_steps: 3 bad steps in a row" in job.text
            (good, moments, _), (kept, kept_moments, meta) = (
                checkpoint.load(checkpoint.latest(folder / "checkpoints"))
                for folder in (tmp_path / "good", out)
            )
            assert meta["counters"]["bad_steps"] == 3
            for one, two in ((good, kept), (moments, kept_moments)):
                assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
