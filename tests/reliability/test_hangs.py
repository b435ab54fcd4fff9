"""A process that hangs, is stopped or fails takes the others with it, soon and with a name; torchrun starts
all of them again and nothing is lost.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdino.data.loader import MultiCropLoader
from fastdino.engine import exits
from fastdino.engine.disk import Disk
from fastdino.engine.step import TrainStep
from reliability import toy
from reliability.promises import IN_MEMORY, NIGHTLY, cases_of, promise

TIMEOUT = 10 if NIGHTLY else 4
AT_STEP = 6
SITES = {
    "data": "data",
    "forward": "forward",
    "collective": "reduction",
    "save": "save",
}  # and phase in messages


def at(rank: int, victim: int, site: str, act) -> None:
    """Process ``victim`` does ``act`` in its 7th step at ``site``, once over all restarts."""
    if rank != victim or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    owner, name = {
        "data": (MultiCropLoader, "__next__"),
        "forward": (TrainStep, "forward"),
        "collective": (TrainStep, "reduce"),
        "save": (Disk, "rename"),
        "background": (Disk, "create"),
    }[site]
    original, calls = getattr(owner, name), []
    before = 0 if owner is Disk else AT_STEP
    before += site == "data" and rank == 0  # whose first batch is for crops.png

    def acting(self, *arguments, **options):
        calls.append(1)
        if len(calls) > before:
            act()
        return original(self, *arguments, **options)

    setattr(owner, name, acting)


def hang(note: Path, how: str) -> None:
    note.write_text(repr(time.monotonic()))
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while how == "spin":
        pass
    time.sleep(10_000)


def hanging(rank: int, victim: int, site: str, how: str, note: Path) -> None:
    at(rank, victim, site, partial(hang, note, how))


def seconds_since(note: Path) -> float:
    return time.monotonic() - float(note.read_text())


def hang_cases() -> list[tuple[int, str, str]]:
    """(rank, site, how)"""
    if NIGHTLY:
        every = [(v, s, h) for v in (0, 1) for s in SITES for h in ("sleep", "spin", "stop")]
        every = [case for case in every if case[:2] != (1, "save")]  # rank 0 alone writes
        return (2 * every)[:40]
    return [
        (1, "data", "sleep"),
        (0, "forward", "spin"),
        (1, "collective", "sleep"),
        (0, "save", "sleep"),
        (1, "forward", "stop"),
        (0, "data", "stop"),
    ]


def test_a_hang_ends_all_processes_and_names_rank_and_phase(images, memory):
    flags = ("--hang_timeout", str(TIMEOUT), "--epochs", "4", "--save_every", "4")
    pending = list(enumerate(hang_cases()))
    with promise(11, "one of two ranks hangs or is stopped in data, forward, collective, save") as cases:
        while pending:
            running = []
            for number, (victim, site, how) in pending[:6]:
                note = memory / f"{number}.note"
                hook = partial(hanging, victim=victim, site=site, how=how, note=note)
                out = memory / f"hang{number}"
                running.append(
                    (victim, site, how, note, toy.start(images, out, *flags, processes=2, hook=hook))
                )
            del pending[:6]
            toy.watch([job for *_, job in running], TIMEOUT + 60)
            for victim, site, how, note, job in running:
                # A save hangs in the background until the next one, at the end of the epoch, waits for it.
                at_step = 5 if site == "save" else AT_STEP
                place = rf"rank {victim} in {SITES[site]} of step {at_step} \("
                if (site, how) == ("save", "stop"):  # which stops the training thread too, wherever it is
                    place = rf"rank {victim} in \w+ of step \d+ \("
                with cases.case(f"rank {victim} {how} in {site}"):
                    took, codes = job.ended_at - float(note.read_text()), job.wait()
                    assert codes[1 - victim] == exits.HUNG, (codes, job.text)
                    assert codes[victim] == (-signal.SIGKILL if how == "stop" else exits.HUNG), (
                        codes,
                        job.text,
                    )
                    assert TIMEOUT - 0.5 < took < TIMEOUT + 5, f"{took:.1f} s\n{job.text}"
                    named = re.findall(r"HANG: .* for \d+ s: (.*) \(--hang_timeout\)", job.text)
                    assert named and all(re.fullmatch(place + ".*", name) for name in named), job.text


def test_torchrun_restarts_a_hung_run_and_the_bits_are_those_of_an_undisturbed_one(images, memory):
    flags = ("--hang_timeout", str(TIMEOUT), "--save_every", "4")
    toy.train(images, memory / "whole", *flags, processes=2)
    wanted = [(1, "data", "stop"), (0, "collective", "sleep"), (1, "forward", "spin"), (0, "save", "sleep")]
    with promise(11, "restart by torchrun's agent after a hang, bitwise") as cases:
        for number, (victim, site, how) in enumerate(wanted[: cases_of(1, 4)]):
            with cases.case(f"rank {victim} {how} in {site}"):
                out = memory / f"restarted{number}"
                hook = partial(hanging, victim=victim, site=site, how=how, note=memory / f"r{number}.note")
                job = toy.start(images, out, *flags, processes=2, launcher=1, hook=hook)
                assert job.wait(TIMEOUT + 60) == [0], job.text
                assert "HANG" in job.text and toy.state_hash(out) == toy.state_hash(memory / "whole"), (
                    job.text
                )


def test_a_single_process_that_hangs_ends_too_and_a_suspended_one_goes_on(images, memory):
    flags = ("--hang_timeout", "3")
    with promise(11, "a single process hangs, or is suspended and continued") as cases:
        with cases.case("hangs in data"):
            note = memory / "note"
            hook = partial(hanging, victim=0, site="data", how="sleep", note=note)
            job = toy.train(images, memory / "hung", *flags, hook=hook, code=exits.HUNG)
            assert "no progress for 3 s: rank 0 in data of step 6" in job.text, job.text
            assert "most recent call first" in job.text and "in hang" in job.text  # where it hung
        with cases.case("suspended for longer than the limit"):
            out = memory / "suspended"
            job = toy.start(images, out, *flags, "--epochs", "4")
            job.until(lambda: (out / "metrics.jsonl").exists())
            job.send(signal.SIGSTOP)
            time.sleep(5)
            job.send(signal.SIGCONT)
            assert job.wait() == [0], job.text


# -- failures ------------------------------------------------------------------------------------------------


def no_memory() -> None:
    """A real MemoryError: the address space may not grow."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    bytearray(1 << 32)


def raise_it(note: Path, kind: str) -> None:
    note.write_text(repr(time.monotonic()))
    if kind == "memory":
        no_memory()
    if kind == "device memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if kind == "runtime":
        raise RuntimeError("the first error")
    raise ValueError("the first error")


def failing(rank: int, victim: int, site: str, kind: str, note: Path) -> None:
    at(rank, victim, site, partial(raise_it, note, kind))


ERRORS = {
    "value": "ValueError: the first error",
    "runtime": "RuntimeError: the first error",
    "memory": "MemoryError",
    "device memory": "CUDA out of memory",
}


def failure_cases() -> list[tuple[int, str, str]]:
    if NIGHTLY:
        return [
            (v, s, k)
            for _ in range(5)
            for v in (0, 1)
            for s in ("data", "forward", "collective")
            for k in ERRORS
        ]
    return [
        (1, "forward", "value"),
        (0, "data", "memory"),
        (1, "collective", "device memory"),
        (0, "forward", "runtime"),
    ]


def in_shared_memory() -> set[str]:
    """Names in /dev/shm besides those of the fixture ``memory``."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(IN_MEMORY)}


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks for what is left in /dev/shm")
def test_one_failure_ends_all_processes_and_is_told_first(images, memory):
    shared = in_shared_memory()
    with promise(
        12, "one of two ranks raises: the other stops, the first error first, nothing left"
    ) as cases:
        pending = list(enumerate(failure_cases()))
        running = []
        while pending or running:
            for number, (victim, site, kind) in pending[:4] if not running else ():
                note = memory / f"{number}.note"
                hook = partial(failing, victim=victim, site=site, kind=kind, note=note)
                job = toy.start(images, memory / f"fail{number}", processes=2, hook=hook)
                running.append((victim, site, kind, note, job))
                pending = pending[1:]
            toy.watch([job for *_, job in running], 60)
            victim, site, kind, note, job = running.pop(0)
            with cases.case(f"{kind} on rank {victim} in {site}"):
                took, codes = job.ended_at - float(note.read_text()), job.wait()
                assert codes[victim] == 1 and codes[1 - victim] != 0, (codes, job.text)
                assert took < 10, f"{took:.1f} s\n{job.text}"
                first = job.text[job.text.index("Traceback") :]
                assert ERRORS[kind] in first.split("Traceback")[1], job.text
                assert not job.orphans, job.orphans
    deadline = time.monotonic() + 60
    while in_shared_memory() - shared and time.monotonic() < deadline:
        time.sleep(0.1)  # another test's may go away, what a run has left does not
    assert in_shared_memory() <= shared


def test_no_worker_outlives_its_launcher(images, memory):
    out = memory / "run"
    with promise(12, "SIGKILL of torchrun's agent leaves no process behind") as cases:
        with cases.case("two ranks"):
            job = toy.start(images, out, "--epochs", "400", "--hang_timeout", "4", processes=2, launcher=0)
            job.until(lambda: (out / "metrics.jsonl").exists())
            workers = job.workers
            assert len(workers) >= 2
            os.kill(job.processes[0].pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while any(toy.runs(pid) for pid in workers) and time.monotonic() < deadline:
                time.sleep(0.05)
            left = [pid for pid in workers if toy.runs(pid)]
            job.kill()
            assert not left, job.text
            assert re.search(r"stopped by SIG(INT|TERM) after step", job.text), job.text
