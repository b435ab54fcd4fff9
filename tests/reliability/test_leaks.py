"""What shows in long runs alone: memory, files and threads that pile up, a process slower than the others."""

from __future__ import annotations

import json
import os
import re
import time
from functools import partial
from pathlib import Path

import pytest

from fastdino.engine.metrics import Stragglers
from reliability import toy
from reliability.promises import NIGHTLY, cases_of, promise


def measuring(rank: int, notes: Path, every: int) -> None:
    """Every so many steps: memory that cannot be given back, open files, threads."""
    from fastdino.engine.step import TrainStep

    enqueue, calls = TrainStep.enqueue, []

    def measured(self, *arguments):
        calls.append(1)
        if len(calls) % every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            record = {
                "step": len(calls),
                "kb": pages * os.sysconf("SC_PAGE_SIZE") / 1024,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
            }
            with open(notes, "a") as file:
                file.write(json.dumps(record) + "\n")
        enqueue(self, *arguments)

    TrainStep.enqueue = measured


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures in /proc")
def test_memory_files_and_threads_stay_constant(images, tmp_path):
    steps = cases_of(ci=160, nightly=5000)
    notes, every = tmp_path / "notes", steps // 40
    flags = ("--epochs", str(steps // 12 + 1), "--max_steps", str(steps), "--save_every", "50")
    job = toy.start(images, tmp_path / "run", *flags, hook=partial(measuring, notes=notes, every=every))
    assert job.wait(600) == [0], job.text
    records = toy.lines(notes)[len(toy.lines(notes)) // 4 :]  # caches fill up first
    with promise(27, f"{steps} steps: memory, open files and threads") as cases:
        with cases.case("open files and threads"):
            assert len({r["files"] for r in records}) <= 3, records  # one more or two while a save is written
            assert max(r["threads"] for r in records) - min(r["threads"] for r in records) <= 2, records
        half = len(records) // 2
        middle = lambda part: sorted(r["kb"] for r in part)[len(part) // 2]  # noqa: E731
        slope = (middle(records[half:]) - middle(records[:half])) / (
            records[half]["step"] - records[0]["step"]
        )
        print(f"memory grows by {slope:.2f} KB per step")
        with cases.case("memory"):
            assert slope <= (1.0 if NIGHTLY else 20.0), f"{slope:.2f} KB per step"


def slow(rank: int, victim: int, site: str, first: int) -> None:
    """Rank ``victim`` needs 200 ms more per step from step ``first`` on."""
    from fastdino.data.loader import MultiCropLoader
    from fastdino.engine.step import TrainStep

    if rank != victim:
        return
    owner, name = {"data": (MultiCropLoader, "__next__"), "forward": (TrainStep, "forward")}[site]
    original, calls = getattr(owner, name), []

    def slowed(self, *arguments):
        calls.append(1)
        if len(calls) > first:
            time.sleep(0.2)
        return original(self, *arguments)

    setattr(owner, name, slowed)


def test_a_slow_process_is_named_within_twenty_steps(images, tmp_path):
    plans = [(v, s) for v in (0, 1) for s in ("data", "forward")] if NIGHTLY else [(1, "data")]
    flags = ("--epochs", "7", "--max_steps", "40", "--log_every", "10")
    with promise(13, "one of two ranks 200 ms slower per step: named within 20 steps") as cases:
        for victim, site in plans:
            with cases.case(f"rank {victim} in {site}"):
                hook = partial(slow, victim=victim, site=site, first=10)
                job = toy.train(images, tmp_path / f"{victim}{site}", *flags, processes=2, hook=hook)
                named = re.findall(r"WARNING: rank (\d+) is slow", job.text)
                assert named == [str(victim)], job.text
                before = job.text[: job.text.index("is slow")]
                assert "step 40/40" not in before and "step 30/40" not in before, job.text


@pytest.mark.skipif(not NIGHTLY, reason="500 steps: make test-nightly")
def test_no_process_is_called_slow_in_500_steps(images, tmp_path):
    with promise(13, "500 steps of two equal ranks: no false alarm") as cases, cases.case("two ranks"):
        job = toy.train(images, tmp_path / "run", "--epochs", "84", "--max_steps", "500", processes=2)
        assert "is slow" not in job.text, job.text


def test_stragglers_are_told_from_hiccups():
    watch, found = Stragglers(), []
    for step in range(60):
        usual = [0.10, 0.11, 0.09, 0.10]
        if step % 10 == 3:
            usual[1] += 5.0  # one step in ten: a save, a log
        if step >= 20:
            usual[2] += 0.2
        watch.add(usual)
        if step % 10 == 9:
            found.append([rank for rank, _, _ in watch.take()])
    assert found == [[], [], [], [2], [], []]
    alone = Stragglers()
    alone.add([3.0])
    assert alone.take() == [] and alone.take() == []
