"""bench/esvit.py: its eager side is the loss of the formula, the sides must agree, and memory is counted."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import esvit

TOY = argparse.Namespace(toy=True)


def test_the_eager_side_is_the_formula() -> None:
    p = esvit.problems(TOY)[0]
    x = {name: value.double() for name, value in esvit.esvit_inputs(p).items()}
    total, pairs = 0.0, [(g, v) for g in range(2) for v in range(len(p.regions)) if g != v]

    def cross_entropy(kind: str, y: torch.Tensor, z: torch.Tensor) -> float:
        target = ((y @ x[f"{kind}_target"].T - x[f"{kind}_center"]) / esvit.U).softmax(-1)
        return float(-(target * F.log_softmax(z @ x[f"{kind}_weight"].T / esvit.S, -1)).sum())

    starts = [p.rows * sum(p.regions[:v]) for v in range(len(p.regions))]
    for g, v in pairs:
        n, m = p.regions[v], p.regions[g]
        for b in range(p.rows):
            view = cross_entropy("view", x["view_y"][g * p.rows + b], x["view_z"][v * p.rows + b])
            regions = 0.0
            for i in range(starts[v] + b * n, starts[v] + (b + 1) * n):
                own = x["teacher_features"][starts[g] + b * m : starts[g] + (b + 1) * m]
                best = int(F.cosine_similarity(x["features"][i][None], own).argmax())
                y = x["region_y"][starts[g] + b * m + best]
                regions += cross_entropy("region", y, x["region_z"][i]) / n
            total += (view + regions) / 2 / p.rows / len(pairs)
    assert float(esvit.esvit_eager(p, x)) == pytest.approx(total, rel=1e-9)


def test_toy_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDINO_RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", "bench --toy --save --seconds 0.1".split())
    esvit.main()
    (path,) = tmp_path.glob("*/*.json")
    record = json.loads(path.read_text())
    assert "nan" not in path.read_text().lower()
    found = [(row["op"], row["dtype"], row["provider"]) for row in record["rows"]]
    assert found[:2] == [("esvit", "fp32", "eager"), ("esvit", "fp32", "fastdino")]
    assert {op for op, _, _ in found} == {"esvit", "info_nce"}
    assert any("largest relative difference" in line for line in record["transcript"])


def test_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda p, x: 1.01 * esvit.esvit_fastdino(p, x)  # noqa: E731
    monkeypatch.setitem(esvit.LOSSES, ("esvit", "fastdino"), wrong)
    with pytest.raises(SystemExit, match="the sides disagree, nothing is timed"):
        esvit.gate(esvit.problems(TOY)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_fresh_process() -> None:
    """The eager side stores at least the logits, of 32 MiB here, and their gradients."""
    p = esvit.Problem("info_nce", 128, 65536, bottleneck=16)
    found = {side: esvit.peak(p, side) for side in esvit.SIDES}
    logits = 4 * p.rows * p.columns
    assert found["eager"] > 2 * logits and 0 < found["fastdino"] < logits / 2
    assert esvit.peak(p, "nobody") is None


def test_verdicts() -> None:
    row = {"op": "esvit", "speedup": 3.1, "memory_share": 0.14}
    assert esvit.verdict(row) == ">= 3x, <= 15 %: met"
    assert esvit.verdict(row | {"speedup": 2.9}) == ">= 3x, <= 15 %: missed"
    assert esvit.verdict(row | {"memory_share": 0.16}) == ">= 3x, <= 15 %: missed"
    assert esvit.verdict({"op": "info_nce", "speedup": 1.0, "memory_share": 0.2}) == "<= 20 %: met"
    rows = [
        {**row, "dtype": "fp32", "provider": side, "median_s": 1.0, "min_s": 1.0, "max_s": 1.0}
        | {"added_bytes": 2**20}
        for side in esvit.SIDES
    ]
    first, eager, ours = esvit.table(rows).splitlines()
    assert first.endswith("target") and "met" not in eager and ours.endswith("met")
