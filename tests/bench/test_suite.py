"""bench/gpu_suite.sh on the CPU at toy size: every part runs, every result names all sides and holds
numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.machine import best
from bench.providers import standard
from bench.results_table import short
from bench.step import waterfall

ROOT = Path(__file__).parents[2]


def suite(out: Path, *flags: str, **extra: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTDINO_")}
    return subprocess.run(
        ["bash", str(ROOT / "bench/gpu_suite.sh"), *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean | {"OUT": str(out), "PYTHON": sys.executable, **extra},
    )


def test_toy_suite(tmp_path: Path, quick_python: str) -> None:
    done = suite(tmp_path, "--toy", FASTDINO_COMMIT="abc", PYTHON=quick_python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "suite.log").read_text().strip() in done.stdout
    found = {}
    for path in tmp_path.glob("*/*.json"):
        text = path.read_text()
        assert "nan" not in text.lower(), path
        record = json.loads(text)
        found[record["claim"]] = record["rows"]
        assert record["machine"]["commit"] and record["machine"]["packages"]["torch"]
        assert all(
            row["min_s"] <= row["median_s"] <= row["max_s"] for row in record["rows"] if "median_s" in row
        )
    assert {row["provider"] for row in found["table8"]} == set(standard(None))
    assert {row["provider"] for row in found["table1"]} >= {"eager", "fastdino"}
    assert [row["row"] for row in found["step"]] == list(waterfall(False, False, False))
    for name in ("machine", "tests", "kernels", "table8", "table1", "waterfall"):
        assert any(line.split()[:1] == [name] and line.endswith("ok") for line in done.stdout.splitlines()), (
            name
        )
    assert f"fastdino {best()}" in short(tmp_path) and short(tmp_path) in done.stdout


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    done = suite(tmp_path, "--toy", PYTHON=shutil.which("false") or "false")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for name in ("machine", "table8", "waterfall"):
        assert any(line.startswith(name) and line.endswith("failed with exit code 1") for line in lines), name


def test_no_time_left(tmp_path: Path) -> None:
    done = suite(tmp_path, "--toy", FASTDINO_SUITE_SECONDS="4")
    assert done.returncode == 0 and done.stdout.count("not run: no time left") >= 5


def test_usage(tmp_path: Path) -> None:
    done = suite(tmp_path, "--help")
    assert done.returncode == 2 and "FASTDINO_SUITE_SECONDS" in done.stdout and not list(tmp_path.iterdir())
