"""The speedrun: its clock, on made-up logs; and one run of seconds through train.py."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import speedrun
from bench.harness import Transcript
from bench.speedrun import lines, picture, report, timeline


def logged(gpu: bool) -> dict:
    """A run of 40 steps of 100 images, 10 steps a second; compiling takes 6 s in the first line's steps."""
    phases = {"t_data": 0.03, "t_forward": 0.03, "t_backward": 0.03, "t_update": 0.01}
    metrics = [{"step": step, "img_s": 1000.0, **phases} for step in (10, 20, 30, 40)]
    metrics[0] |= {"img_s": 10 * 100 / 7.0, "t_forward": 0.43, "t_backward": 0.23}

    def evaluation(step: int, knn: float, time: float, seconds: float) -> dict:
        return {
            "step": step,
            "epoch": step // 20,
            "knn": {"20": knn},
            "time": 1000 + time,
            "seconds": seconds,
        }

    evaluations = [evaluation(0, 99.0, 5, 3), evaluation(20, 30.0, 14, 1), evaluation(40, 50.0, 17, 1)]
    environment = {"global_batch": 100, "device": "it"}
    cpu = {0: 8.0, 20: 25.0, 40: 30.0}
    found = {"metrics": metrics, "evaluations": evaluations, "environment": environment}
    return {"started": 1000.0, "cpu": cpu, "gpu": gpu, **found}


def test_the_clock_with_and_without_compiling():
    found = timeline(logged(gpu=True), 50.0)
    assert [row["seconds"] for row in found["curve"]] == [5, 14, 17]
    # 6 s of compiling in the steps; the first evaluation took 2 s more than the others
    assert [row["without_compile"] for row in found["curve"]] == pytest.approx([3, 6, 9])
    assert [row["training"] for row in found["curve"]] == pytest.approx([0, 2, 4])
    assert found["reached"] is found["curve"][-1] and found["reached"]["cpu"] == 30.0
    spent = {"start": 2, "compiling": 8, "training": 4, "evaluations": 3}
    assert found["phases"] == pytest.approx(spent) and sum(spent.values()) == 17
    assert timeline(logged(gpu=True), 30.0)["reached"]["step"] == 20  # the untrained network does not count
    assert timeline(logged(gpu=True), 50.1)["reached"] is None


def test_a_cpu_compiles_nothing():
    found = timeline(logged(gpu=False), 30.0)
    assert found["phases"]["compiling"] == 0
    assert all(row["without_compile"] == row["seconds"] for row in found["curve"])
    assert found["curve"][1]["training"] == pytest.approx(8)


def test_an_evaluation_between_two_log_lines_gets_its_share_of_the_steps():
    made = logged(gpu=True)
    made["evaluations"][1]["step"] = 25
    made["cpu"][25] = 26.0
    assert timeline(made, 30.0)["curve"][1]["training"] == pytest.approx(2.5)


def test_table_and_picture(tmp_path):
    results = {seed: timeline(logged(gpu=True), target) for seed, target in ((0, 30.0), (1, 50.0))}
    baselines = {"untrained": 27.0, "raw pixels": 38.5}
    say = Transcript()
    report(say, results, baselines, 30.0)
    rows = {" ".join(line.split()[:2]): line.split() for line in say.lines}
    assert rows["seed 0"][2:] == ["50.0", "14.0", "6.0", "2.0", "25.0"]
    assert rows["median 50.0"][2:] == ["15.5", "7.5", "3.0", "27.5"]
    assert (
        "seed 1: 17.0 s to the last evaluation: start 2.0, compiling 8.0, training 4.0, evaluations 3.0"
        in (say.lines)
    )
    results[1] = timeline(logged(gpu=True), 90.0)
    say = Transcript()
    report(say, results, baselines, 90.0)
    assert any(line.endswith("50.0 not reached") for line in say.lines)
    assert not any(line.startswith("median") for line in say.lines)
    picture(results, baselines, 45.0, "a run", tmp_path / "a" / "speedrun.png")
    assert (tmp_path / "a" / "speedrun.png").stat().st_size > 10_000


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    log = tmp_path / "eval.jsonl"
    assert lines(log) == []
    log.write_text('{"step": 0}\n{"step": 1')
    assert lines(log) == [{"step": 0}]


@pytest.fixture
def images(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for part, n in (("train", 16), ("test", 4)):
        for label in ("cat", "dog"):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / label / f"{i:02}.png")
    return tmp_path / "images"


TINY = """ --device cpu --embed_dim 16 --depth 1 --out_dim 32 --head_hidden_dim 16 --bottleneck_dim 8
--global_crops_size 16 --local_crops_size 8 --batch_size_per_gpu 8 --epochs 2 --log_every 2
--num_workers 1 """.split()


def test_a_run(images, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FASTDINO_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--images", str(images), "--preset", "cifar10-cpu", "--target", "1", "--seeds", "3", "--save"]
    monkeypatch.setattr(sys, "argv", ["speedrun", *words, "--runs", str(tmp_path / "runs"), *TINY])
    speedrun.main()
    (path,) = (tmp_path / "results").glob("*/*-speedrun.json")
    record = json.loads(path.read_text())
    assert path.with_suffix(".png").exists() and str(path) in capfd.readouterr().out
    assert record["preset"] == "cifar10-cpu" and record["flags"] == TINY and record["target"] == 1
    assert set(record["baselines"]) == {"untrained", "raw pixels"}
    result = record["seeds"]["3"]
    assert [row["step"] for row in result["curve"]] == [0, 4, 8]
    assert result["reached"] == result["curve"][1]  # of two classes some are always right
    for row in result["curve"]:
        assert 0 < row["training"] + (row["step"] == 0) and 0 < row["cpu"] and not math.isnan(row["cpu"])
        assert row["training"] < row["without_compile"] == row["seconds"]
    assert sum(result["phases"].values()) == pytest.approx(result["curve"][-1]["seconds"])
    assert min(result["phases"].values()) >= 0


def test_what_is_no_image_set_is_refused_with_the_layout(images, monkeypatch, capsys):
    (images / "test").rename(images / "val")
    monkeypatch.setattr(sys, "argv", ["speedrun", "--images", str(images)])
    with pytest.raises(SystemExit):
        speedrun.main()
    assert "expected DIR/train/CLASS/*.png or .jpg and DIR/test/CLASS/*, found no folder test" in (
        capsys.readouterr().err
    )


def test_a_run_that_fails_says_so(images, tmp_path):
    with pytest.raises(SystemExit, match="seed 0: train.py ended with exit code 2"):
        speedrun.run(images, "cifar10-cpu", 0, ["--no_such_flag", "1"], tmp_path / "run")
