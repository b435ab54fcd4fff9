"""Curves from made-up logs, the verdict, and the four runs of the study in miniature."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from fastdino.engine import checkpoint
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.collapse import STUDY, Curve, line, read_curve, study


def write_run(folder, rows, name="metrics.jsonl", out_dim=1024):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if out_dim:
        (folder / "config.yaml").write_text(f"# model\nout_dim: {out_dim}\n")
    return folder


def row(step, entropy, kl):
    return {"step": step, "epoch": 0, "teacher_entropy": entropy, "kl": kl}


def test_metrics_are_read_in_order_without_what_is_damaged(tmp_path):
    run = write_run(tmp_path / "run", [row(10, 5.0, 2.0), row(30, 3.0, 1.0), row(20, 4.0, float("nan"))])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "teacher_ent')
    curve = read_curve(run)
    assert (curve.name, curve.unit, curve.xs, curve.entropy, curve.kl) == (
        "run",
        "step",
        [10, 30],
        [5, 3],
        [2, 1],
    )
    assert curve.highest == pytest.approx(math.log(1024))


def test_epochs_of_the_log_where_there_are_no_steps(tmp_path):
    rows = [
        {"epoch": i, "train_loss": 1.0, "train_teacher_entropy": 3.0 - i, "train_kl": 0.5} for i in range(2)
    ]
    curve = read_curve(write_run(tmp_path / "run", rows, "log.txt", out_dim=None), "mine")
    assert curve == Curve("mine", [0, 1], [3, 2], [0.5, 0.5], None, "epoch")


def test_runs_without_entropy_are_refused(tmp_path):
    run = write_run(tmp_path / "run", [{"epoch": 0, "train_loss": 1.0}], "log.txt")
    with pytest.raises(ValueError, match="no entropy and KL.*metrics.jsonl"):
        read_curve(run)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_curve(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "entropy, kl, verdict",
    [
        (3.0, 1.0, "no collapse"),
        (0.01, 1.0, "no collapse"),
        (0.01, 0.001, "collapse to one prototype"),
        (6.92, 0.001, "collapse to the uniform distribution"),
        (5.0, 0.001, "collapse"),
    ],
)
def test_verdict(entropy, kl, verdict):
    curve = Curve("run", list(range(40)), [3.0] * 38 + [entropy] * 2, [2.0] * 38 + [kl] * 2, math.log(1024))
    assert curve.last() == (pytest.approx(entropy), pytest.approx(kl))
    assert curve.verdict() == verdict and line(curve).endswith(f"nats, {verdict}")


def test_command(tmp_path, capsys):
    for name, kl in (("a", 1.0), ("b", 0.0)):
        write_run(tmp_path / name, [row(i, 6.93 - kl, kl) for i in range(1, 30)])
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["collapse", "--runs", *runs, "--output_dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "a: KL 1.0000" in shown and "collapse to the uniform distribution" in shown
    record = json.loads((tmp_path / "out" / "collapse.json").read_text())
    assert record["figures"] == pytest.approx({"entropy_a": 5.93, "kl_a": 1, "entropy_b": 6.93, "kl_b": 0})
    assert (tmp_path / "out" / "collapse.png").stat().st_size > 10_000
    assert main(["collapse", "--runs", str(tmp_path), "--output_dir", str(tmp_path)]) == 2


def test_study_switches_centering_and_sharpening_off(tmp_path):
    said = []
    curves = study(tmp_path, steps=2, device="cpu", images=64, say=said.append)
    assert [curve.name for curve in curves] == [title for title, _ in STUDY.values()] and len(said) == 4
    found = {}
    for name in STUDY:
        flags = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        sharp = flags["teacher_temp"] < flags["student_temp"]
        assert flags["warmup_teacher_temp"] == flags["teacher_temp"] and flags["max_steps"] == 2
        model, _, _ = checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints"))
        found[name] = (bool(model["center"].any()), sharp)
    assert found == {
        "both": (True, True),
        "no_centering": (False, True),
        "no_sharpening": (True, False),
        "neither": (False, False),
    }
    assert all(math.isfinite(curve.kl[-1]) and curve.highest == math.log(256) for curve in curves)
