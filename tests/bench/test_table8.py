"""bench/table8.py and what it shares with the other benchmarks of whole steps: `bench.providers`, the
official code as a rival, peaks of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness, official, providers, table8
from bench.providers import HYPER, Problem, Process, Provider, gate, standard

CHECKOUT = os.environ.get("FASTDINO_OFFICIAL")


def result(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> tuple[dict[str, Any], str]:
    """What a command saves, and the text of that file."""
    monkeypatch.setenv("FASTDINO_RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench", "--toy", "--save", *flags])
    module.main()
    (path,) = tmp_path.glob("*/*.json")
    return json.loads(path.read_text()), path.read_text()


@pytest.mark.parametrize(
    "arch, patch_size, gflop",
    [
        ("vit_small", 16, (73.7, 83.6, 103.5, 123.4)),
        ("vit_small", 8, (358.6, 398.2, 477.5, 556.7)),
        ("vit_base", 16, (280.9, 319.4, 396.3, 473.2)),
        ("vit_base", 8, (1250, 1403, 1709, 2015)),
    ],
)
def test_flops_of_the_rows(arch: str, patch_size: int, gflop: tuple[float, ...]) -> None:
    for local, expected in zip(table8.PAPER, gflop, strict=True):
        found = Problem(64, local, arch, patch_size).flops() / 64 / 1e9
        assert found == pytest.approx(expected, rel=1e-3)


def test_hours_of_the_paper() -> None:
    for rate, (hours, _) in zip((145.4, 130.8, 109.6, 91.9), table8.PAPER.values(), strict=True):
        assert table8.hours(rate) == pytest.approx(hours, rel=2e-3)


def test_toy_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, text = result(
        table8, tmp_path, monkeypatch, "--rows", "0", "2", "--batch", "3", "--seconds", "0.1"
    )
    assert "nan" not in text.lower() and record["machine"]["packages"]["torch"]
    rows = record["rows"]
    names = list(standard(None))
    assert [(row["local"], row["provider"]) for row in rows] == [(n, name) for n in (0, 2) for name in names]
    for row in rows:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["mfu"] > 0
        assert row["images_per_second"] == pytest.approx(3 / row["median_s"])
        assert row["peak_bytes"] > 0 and row["tensor_bytes"] > 0
        assert row["loss"] == pytest.approx(
            rows[0]["loss"] if row["local"] == 0 else rows[2]["loss"], rel=2e-2
        )
    assert "official code: not measured (no --official PATH)" in record["transcript"]


def test_sides_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, sides = Problem(2, 2, toy=True), {"a": Provider("eager"), "b": Provider("fastdino")}
    assert "a 3.59" in gate(toy, sides, None)
    start = Provider.start

    def warmer(self: Provider, problem: Problem, checkout: Path | None) -> Callable[..., float]:
        step = start(self, problem, checkout)
        if self.side == "eager":
            step.center.add_(0.01 * torch.randn(step.center.shape))  # type: ignore[attr-defined]
        return step

    monkeypatch.setattr(Provider, "start", warmer)
    with pytest.raises(SystemExit, match="nothing is timed"):
        gate(toy, sides, None)


def test_all_sides_start_alike_and_draw_the_same_crops() -> None:
    toy = Problem(2, 2, toy=True)
    a, b = toy.crops(), toy.crops()
    assert torch.equal(a.global_, b.global_) and a.local is not None and len(a.local) == 4
    students = [Provider(side).start(toy, None) for side in ("eager", "train_step", "fastdino")]
    found = [getattr(s, "student", None) or s.step.method.student for s in students]  # type: ignore[attr-defined]
    for name, value in found[0].state_dict().items():
        assert all(torch.equal(value, other.state_dict()[name]) for other in found[1:]), name


def test_memory_of_a_fresh_process() -> None:
    ballast = torch.ones(100_000_000)  # 400 MB here, which must not count there
    provider, toy = Provider("fastdino"), Problem(2, 2, toy=True)
    process = Process(provider, toy, None)
    found = process.memory
    parameters = sum(p.numel() for p in provider.start(toy, None).step.method.parameters())  # type: ignore[attr-defined]
    assert 4 * parameters < found["tensor_bytes"] < 40 * parameters
    assert 0 < found["peak_bytes"] < ballast.nbytes / 2
    here, crops = provider.start(toy, None), toy.crops()
    expected = [here(crops) for _ in range(5)]
    losses = [process.loss, process(crops)]
    with process.turn():
        losses.append(process(crops))
    assert losses == pytest.approx([expected[i] for i in (0, 2, 4)])
    process.process.kill()
    with pytest.raises(SystemExit, match="fastdino: its process ended with exit code -9"):
        process(crops)


def test_rivals_have_the_settings_of_pytorch() -> None:
    """What PyTorch and OpenMP read from the environment is the user's."""
    code = (
        "import os; before = dict(os.environ); import bench.providers, fastdino.engine.trainer; "
        "assert os.environ == before, os.environ"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(providers.__file__).parents[1])


def test_a_process_that_fails_names_its_side(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="official: its process ended with exit code 1"):
        Process(Provider("official"), Problem(2, toy=True), tmp_path)


def test_rounds_rotate_and_end_in_time() -> None:
    turns: list[str] = []
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    times = harness.interleave(calls, rounds=4, warmup=0)
    assert "".join(turns) == "abcbcacababc" and [len(t) for t in times.values()] == [4, 4, 4]
    clock = iter(range(1000))
    turns.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
        times = harness.interleave(calls, rounds=100, warmup=0, seconds=20)
    assert 1 < len(times["a"]) < 5
    assert len(harness.interleave(calls, rounds=100, warmup=0, seconds=0)["a"]) == 1


# --------------------------------------------------------------------------------------- the official code


def test_what_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected a checkout of facebookresearch/dino, found no utils.py"):
        official.load(tmp_path)


def test_loading_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("a = 1\n")
    (tmp_path / "vision_transformer.py").write_text("import utils\nb = utils.a\n")
    (tmp_path / "main_dino.py").write_text(
        "from torchvision import datasets, transforms\nfrom torchvision import models as m\n"
        "import torch.distributed as dist\nimport vision_transformer as vits\nc = vits.b + 1\n"
    )
    names = ("utils", "vision_transformer", "main_dino", "torchvision")
    before = {name: sys.modules.get(name) for name in names}
    path = list(sys.path)
    code = official.load(tmp_path)
    assert code.main_dino.c == 2 and code.main_dino.dist.get_world_size() == 1
    assert {name: sys.modules.get(name) for name in names} == before and sys.path == path


@pytest.mark.skipif(CHECKOUT is None, reason="FASTDINO_OFFICIAL names no checkout of facebookresearch/dino")
@pytest.mark.parametrize("local", [0, 2])
def test_same_loss_as_the_official_code(local: int) -> None:
    assert CHECKOUT is not None
    toy = Problem(4, local, toy=True)
    assert "theirs" in gate(toy, {"theirs": Provider("official")}, Path(CHECKOUT))
    ours, theirs = (Provider(s).start(toy, Path(CHECKOUT)) for s in ("fastdino", "official"))
    crops = toy.crops()
    for _ in range(3):  # the second and third see center, moments and teacher of the first
        assert ours(crops) == pytest.approx(theirs(crops), rel=1e-4)
    assert HYPER.momentum < 1 and providers.device().type in ("cpu", "cuda")
