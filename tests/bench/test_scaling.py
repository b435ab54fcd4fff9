"""bench/scaling.py: the model's arithmetic, and a measurement with two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import scaling
from bench.providers import Problem

CONFIG = Problem(64, 10).config({})
STUDENT = 21_665_664 + 22_352_128  # ViT-S/16; its head, the gains of the last layer included
GAINS, PROTOTYPES = 65536, 65536 * 256


def test_volumes() -> None:
    gradients = 4 * (STUDENT - GAINS)
    weights = 2 * (2 * STUDENT + 2 * PROTOTYPES)
    assert scaling.volume(CONFIG, "replicate", 8, 1).total == pytest.approx(2 * gradients * 7 / 8)
    assert scaling.volume(CONFIG, "shard", 8, 8).total == pytest.approx((gradients + weights) * 7 / 8)
    mixed = scaling.volume(CONFIG, "2x8", 16, 8)
    assert mixed.inside == pytest.approx((gradients + weights) * 7 / 8)
    assert mixed.between == pytest.approx(2 * gradients / 8 / 2)
    for mesh in ("replicate", "shard"):
        assert scaling.volume(CONFIG, mesh, 1, 1).total == 0
    assert scaling.volume(CONFIG, "1x8", 8, 8).total == scaling.volume(CONFIG, "shard", 8, 8).total


def test_time_is_that_of_the_slowest_link() -> None:
    cluster = scaling.Cluster("", 2, 8, inside=100e9, outside=10e9, peak=1e12)
    assert scaling.Volume(everywhere=1e9).seconds(cluster) == pytest.approx(0.1)
    assert scaling.Volume(inside=1e9).seconds(cluster) == pytest.approx(0.01)
    assert scaling.Volume(inside=4e9, between=1e8).seconds(cluster) == pytest.approx(
        0.08
    )  # 8 rings, one network
    alone = scaling.Cluster("", 1, 8, inside=100e9, outside=10e9, peak=1e12)
    assert scaling.Volume(everywhere=1e9).seconds(alone) == pytest.approx(0.01)


def test_overlap_that_is_needed() -> None:
    rows = scaling.model_rows(Problem(64, 8), step_ms=100.0, mfu=0.35)
    for row in rows:
        exposed = (1 - row["overlap_needed"]) * row["communication_s"]
        assert 0.1 / (0.1 + exposed) >= scaling.KEPT - 1e-9
        if row["overlap_needed"] > 0:
            assert 0.1 / (0.1 + exposed) == pytest.approx(scaling.KEPT)
    assert {row["mesh"] for row in rows} == {"replicate", "shard", "2x8", "8x8"}
    # two nodes of eight V100 behind 100 Gb/s: about 27 ms for 176 MB of gradients
    paper = next(row for row in rows if row["cluster"].startswith("2 x 8") and row["mesh"] == "replicate")
    assert paper["communication_s"] == pytest.approx(2 * 4 * (STUDENT - GAINS) * 15 / 16 / 12.5e9)
    assert all(line.startswith("model ") for line in scaling.model_table(rows).splitlines())
    computed = scaling.model_rows(Problem(64, 8), step_ms=None, mfu=0.35)
    assert computed[0]["step_s"] == pytest.approx(113.4e9 * 64 / 0.35 / 125e12, rel=1e-3)


def test_two_processes() -> None:
    for mesh in ("replicate", "shard"):
        times = scaling.run(Problem(2, 2, toy=True), 2, mesh, 0.2)
        assert len(times) >= 3 and min(times) > 0


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDINO_RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", "bench --toy --save --batch 4 --processes 1 2 --mesh replicate".split())
    asked = []

    def run(case: Problem, processes: int, mesh: str, seconds: float, threads: int) -> list[float]:
        asked.append((case.batch, processes))
        return [0.1, 0.2, 0.1] if processes == 1 else [0.125] * 3

    monkeypatch.setattr(scaling, "run", run)
    scaling.main()
    (path,) = tmp_path.glob("*/*.json")
    rows = json.loads(path.read_text())["measured"]
    assert asked == [(4, 1), (4, 2), (2, 2)]
    assert [row["efficiency"] for row in rows] == pytest.approx([1.0, 0.8, 0.4])
