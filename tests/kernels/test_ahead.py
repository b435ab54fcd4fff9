"""Ahead-of-time compilation of every described launch, in a process without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastdino_kernels
import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = Path(fastdino_kernels.__file__).parent / "gpu"
SHARED = {70: 96 * 1024, 80: 160 * 1024, 90: 224 * 1024}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.roofline", "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=ROOT,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert done.returncode == bool(found["problems"]), done.stderr
    return found


def test_no_problem_is_found(report: dict[str, Any]) -> None:
    assert report["problems"] == []


def test_nothing_spills_and_shared_memory_fits(report: dict[str, Any]) -> None:
    assert report["launches"]
    for row in report["launches"]:
        where = f"{row['name']} for {row['gpu']}"
        assert row["spilled"] == 0, where
        assert 0 < row["registers"] <= 255 and row["shared"] <= SHARED[row["capability"]], where
        assert row["programs_per_sm"] >= 1 and 0 < row["occupancy"] <= 1, where
        assert row["grid"] > 0 and row["bytes"] > 0 and row["floor_us"] > 0, where


def test_every_file_with_launches_is_there_for_every_gpu(report: dict[str, Any]) -> None:
    files = {path.stem for path in GPU.glob("*.py") if "def launches()" in path.read_text()}
    assert files and files == {row["module"] for row in report["launches"]}
    for stem in files:
        assert {row["capability"] for row in report["launches"] if row["module"] == stem} >= {80, 90}


def test_v100_needs_no_matrix_products_of_triton(report: dict[str, Any]) -> None:
    assert all(row["flops"] == 0 for row in report["launches"] if row["capability"] == 70)
