"""SIGTERM, SIGINT and SIGUSR1 to a rank, to all of them or to the launcher, at any moment, once or twice: the
state is on the disk within seconds, the exit code says why, and the same command goes on to the same bits.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

from fastdino.engine.disk import Disk
from fastdino.engine.logs import write_text
from fastdino.engine.step import TrainStep
from fastdino.engine.trainer import Trainer
from reliability import toy
from reliability.promises import NIGHTLY, promise

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AT_STEP = 6


def announcing(rank: int, moment: str, note: Path) -> None:
    """Rank 0 says when the moment has come and lets it last until the file ``note``.go is there and the
    signal has come, if it is for rank 0 too.
    """
    owner, name = {
        "forward": (TrainStep, "forward"),
        "update": (TrainStep, "update"),
        "save": (Disk, "rename"),
    }[moment]
    original, calls = getattr(owner, name), []
    handler, signalled = Trainer._on_signal, threading.Event()

    def handling(self, *arguments):
        signalled.set()
        handler(self, *arguments)

    def waiting(self, *arguments, **options):
        calls.append(1)
        if rank == 0 and len(calls) == (1 if owner is Disk else AT_STEP):
            note.write_text("now")
            deadline = time.monotonic() + 60
            while not go(note).exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            if go(note).read_text() == "with a signal":
                signalled.wait(60)
        return original(self, *arguments, **options)

    setattr(owner, name, waiting)
    Trainer._on_signal = handling


def go(note: Path) -> Path:
    return note.with_suffix(".go")


def plans() -> list[tuple[int, str, str, int]]:
    """(signal, target, moment, how often)"""
    if NIGHTLY:
        return [
            (number, target, moment, times)
            for number in SIGNALS
            for target in ("rank 0", "rank 1", "all", "launcher")
            for moment in ("forward", "update", "save")
            for times in (1, 2)
            if (target, number) != ("launcher", signal.SIGUSR1)  # which torchrun does not pass on
        ]
    return [
        (signal.SIGTERM, "rank 1", "forward", 1),
        (signal.SIGINT, "all", "save", 2),
        (signal.SIGUSR1, "rank 0", "update", 1),
        (signal.SIGTERM, "launcher", "forward", 2),
    ]


def test_a_signal_saves_and_the_same_command_continues_bitwise(images, memory):
    flags = ("--save_every", "4")
    toy.train(images, memory / "whole", *flags, processes=2)
    expected = toy.state_hash(memory / "whole")
    with promise(
        5, "SIGTERM, SIGINT, SIGUSR1 to a rank, all or the launcher, in a step or save, twice"
    ) as cases:
        for case, (number, target, moment, times) in enumerate(plans()):
            name = f"{signal.Signals(number).name} x {times} to {target} in {moment}"
            with cases.case(name):
                out, note = memory / f"run{case}", memory / f"{case}.note"
                hook = partial(announcing, moment=moment, note=note)
                launcher = 0 if target == "launcher" else None
                job = toy.start(images, out, *flags, processes=2, hook=hook, launcher=launcher)
                job.until(note.exists)
                begun = time.monotonic()
                for _ in range(times):
                    job.send(number, int(target[-1]) if target.startswith("rank") else None)
                    time.sleep(0.05)
                write_text(go(note), "" if target == "rank 1" else "with a signal")
                codes = job.wait(30)
                assert time.monotonic() - begun < 10, job.text
                sent = 128 + number
                if target == "launcher":
                    assert codes[0] != 0, job.text
                elif target == "all":
                    assert codes == [sent, sent], (codes, job.text)
                else:
                    victim = int(target[-1])
                    assert codes[victim] == sent and codes[1 - victim] == 143, (codes, job.text)
                reached = toy.newest(out)
                assert reached > 0 and f"after step {reached}" in job.text, job.text
                assert not job.orphans
                toy.train(images, out, *flags, processes=2)
                assert toy.state_hash(out) == expected


def test_a_signal_to_the_whole_group_of_a_single_process(images, memory):
    toy.train(images, memory / "whole")
    with promise(5, "a signal to the process group of a single process with its loader threads") as cases:
        for number in SIGNALS if NIGHTLY else SIGNALS[:1]:
            with cases.case(signal.Signals(number).name):
                out, note = memory / f"run{number}", memory / f"{number}.note"
                job = toy.start(images, out, hook=partial(announcing, moment="forward", note=note))
                job.until(note.exists)
                os.killpg(job.processes[0].pid, number)
                write_text(go(note), "with a signal")
                assert job.wait(30) == [128 + number], job.text
                assert toy.newest(out) == AT_STEP - 1 or toy.newest(out) == AT_STEP, job.text
                toy.train(images, out)
                assert toy.state_hash(out) == toy.state_hash(memory / "whole")
