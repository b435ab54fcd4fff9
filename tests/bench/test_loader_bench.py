"""bench/loader.py: whether the loader holds a step back."""

from __future__ import annotations

import argparse

import pytest

from bench.harness import Transcript
from bench.loader import step_demand, verdict


def test_verdict() -> None:
    fast = verdict("ours", 900.0, 100.0, local=8)
    assert fast == "ours: 9000 crops/s; the step takes 1000 crops/s. Bottleneck: no, it is 9.0 times as fast"
    assert verdict("ours", 50.0, 100.0, local=0).endswith(
        "100 crops/s; the step takes 200 crops/s. Bottleneck: YES, it gives 50% of that"
    )


@pytest.mark.parametrize("batch", [2, 3])
def test_demand_is_that_of_our_step(batch: int) -> None:
    say = Transcript()
    args = argparse.Namespace(step_batch=batch, arch="vit_small", toy=True)
    assert step_demand(2, args, say) > 0
    (line,) = say.lines
    assert f"batch {batch}" in line and "fastdino" in line
