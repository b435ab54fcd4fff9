"""bench/step.py, the waterfall: every row is there, measured or not, and computes the same as the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import step
from bench.machine import best
from bench.providers import Problem, Provider


def test_rows_without_hardware_say_why() -> None:
    rows = step.waterfall(gpu=False, compiles=False, official=False)
    assert rows["official"] == "no --official PATH"
    assert rows["+ CUDA graph"] == "no GPU" and rows["+ torch.compile"] == "no GPU, no --compile"
    rows = step.waterfall(gpu=True, compiles=True, official=True)
    assert all(
        isinstance(row, Provider)
        for name, row in rows.items()
        if name not in ("+ autocast", "+ memory kept", "+ 16-bit weights")
    )


def test_every_row_of_one_type_computes_the_same() -> None:
    toy = Problem(3, 2, toy=True)
    crops = toy.crops()
    losses = {}
    for name, row in step.waterfall(gpu=False, compiles=False, official=False).items():
        if isinstance(row, Provider) and row.dtype == "fp32":
            made = row.start(toy, None)
            losses[name] = [made(crops) for _ in range(3)]
    assert len(losses) >= 5
    for found in losses.values():
        assert found == pytest.approx(losses["eager"], rel=1e-4)


def test_toy_waterfall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDINO_RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", "bench --toy --save --local 2 --batch 3 --seconds 0.1".split())
    step.main()
    (path,) = tmp_path.glob("*/*.json")
    assert "nan" not in path.read_text().lower()
    rows = {row["row"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == list(step.waterfall(False, False, False))
    measured = [row for row in rows.values() if "median_s" in row]
    assert rows["eager"]["speedup"] == rows["eager"]["over_previous"] == 1.0 and len(measured) >= 5
    assert rows["+ AdamWEMA"]["dtype"] == "fp32"
    if best() != "fp32":
        assert rows["+ 16-bit weights"]["dtype"] == best()
    for row in measured:
        assert 0 < row["min_s"] <= row["median_s"] and row["speedup"] > 0 and row["peak_bytes"] > 0


def test_claims() -> None:
    base = {"row": "official", "median_s": 3.2, "speedup": 1.0, "peak_bytes": 100}
    ours = {"row": "ours", "median_s": 1.0, "speedup": 3.2, "peak_bytes": 61}
    lines = step.targets([base, ours, {"row": "graph", "not_measured": "no GPU"}])
    assert lines[0].startswith("met") and "3.20" in lines[0] and lines[1].startswith("MISSED")
    lines = step.targets([{"row": "official", "not_measured": "no --official PATH"}, ours])
    assert all(line.startswith("not measured") for line in lines)
