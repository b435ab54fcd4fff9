"""Whole runs as a user starts them: logs, resume after a kill, preemption, several processes, hopeless
inputs.
"""

import json
import shutil
import signal
import subprocess
import time

import pytest
import torch

from fastdino.config import config_from_flags
from fastdino.engine import checkpoint
from fastdino.engine.trainer import Trainer
from runs import ROOT, command, environment, train


def final(out):
    path = checkpoint.latest(out / "checkpoints")
    return checkpoint.load(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(a, b, resumed_at=0):
    """Bitwise the same weights, optimizer, center, counters and logs; a log line's mean restarts where the
    run resumed.
    """
    (model_a, optimizer_a, meta_a), (model_b, optimizer_b, meta_b) = final(a), final(b)
    for one, two in ((model_a, model_b), (optimizer_a, optimizer_b)):
        assert one.keys() == two.keys()
        assert [k for k in one if not torch.equal(one[k], two[k])] == []
    for key in ("step", "epoch", "counters", "epoch_sums", "identity"):
        assert meta_a[key] == meta_b[key], key
    assert lines(a / "log.txt") == lines(b / "log.txt")
    for one, two in zip(lines(a / "metrics.jsonl"), lines(b / "metrics.jsonl"), strict=True):
        assert (one["step"], one["lr"]) == (two["step"], two["lr"])
        assert one["loss"] == two["loss"] or one["step"] - 4 < resumed_at < one["step"]


@pytest.fixture(scope="session")
def uninterrupted(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(images, out, "--drop_path_rate", "0.1")
    return out


def test_a_run_writes_what_it_promises(uninterrupted):
    log = lines(uninterrupted / "log.txt")
    assert [r["epoch"] for r in log] == [0, 1]
    assert {"train_loss", "train_lr", "train_wd", "epoch"} <= log[0].keys()
    metrics = lines(uninterrupted / "metrics.jsonl")
    assert [r["step"] for r in metrics] == [4, 8, 12, 16, 20, 24]
    wanted = "step epoch loss lr wd momentum teacher_temp teacher_entropy kl img_s bad_steps time"
    wanted += " t_data t_forward t_backward t_update"
    assert set(wanted.split()) <= metrics[0].keys()
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["teacher_entropy"] + metrics[0]["kl"], rel=1e-4)
    assert (uninterrupted / "crops.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((uninterrupted / "environment.json").read_text())
    assert facts["images"] == 96 and facts["steps_per_epoch"] == 12
    assert "embed_dim: 32" in (uninterrupted / "config.yaml").read_text()
    assert final(uninterrupted)[2]["step"] == 24


def test_repeating_a_run_gives_the_same_bits(images, uninterrupted, tmp_path):
    train(
        images, tmp_path / "again", "--drop_path_rate", "0.1", "--num_workers", "2", "--cache_decoded", "off"
    )
    assert_same_run(uninterrupted, tmp_path / "again")


WAITS = """
import sys, time
from pathlib import Path
from fastdino import cli
from fastdino.engine.step import TrainStep

enqueue, calls = TrainStep.enqueue, []

def waiting(self, batches, hyper, stop):
    calls.append(1)
    if len(calls) == 8:
        Path(sys.argv[1]).touch()
        while not stop():
            time.sleep(0.001)
    enqueue(self, batches, hyper, stop)

TrainStep.enqueue = waiting
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_preempted_run_continues_bitwise(images, uninterrupted, tmp_path):
    """As a process of its own; reliability/ has SIGKILL, torchrun's agent and every other moment."""
    out, note = tmp_path / "preempted", tmp_path / "note"
    flags = ("--drop_path_rate", "0.1", "--save_every", "5")
    program, _, *words = command(images, out, *flags)
    process = subprocess.Popen(
        [program, "-c", WAITS, str(note), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    deadline = time.monotonic() + 120
    while not note.exists():  # in the middle of the first epoch
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    reached = checkpoint.step_of(checkpoint.latest(out / "checkpoints"))
    assert process.returncode == 143 and "SIGTERM" in text and reached == 7, text
    done = train(images, out, *flags)
    assert f"continuing after step {reached}" in done.stdout
    assert_same_run(uninterrupted, out, reached)
    again = train(images, out, *flags)  # a finished run has nothing left to do
    assert "complete: 24 of 24 steps in" in again.stdout and "continuing" not in again.stdout
    assert_same_run(uninterrupted, out, reached)


def test_a_damaged_newest_checkpoint_falls_back_loudly(images, uninterrupted, tmp_path):
    out = tmp_path / "run"
    flags = ("--drop_path_rate", "0.1", "--save_every", "5")
    train(images, out, *flags, "--max_steps", "15")
    newest = checkpoint.latest(out / "checkpoints")
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 4
    (newest / "model.safetensors").write_bytes(data)
    done = train(images, out, *flags)
    assert "DAMAGED CHECKPOINT" in done.stderr and "model.safetensors" in done.stderr
    assert "continuing after step 12" in done.stdout
    assert_same_run(uninterrupted, out)


@pytest.mark.parametrize("accumulate", [False, True])
def test_two_processes_equal_one(images, tmp_path, accumulate):
    common = ("--drop_path_rate", "0", "--batch_size", "16", "--precision", "fp32", "--lr", "0.002")
    per_process = "4" if accumulate else "8"
    train(images, tmp_path / "one", *common, "--batch_size_per_gpu", "16")
    train(images, tmp_path / "two", *common, "--batch_size_per_gpu", per_process, processes=2)
    (one, _, meta_one), (two, _, meta_two) = final(tmp_path / "one"), final(tmp_path / "two")
    assert meta_two["world_size"] == 2 and meta_two["step"] == meta_one["step"] == 12
    for name in one:
        a, b = one[name], two[name]
        if name.endswith("qkv.bias"):  # the keys' bias has no gradient but rounding noise
            d = a.numel() // 3
            a, b = torch.cat([a[:d], a[2 * d :]]), torch.cat([b[:d], b[2 * d :]])
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(lines(tmp_path / "one/log.txt"), lines(tmp_path / "two/log.txt"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_resuming_with_another_number_of_processes_continues_at_the_right_sample(images, tmp_path):
    common = ("--drop_path_rate", "0", "--batch_size", "16", "--precision", "fp32", "--lr", "0.002")
    train(images, tmp_path / "one", *common, "--batch_size_per_gpu", "16")
    out = tmp_path / "mixed"
    train(images, out, *common, "--batch_size_per_gpu", "8", "--max_steps", "4", processes=2)
    done = train(images, out, *common, "--batch_size_per_gpu", "16")
    assert "continuing after step 4" in done.stdout
    for a, b in zip(lines(tmp_path / "one/log.txt"), lines(out / "log.txt"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_run_resumes_when_files_have_vanished_or_broken(images, tmp_path, cache):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(images, data)
    flags = ("--save_every", "5", "--cache_decoded", cache)
    train(data, out, *flags, "--max_steps", "10")
    pictures = sorted(data.rglob("*.jpg"))
    pictures[7].unlink()
    pictures[40].write_bytes(b"no longer an image")
    done = train(data, out, *flags)
    assert "continuing after step 10" in done.stdout
    assert "2 images of this run are missing or unreadable" in done.stderr + done.stdout
    assert final(out)[2]["step"] == 24
    (data / "class0" / "new.jpg").write_bytes(pictures[0].read_bytes())
    refused = train(data, out, *flags, code=2)
    assert "list of images" in refused.stderr


def test_another_model_in_the_same_directory_is_refused(images, uninterrupted, tmp_path):
    done = train(images, uninterrupted, "--drop_path_rate", "0.1", "--out_dim", "128", code=2)
    assert "--out_dim: checkpoint 64, now 128" in done.stderr
    assert "Traceback" not in done.stderr


def test_endless_nan_stops_with_a_clean_checkpoint(images, tmp_path):
    out = tmp_path / "run"
    done = train(images, out, "--lr", "1e30", "--clip_grad", "0", "--max_bad_steps", "3", code=1)
    assert "--max_bad_steps" in done.stdout
    model, optimizer, _ = final(out)
    assert all(t.isfinite().all() for t in [*model.values(), *optimizer.values()])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_size", "1000"), "96 usable images"),
        (("--batch_size", "12", "--batch_size_per_gpu", "8"), "--batch_size_per_gpu"),
        (("--data_path", "/nonexistent/folder"), "/nonexistent/folder"),
        (("--eval_data_path", "/nonexistent/folder"), "--eval_data_path: no such file"),
        (("--output_dir", __file__), "--output_dir"),
        (("--device", "cuda"), "--device cuda"),
    ],
)
def test_hopeless_input_is_refused_in_one_line(images, tmp_path, flags, message):
    done = train(images, tmp_path / "run", *flags, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 3


def test_a_new_run_in_an_old_directory_never_continues_from_old_checkpoints(images, tmp_path):
    out = tmp_path / "run"
    train(images, out, "--epochs", "1")
    flags = ("--epochs", "1", "--resume", "none", "--lr", "0.001", "--max_steps", "11")
    done = train(images, out, *flags, "--overwrite")
    assert "set aside" in done.stdout
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["old-step-00000012", "step-00000011"]
    assert final(out)[2]["config"]["optim"]["lr"] == 0.001


def test_held_out_images_may_be_bad_and_a_lost_evaluation_is_made_up_for(images, tmp_path):
    held_out = tmp_path / "held_out"
    for path in sorted(images.glob("*/*.jpg"))[::8]:
        (held_out / path.parent.name).mkdir(parents=True, exist_ok=True)
        (held_out / path.parent.name / path.name).write_bytes(path.read_bytes())
    (held_out / "class0" / "bad.jpg").write_bytes(b"no image")
    flags = ("--max_steps", "2", "--eval_data_path", str(held_out), "--nb_knn", "1")
    out = tmp_path / "run"
    done = train(images, out, *flags)
    assert "bad.jpg" in done.stderr
    first, last = lines(out / "eval.jsonl")
    assert first["untrained"] == first["knn"] and "raw_pixels" in first and last["step"] == 2

    (out / "eval.jsonl").write_text(json.dumps(first) + "\n")  # as if killed before the last evaluation
    train(images, out, *flags)
    again = lines(out / "eval.jsonl")
    assert [{**made, "time": 0, "seconds": 0} for made in again] == [
        {**made, "time": 0, "seconds": 0} for made in (first, last)
    ]
    assert again[0] == first and again[1]["time"] > last["time"] > first["time"] and last["seconds"] > 0
    train(images, out, *flags)
    assert lines(out / "eval.jsonl") == again


def test_a_cache_that_does_not_fit_is_refused_before_the_model_is_built(images, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdino.data.loader.free_memory", lambda: 1000)
    monkeypatch.setattr("fastdino.engine.trainer.build", None)
    flags = dict(data_path=str(images), output_dir=str(tmp_path), cache_decoded="on", batch_size_per_gpu=8)
    with pytest.raises(ValueError, match="--cache_decoded on: the decoded images take at least"):
        Trainer(config_from_flags(**flags))


def test_an_official_file_to_resume_from_is_told_how_to_come_in(images, tmp_path):
    file = tmp_path / "official" / "checkpoint.pth"
    file.parent.mkdir()
    file.touch()
    for given in (file, file.parent):
        done = train(images, tmp_path / "out", "--resume", str(given), code=2)
        assert f"python -m fastdino.interop official import {file} {tmp_path / 'out'}" in done.stderr
