"""A run as its user meets it: from Python and the shell, its folder, its lines, its mirrors, no network."""

from __future__ import annotations

import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastdino
from fastdino.config import Config, ConfigError, with_flags
from fastdino.engine import checkpoint, logs, output
from fastdino.engine.logs import Screen, append_line
from fastdino.engine.trackers import Curves
from runs import FLAGS, ROOT, command, environment

TOY = {
    "embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "out_dim": 64, "head_hidden_dim": 32,
    "bottleneck_dim": 16, "global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2,
    "batch_size_per_gpu": 8, "epochs": 1, "warmup_epochs": 0, "num_workers": 1, "log_every": 1,
    "device": "cpu",
}  # fmt: skip
OFFICIAL = {"train_loss", "train_lr", "train_wd", "epoch"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """64 JPEGs without labels."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(64):
        pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(root / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    assert fastdino.train(out, images, "vit_tiny", **TOY) == out
    return out


def records(path: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# -- the run folder --------------------------------------------------------------------------------------


def test_python_gives_the_whole_folder(run) -> None:
    visible = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    wanted = "config.yaml environment.json log.txt metrics.jsonl train.log crops.png checkpoints report.html"
    assert set(wanted.split()) <= visible
    assert visible - set(wanted.split()) <= {"images.json", "prescan.npz"}
    assert output.foreign(run, []) == []
    (epoch,) = records(run / "log.txt")
    assert epoch.keys() >= OFFICIAL
    metrics = records(run / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 9))
    center = checkpoint.load(checkpoint.latest(run / "checkpoints"))[0]["center"]
    assert metrics[-1]["center_norm"] == pytest.approx(center.norm().item(), rel=1e-6)
    assert all(record["grad_norm"] > 0 and record["memory"] > 1e8 for record in metrics)
    said = (run / "train.log").read_text()
    assert "64 images" in said and "report: " in said
    assert re.search(
        r"^epoch 0 step 8/8 loss \d+\.\d{4} lr \S+ entropy \S+ KL \S+ \d+ img/s data-wait \d+ % eta 0:00:00$",
        said,
        re.M,
    )


def test_the_configuration_of_a_run_repeats_it_bitwise(run, images, tmp_path) -> None:
    again = fastdino.train(tmp_path / "again", images, config=run / "config.yaml")
    ours, theirs = records(run / "metrics.jsonl"), records(again / "metrics.jsonl")
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    one, two = (checkpoint.load(checkpoint.latest(r / "checkpoints"))[0] for r in (run, again))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    # A flag wins over the file: another seed is another run.
    other = fastdino.train(tmp_path / "other", images, config=run / "config.yaml", seed=1, max_steps=1)
    assert records(other / "metrics.jsonl")[0]["loss"] != ours[0]["loss"]


def test_numbers_that_are_not_finite_are_null(tmp_path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"loss": math.nan, "knn": {"10": math.inf, "20": 5.0}, "all": [1, -math.inf], "n": 3})
    assert records(path) == [{"loss": None, "knn": {"10": None, "20": 5.0}, "all": [1, None], "n": 3}]


# -- what may be in the output directory -----------------------------------------------------------------


def config_for(out: Path, **flags: object) -> Config:
    return with_flags(Config(), {"data_path": "/data", "output_dir": str(out), **flags})


def test_a_new_or_empty_folder_and_that_of_a_run_are_taken(run, tmp_path) -> None:
    output.check(config_for(tmp_path / "new"))
    output.check(config_for(tmp_path))
    output.check(config_for(run))
    (tmp_path / ".lock").touch()
    (tmp_path / "slurm-17.out").touch()
    (tmp_path / "crops.png").touch()  # of --preview_crops
    (tmp_path / "images" / "train").mkdir(parents=True)
    output.check(config_for(tmp_path, data_path=str(tmp_path / "images" / "train")))


def test_a_foreign_folder_is_refused(tmp_path) -> None:
    for name in ("thesis.tex", "b.jpg", "c.jpg", "d.jpg", "config.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as error:
        output.check(config_for(tmp_path))
    assert (
        f"--output_dir: expected a new folder or that of a run, {tmp_path} holds b.jpg, c.jpg, d.jpg, ...;"
        in (str(error.value))
    )
    assert "--resume" in str(error.value) and "choose another folder" in str(error.value)
    output.check(config_for(tmp_path, overwrite=True))
    with pytest.raises(ConfigError, match="b.jpg"):
        output.check(config_for(tmp_path, data_path=str(tmp_path)))
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(ConfigError, match=r"official import .*/checkpoint.pth NEW_RUN"):
        output.check(config_for(tmp_path))


def test_starting_afresh_in_the_folder_of_a_run_must_be_asked_for(run, monkeypatch) -> None:
    with pytest.raises(
        ConfigError, match="holds a run; --resume auto continues it, --overwrite sets"
    ) as error:
        output.check(config_for(run, resume="none"))
    assert "another folder" in str(error.value)
    output.check(config_for(run, resume="none", overwrite=True))
    (run / "notes.txt").touch()
    output.check(config_for(run))
    (run / "notes.txt").unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    output.check(config_for(run, resume="none"))


def test_the_command_refuses_before_it_looks_at_the_data(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = subprocess.run(
        command(tmp_path / "no data", tmp_path / "out"), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2 and "mine.txt" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."] == ["mine.txt"]


# -- lines and bars --------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def report(screen: Screen, clock: list[float], steps: int, seconds: float) -> None:
    for step in range(1, steps + 1):
        clock[0] += seconds
        screen.show(step, 0, "loss 1.0000 10 img/s", seconds)


def test_a_pipe_gets_few_plain_lines(tmp_path, capsys, clock) -> None:
    screen = Screen(1000, 0, enabled=True, log=tmp_path / "train.log")
    report(screen, clock, 1000, 0.1)  # 100 seconds
    screen.say("the end")
    screen.close()
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[:3] == [
        f"epoch 0 step {i}/1000 loss 1.0000 10 img/s eta 0:01:{t}" for i, t in ((1, 39), (2, 39), (3, 39))
    ]
    assert (
        11 <= len(lines) <= 15 and lines[-2].startswith("epoch 0 step 1000/1000 ") and lines[-1] == "the end"
    )
    assert "\r" not in text and "\x1b" not in text
    assert (tmp_path / "train.log").read_text() == text


def test_slow_steps_tell_their_pace_before_the_first_report(capsys, clock) -> None:
    screen = Screen(1200, 0, enabled=True)
    for step in range(1, 4):
        clock[0] += 33.0
        screen.tick(step)
    screen.show(10, 0, "loss 1.0000", 33.0)
    screen.tick(11)
    screen.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/1200 the first steps",
        "step 2/1200 33.0 s per step eta 10:58:54",
        "step 3/1200 33.0 s per step eta 10:58:21",
        "epoch 0 step 10/1200 loss 1.0000 eta 10:54:30",
    ]


def test_quick_steps_are_not_told_one_by_one(capsys, clock) -> None:
    screen = Screen(1200, 0, enabled=True)
    for step in range(1, 100):
        clock[0] += 0.05
        screen.tick(step)
    screen.close()
    assert capsys.readouterr().out == ""


def test_forced_colours_do_not_reach_a_pipe(capsys, clock, monkeypatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    screen = Screen(10, 0, enabled=True)
    report(screen, clock, 10, 1.0)
    screen.close()
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\r" not in text and "step 10/10" in text


def test_a_terminal_gets_the_bar(tmp_path, monkeypatch, clock) -> None:
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    read = bytearray()

    def drain() -> None:
        while True:
            try:
                read.extend(os.read(master, 4096))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        screen = Screen(50, 0, enabled=True, log=tmp_path / "train.log")
        report(screen, clock, 50, 0.1)
        screen.close()
    reader.join(timeout=120)
    os.close(master)
    shown = read.decode()
    assert "\x1b[" in shown and "━" in shown and "50/50" in shown and "10 img/s" in shown
    kept = (tmp_path / "train.log").read_text()
    assert "\x1b" not in kept and kept.splitlines()[-1].startswith("epoch 0 step 50/50")


def test_warnings_are_kept_and_a_continued_run_appends(tmp_path, clock) -> None:
    for start, text in ((0, "first"), (5, "second")):
        screen = Screen(10, start, enabled=True, log=tmp_path / "train.log")
        screen.say(text)
        logging.getLogger("fastdino.data.loader").warning("a.jpg was replaced")
        screen.close()
    logging.getLogger("fastdino.data.loader").warning("not this")
    assert (tmp_path / "train.log").read_text().split("\n")[:-1] == [
        "first", "a.jpg was replaced", "second", "a.jpg was replaced",
    ]  # fmt: skip
    Screen(10, 0, enabled=True, log=tmp_path / "train.log").close()
    assert (tmp_path / "train.log").read_text() == ""


# -- mirrors ---------------------------------------------------------------------------------------------


def test_no_mirror_by_default_and_a_missing_one_is_told(monkeypatch) -> None:
    assert Config().run.logger == ("none",)
    assert Curves(("none",), Path("/nonexistent"), {}, 0).trackers == {}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(ConfigError, match=rf"--logger: {name} is not installed \(pip install {name}\)"):
            fastdino.train("/nonexistent/out", "/nonexistent/data", logger=name)
    with pytest.raises(ConfigError, match="--logger: expected none, or some of the others"):
        fastdino.train("/nonexistent/out", "/nonexistent/data", logger=["none", "wandb"])


def mirror(kind: str, directory: Path) -> None:
    """Two processes' worth of a run: begun, then continued."""
    for step in (0, 5):
        curves = Curves((kind,), directory, {"optim": {"lr": 0.1}}, step)
        curves.add({"loss": 1.0 + step, "kl": math.nan}, step + 1)
        curves.close()


def test_tensorboard(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mirror("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (6, 6.0)]


def test_wandb_writes_offline(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="needs fastdino[wandb]")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    mirror("wandb", tmp_path)
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len({name.rpartition("-")[2] for name in runs}) == 1  # parts of one run


def test_trackio_writes_locally(tmp_path) -> None:
    pytest.importorskip("trackio", reason="needs fastdino[trackio]")
    code = (
        "import sys, sqlite3, pathlib; from fastdino.engine.trackers import Curves\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "for step in (0, 5):\n"
        "    curves = Curves(('trackio',), out, {'lr': 0.1}, step)\n"
        "    curves.add({'loss': 1.0 + step}, step + 1)\n"
        "    curves.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment(TRACKIO_DIR=str(tmp_path / "trackio")), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "trackio").glob("*.db")) and "failed" not in done.stderr


def test_a_mirror_that_fails_is_given_up(tmp_path, caplog) -> None:
    pytest.importorskip("tensorboard")
    curves = Curves(("tensorboard",), tmp_path, {}, 0)
    curves.add({"loss": "not a number"}, 1)  # type: ignore[dict-item]
    curves.add({"loss": 1.0}, 2)
    curves.close()
    assert curves.trackers == {}
    assert [record.getMessage()[:28] for record in caplog.records] == ["--logger tensorboard failed,"]


# -- the network -----------------------------------------------------------------------------------------

OFFLINE = """
import os, sys
def audit(event, arguments):
    network = event == "socket.__new__" and int(arguments[1]) in (2, 10)  # AF_INET, AF_INET6
    if network or event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        os.write(2, f"NETWORK: {event} {arguments[1:]}\\n".encode())
        os._exit(99)
sys.addaudithook(audit)
from fastdino.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_uses_no_network_and_prints_plain_lines(images, tmp_path) -> None:
    flags = [word for word in FLAGS if word not in ("--logger", "none", "--report", "false")]
    words = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), *flags, "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *words], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").exists()
    assert "\r" not in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr
    assert (
        len(
            re.findall(
                r"(?m)^epoch \d+ step \d+/8 loss .* img/s data-wait \d+ % eta \d:\d\d:\d\d$", done.stdout
            )
        )
        == 2
    )
