"""Continuations that differ from the run they continue, or meet a folder or data that do."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from fastdino.engine import checkpoint, exits
from fastdino.engine.step import TrainStep
from reliability import toy

QUIET = ("--warmup_epochs", "0")


def state(out: Path) -> dict:
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None
    model, optimizer, meta = checkpoint.load(path)
    return {"model": model, "optimizer": optimizer, "meta": meta}


def die_at(rank: int, step: int) -> None:
    """SIGKILL in this step of the first launch of a worker."""
    enqueue, calls = TrainStep.enqueue, []

    def dying(self, *arguments):
        calls.append(1)
        if len(calls) == step and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        enqueue(self, *arguments)

    TrainStep.enqueue = dying


@pytest.mark.parametrize("how", ["none", "another run"])
def test_a_restarted_worker_continues_its_own_run(images, memory, how):
    flags = (*QUIET, "--epochs", "3", "--save_every", "4")
    toy.train(images, memory / "other", *flags, "--max_steps", "8")
    for name in ("whole", "out"):  # an old run lies in the folder
        toy.train(images, memory / name, *flags, "--seed", "7", "--max_steps", "30")
    given = ("--resume", "none" if how == "none" else str(memory / "other"), "--overwrite", "true")
    toy.train(images, memory / "whole", *flags, *given)
    job = toy.start(images, memory / "out", *flags, *given, launcher=1, hook=partial(die_at, step=15))
    assert job.wait() == [0], job.text
    assert toy.state_hash(memory / "out") == toy.state_hash(memory / "whole")
    assert "continuing after step 12" in job.text or "continuing after step 20" in job.text, job.text


def test_a_run_inside_its_data_does_not_train_on_itself(images, memory):
    for flat in (False, True):
        data = memory / f"data{flat}"
        shutil.copytree(images, data)
        if flat:
            for path in sorted(data.glob("*/*")):
                path.rename(data / f"{path.parent.name}-{path.name}")
            for folder in [path for path in data.iterdir() if path.is_dir()]:
                folder.rmdir()
        out = data / "run"
        toy.train(data, out, "--max_steps", "5")
        job = toy.train(data, out)
        assert "continuing after step 5" in job.text and "96 images" in job.text


def test_an_image_that_a_list_names_twice_may_vanish(images, memory):
    paths = sorted(map(str, images.glob("*/*")))
    copies = [memory / Path(path).name for path in paths[:40]]
    for path, copied in zip(paths, copies, strict=False):
        shutil.copy(path, copied)
    listing = memory / "list.txt"
    listing.write_text("\n".join(map(str, copies + copies[:8])))
    toy.train(listing, memory / "run", "--max_steps", "3")
    copies[3].unlink()
    job = toy.train(listing, memory / "run", "--max_steps", "5", "--prescan", "on")
    assert "continuing after step 3" in job.text and "missing" in job.text, job.text


def lose(rank: int, data: Path, step: int) -> None:
    """The images go away in this step."""
    enqueue, calls = TrainStep.enqueue, []

    def losing(self, *arguments):
        calls.append(1)
        if len(calls) == step and data.is_dir():
            data.rename(data.with_name("gone"))
        enqueue(self, *arguments)

    TrainStep.enqueue = losing


@pytest.mark.parametrize("processes", [1, 2])
def test_when_the_data_go_away_the_step_is_saved(images, memory, processes):
    data, out = memory / "data", memory / "run"
    shutil.copytree(images, data)
    flags = ("--epochs", "3", "--cache_decoded", "off", "--log_every", "1")
    toy.train(images, memory / "whole", *flags, processes=processes)
    job = toy.start(data, out, *flags, processes=processes, hook=partial(lose, data=data, step=6))
    codes = job.wait()
    assert exits.DATA in codes and "Traceback" not in job.text, (codes, job.text)
    assert "images cannot be read, too many to replace" in job.text
    assert "the same command continues" in job.text
    assert toy.newest(out) >= 5, job.text
    (memory / "gone").rename(data)
    toy.train(data, out, *flags, processes=processes)
    one, two = state(out), state(memory / "whole")
    assert all(one["model"][name].equal(value) for name, value in two["model"].items())


def test_no_data_from_the_beginning_saves_nothing(memory):
    (memory / "data").mkdir()
    for i in range(40):
        (memory / "data" / f"{i}.jpg").write_bytes(b"no image")
    job = toy.train(memory / "data", memory / "run", code=exits.DATA)
    assert "too many to replace" in job.text and toy.newest(memory / "run") == -1


def test_flags_that_may_change_and_what_they_decide(images, memory):
    def go_on(name: str, *flags: str, code: int = 0, begun: tuple[str, ...] = ()) -> toy.Job:
        out = memory / name
        toy.train(images, out, *QUIET, "--max_steps", "9", *begun)
        return toy.train(images, out, *QUIET, "--max_steps", "14", *flags, code=code)

    assert "compute type" in go_on("refused", "--precision", "bf16", code=2).text
    go_on("precision", "--precision", "bf16", "--allow_changes", "precision")
    go_on("adamw to lars", "--optimizer", "lars", "--allow_changes", "optimizer")
    lars = ("--optimizer", "lars")
    go_on("lars to adamw", "--optimizer", "adamw", "--allow_changes", "optimizer", begun=lars)
    free = ("--norm_last_layer", "false")
    go_on("frozen", "--norm_last_layer", "true", "--allow_changes", "norm_last_layer", begun=free)
    job = go_on("batch", "--batch_size_per_gpu", "4", "--allow_changes", "batch_size_per_gpu")
    assert "complete: 18 of 14" not in job.text and "step 18" in job.text  # 9 of 12 steps are 18 of 24
    (memory / "others").mkdir()
    for i in range(60):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(memory / "others" / f"{i}.png")
    out = memory / "precision"
    more = (*QUIET, "--precision", "bf16", "--max_steps", "20")
    assert "list of images" in toy.train(memory / "others", out, *more, code=2).text
    toy.train(memory / "others", out, *more, "--allow_changes", "data_path", "precision")
    toy.train(memory / "others", out, *more[:-1], "22", "--allow_changes", "precision")


@pytest.mark.parametrize(
    "flags", [("--use_bn_in_head", "true"), ("--teacher_op", "sinkhorn"), ("--method", "byol")]
)
def test_smaller_parts_of_a_batch_are_no_silent_change(images, memory, flags):
    out, batch = memory / "run", ("--batch_size", "8", *flags)
    toy.train(images, out, *batch, "--max_steps", "3")
    job = toy.train(images, out, *batch, "--max_steps", "5", "--batch_size_per_gpu", "4", code=2)
    assert "images in a pass: checkpoint 8, now 4" in job.text
    allowed = ("--allow_changes", "batch_size_per_gpu")
    toy.train(images, out, *batch, "--max_steps", "5", "--batch_size_per_gpu", "4", *allowed)


def test_images_that_do_not_meet_may_come_in_smaller_parts(images, memory):
    out, batch = memory / "run", ("--batch_size", "8")
    toy.train(images, out, *batch, "--max_steps", "3")
    toy.train(images, out, *batch, "--max_steps", "5", "--batch_size_per_gpu", "4")


@pytest.mark.parametrize(("every", "kept"), [("0", 1), ("2", 3)])
def test_checkpoints_that_are_kept(images, memory, every, kept):
    toy.train(images, memory / "run", "--epochs", "6", "--saveckp_freq", every, "--save_every", "4")
    found = {checkpoint.step_of(path) for path in (memory / "run" / "checkpoints").glob("step-*")}
    marked = [
        step for step in found
        if checkpoint.read_meta(memory / "run" / "checkpoints" / f"step-{step:08d}").get("keep")
    ]  # fmt: skip
    assert len(marked) == kept and 72 in found
