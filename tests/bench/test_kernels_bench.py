"""bench/kernels.py: it compares before it times, and what it reports comes from what it saved."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernel_report, kernels
from bench.harness import RESULTS
from bench.kernel_cases import OURS, Case, Setting
from bench.kernel_report import OPERATIONS

SETTING = Setting(torch.device("cpu"), compiles=False)


@pytest.fixture(scope="module")
def roofline() -> kernels.Roofline:
    return kernels.Roofline(quick=True)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_agrees_with_its_rivals(op: str, roofline: kernels.Roofline) -> None:
    case = next(kernels.cases(op, SETTING, quick=True))()
    rows, left_out = kernels.measure(case, roofline, 0.0)
    assert rows[-1]["provider"] == OURS or OURS in [row["provider"] for row in rows]
    assert len(rows) >= 2 and all(line.startswith(("lightly", "Liger", "apex")) for line in left_out)
    for row in rows:
        assert row["op"] == op and 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["roofline"] > 0 and row["extra_bytes"] >= 0 and row["error"] < 0.5
    assert rows[0]["speedup"] == 1.0
    assert OURS in kernels.table(rows)


def simple(wrong: float) -> Case:
    x = torch.ones(1000)
    providers = {"eager": lambda: [x * 2], OURS: lambda: [x * 2 + wrong], "odd": lambda: [x * 3]}
    return Case("dino_loss", dict(K=1, B=1, V=1, dtype=torch.float32), providers, bytes=8000)


def test_wrong_results_are_not_timed(roofline: kernels.Roofline) -> None:
    with pytest.raises(SystemExit, match="nothing is timed"):
        kernels.measure(simple(0.1), roofline, 0.0)
    with pytest.raises(SystemExit, match="nothing is timed"):
        kernels.measure(simple(float("nan")), roofline, 0.0)
    rows, left_out = kernels.measure(simple(0.0), roofline, 0.0)
    assert [row["provider"] for row in rows] == ["eager", OURS] and left_out == ["odd: differs by 5.0e-01"]


def test_rivals_that_fail_are_named(roofline: kernels.Roofline) -> None:
    case = simple(0.0)
    case.providers["odd"] = lambda: [torch.ones(3) + torch.ones(4)]
    case.add("missing", "no_such_library", lambda library: case.providers["eager"])
    _, left_out = kernels.measure(case, roofline, 0.0)
    assert left_out == ["missing: ModuleNotFoundError", "odd: RuntimeError"]


def test_peak_memory() -> None:
    x = torch.ones(1000, 1000)  # 4 MB
    case = replace(simple(0.0), providers={"a": lambda: [x * 2], "b": lambda: [(x * 2).exp().sum(0)]})
    assert kernels.peak_bytes(case, "a") < 10_000
    assert 7_990_000 <= kernels.peak_bytes(case, "b") < 8_100_000
    leaf = torch.ones(1000, 1000, requires_grad=True)
    leaf.grad = torch.ones(1000, 1000)
    case.leaves = (leaf,)
    case.providers["c"] = lambda: [torch.autograd.grad((leaf * 2).sum(), leaf)[0]]
    assert kernels.peak_bytes(case, "c") < 8_100_000 and leaf.grad is None


def row(op: str, provider: str, speedup: float, **more: Any) -> dict[str, Any]:
    times = dict(median_s=1 / speedup, min_s=0.5 / speedup, max_s=2 / speedup)
    ratios = dict(speedup=speedup, speedup_min=speedup - 0.5, speedup_max=speedup + 0.5)
    sizes = dict(K=65536, B=64, V=10, dtype="float32")
    rest = dict(
        roofline=0.5, extra_bytes=2**20, logits_bytes=20 * 2**20, gbytes_per_s=1.0, tflops=0.0, error=0.0
    )
    return {"op": op, **sizes, "provider": provider, **times, **ratios, **rest, **more}


ROWS = [
    row("dino_loss", "official double loop", 1.0),
    row("dino_loss", "torch.compile", 2.0),
    row("dino_loss", OURS, 9.0),
    row("dino_loss", "official double loop", 1.0, K=1024),
    row("dino_loss", OURS, 3.0, K=1024),
    row("prototype_loss", "eager", 1.0, extra_bytes=50 * 2**20),
    row("prototype_loss", "GEMM + dino_loss", 1.5, extra_bytes=40 * 2**20),
    row("prototype_loss", OURS, 2.0, extra_bytes=3 * 2**20),
]


def test_targets() -> None:
    lines = kernels.targets(ROWS, "cpu")
    assert lines[0].startswith("met") and lines[0].endswith("9")
    assert lines[1].startswith("not measured")
    assert lines[2].startswith("MISSED") and lines[2].endswith("0.15")
    updates = [row("AdamWEMA", OURS, 1.5, parameters=44_000_000)]
    assert kernels.targets(updates, "cpu")[1].startswith("MISSED")
    assert kernels.targets([{**updates[0], "parameters": 5}], "cpu")[1].startswith("not measured")
    on_gpu = kernels.targets(ROWS, "cuda")
    assert on_gpu[0].startswith("MISSED") and on_gpu[3].startswith("met") and on_gpu[4].startswith("MISSED")
    assert all(line.startswith("not measured") for line in kernels.targets([], "cuda"))


def results(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / "bench" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = dict(device="a CPU", threads=2, commit="abc", packages=dict(torch="2.13"))
    path.write_text(json.dumps(dict(claim="kernels", machine=machine, transcript=[], rows=rows)))
    return path


def test_readme_holds_what_was_saved_and_nothing_else(tmp_path: Path) -> None:
    readme = tmp_path / "kernels" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"before\n{kernel_report.START}\nold\n{kernel_report.END}\nafter\n")
    kernel_report.write_readme(tmp_path / "bench" / "results", readme)
    assert "**CPU**: not measured." in readme.read_text() and "**GPU**: not measured." in readme.read_text()
    results(
        tmp_path,
        "cpu/2026-01-01-kernels.json",
        [*ROWS[:3], row("info_nce", "a", 1), row("info_nce", OURS, 7.25)],
    )
    results(tmp_path, "cpu/2026-01-02-kernels.json", ROWS)
    results(
        tmp_path, "cpu/2026-01-02-kernels-dino_loss.json", [ROWS[0], ROWS[1], row("dino_loss", OURS, 11.0)]
    )
    kernel_report.write_readme(tmp_path / "bench" / "results", readme)
    text = readme.read_text()
    assert (
        text.startswith("before\n") and text.endswith(f"{kernel_report.END}\nafter\n") and "old" not in text
    )
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
    assert "11.00x (10.50-11.50)" in lines["`dino_loss`"] and "torch.compile: 500" in lines["`dino_loss`"]
    assert "5.50x" in lines["`dino_loss`"] and "7.25x" in lines["`info_nce`"]
    assert "50.0 -> 3.0" in lines["`prototype_loss`"] and "not measured" in lines["`AdamWEMA`"]
    assert len(lines) == len(OPERATIONS) and "**GPU**: not measured." in text
    assert "(../bench/results/cpu/2026-01-02-kernels-dino_loss.json)" in text


def test_the_committed_readme_is_up_to_date() -> None:
    text = kernel_report.README.read_text()
    measured = text.partition(kernel_report.START)[2].partition(kernel_report.END)[0]
    assert measured.strip() == kernel_report.markdown(RESULTS, kernel_report.README.parent).strip()


def test_csv_and_plots(tmp_path: Path) -> None:
    path = tmp_path / "2026-01-01-kernels.json"
    kernels.write_csv(path.with_suffix(".csv"), ROWS)
    with path.with_suffix(".csv").open() as file:
        assert [line["provider"] for line in csv.DictReader(file)] == [r["provider"] for r in ROWS]
    written = kernel_report.plot(path, ROWS)
    assert [p.name for p in written] == [
        "2026-01-01-kernels-dino_loss.png",
        "2026-01-01-kernels-prototype_loss.png",
    ]
    assert all(p.stat().st_size > 10_000 for p in written)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kernels", "--quick", "--op", "centered_softmax"])
    kernels.main()
    out = capsys.readouterr().out
    assert "centered_softmax, K 1024, B 2, float32" in out and "not measured  dino_loss >= 8x" in out
    monkeypatch.setattr("sys.argv", ["kernels", "--quick", "--save"])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "nothing is kept" in capsys.readouterr().err
