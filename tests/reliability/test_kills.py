"""SIGKILL at any moment: the same command goes on and ends with the bits of an undisturbed run."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from fastdino.engine import checkpoint
from reliability import toy
from reliability.promises import cases_of, promise

INTERVAL = 3
FLAGS = ("--epochs", "3", "--save_every", str(INTERVAL))
STEPS = 36


def slow_saves(rank: int, notes: Path) -> None:
    """Saves take long enough to be hit; steps and saves that begin are noted."""
    from fastdino.engine.checkpoint import Disk, Saver

    write, rename, start = Disk.write, Disk.rename, Saver.start

    def slow_write(self, path, data):
        write(self, path, data)
        time.sleep(0.01)

    def slow_rename(self, source, target):
        time.sleep(0.01)
        rename(self, source, target)

    def noted_start(self, step, *arguments, **options):
        with saves_of(notes).open("a") as lines:  # one write: a kill leaves a whole line or none
            lines.write(f"{step}\n")
        start(self, step, *arguments, **options)

    Disk.write, Disk.rename, Saver.start = slow_write, slow_rename, noted_start
    toy.note_batches(notes)


def saves_of(notes: Path) -> Path:
    """Where the steps of the saves that began stand, a line each."""
    return notes.with_suffix(".save")


def begun(notes: Path) -> list[str]:
    """The lines of a file that may not be there."""
    return notes.read_text().splitlines() if notes.exists() else []


def is_saving(out: Path) -> bool:
    """Whether a save has begun to write files."""
    try:
        return any(out.glob("checkpoints/.saving-*/*"))
    except FileNotFoundError:  # it ended while we looked
        return False


def kill_at_random(job: toy.Job, out: Path, notes: Path, draw) -> None:
    """Kill everything: some time after the start, after a step, or while a save is under way."""
    kind, delay = draw.choice(("start", "step", "step", "save")), draw.uniform(0, 0.4)
    deadline = time.monotonic() + 60
    while job.processes[0].exitcode is None and time.monotonic() < deadline:
        if kind == "start" or (kind == "step" and notes.exists()):
            time.sleep(delay)
            break
        if kind == "save" and is_saving(out):
            time.sleep(delay / 20)
            break
        time.sleep(0.001)
    job.kill()


def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(images, tmp_path):
    wanted = cases_of(ci=20, nightly=200)
    toy.train(images, tmp_path / "whole", *FLAGS)
    expected = toy.state_hash(tmp_path / "whole")
    kills, runs, inside = 0, 0, 0
    with promise(1, "SIGKILL at a random moment") as cases:
        while kills < wanted:
            out, draw = tmp_path / f"run{runs}", toy.seeded("kill", runs)
            runs, finished = runs + 1, False
            while not finished:
                notes = tmp_path / f"{out.name}-{kills}.notes"
                before = max(toy.newest(out), 0)
                job = toy.start(images, out, *FLAGS, hook=partial(slow_saves, notes=notes))
                if kills < wanted:
                    kill_at_random(job, out, notes, draw)
                codes = job.wait()
                finished = codes == [0]
                if finished:
                    break
                with cases.case(f"kill {kills} of run {runs}"):
                    assert codes == [-signal.SIGKILL], job.text
                    finished_steps = before + max(len(begun(notes)) - 1, 0)
                    kept = max(toy.newest(out), 0)
                    saving = any(int(step) > kept for step in begun(saves_of(notes)))
                    inside += saving
                    lost = finished_steps - kept
                    # A save is written while training goes on: until it is there, the one before it counts.
                    assert lost <= INTERVAL * (2 if saving else 1), f"{lost} steps lost"
                kills += 1
            with cases.case(f"end of run {runs}"):
                assert toy.state_hash(out) == expected
                assert [r["step"] for r in toy.lines(out / "metrics.jsonl")] == list(range(4, STEPS + 1, 4))
                assert [r["epoch"] for r in toy.lines(out / "log.txt")] == [0, 1, 2]
                assert (out / "log.txt").read_text() == (tmp_path / "whole/log.txt").read_text()
    assert inside, "no kill came inside a save"


@pytest.mark.parametrize("mesh", ["replicate", "shard"])
def test_workers_killed_at_any_moment_are_restarted_and_end_as_undisturbed(images, tmp_path, mesh):
    wanted = cases_of(ci=1, nightly=20)
    flags = ("--epochs", str(3 * wanted + 2), "--save_every", str(INTERVAL), "--mesh", mesh)
    toy.train(images, tmp_path / "whole", *flags, processes=2)
    out, draw = tmp_path / "killed", toy.seeded("workers")
    with promise(1, f"SIGKILL of one of two ranks under torchrun's agent, --mesh {mesh}") as cases:
        job = toy.start(images, out, *flags, processes=2, launcher=wanted)
        for kill in range(wanted):
            with cases.case(f"kill {kill}"):
                reached = toy.newest(out)
                job.until(lambda: toy.newest(out) > reached)  # noqa: B023
                time.sleep(draw.uniform(0, 0.2))
                workers = job.workers
                os.kill(draw.choice(workers), signal.SIGKILL)
                job.until(lambda: not set(workers) & set(job.workers))  # noqa: B023
                assert toy.newest(out) >= reached
        with cases.case("end"):
            assert job.wait() == [0], job.text
            assert toy.state_hash(out) == toy.state_hash(tmp_path / "whole")
            version = checkpoint.SHARDED_FORMAT if mesh == "shard" else checkpoint.FORMAT
            assert checkpoint.load(checkpoint.latest(out / "checkpoints"))[2]["format"] == version
