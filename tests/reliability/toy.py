"""The training command many times in seconds: processes forked from one that has imported everything.

A run is that of tests/runs.py, in as many processes as asked for, under no launcher or torchrun's agent.
A hook, a function of a test's choice, runs in each process before training and may break what it likes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastdino.config import Config, config_from_flags
from fastdino.engine import checkpoint
from runs import FLAGS, forks, free_port, place, redirect

SMALL = [*FLAGS, "--prescan", "off", "--precision", "fp32", "--drop_path_rate", "0.1"]


def config(**changed: str) -> Config:
    """That of a run, without its paths."""
    flags = {name.removeprefix("--"): value for name, value in zip(SMALL[::2], SMALL[1::2], strict=True)}
    return config_from_flags(**{**flags, "data_path": "x", "output_dir": "y", **changed})


Hook = Callable[[int], None]
"""Called with the rank before training."""


class Job:
    """The processes of a run; they write to one log."""

    def __init__(self, processes: list[Any], log: Path):
        self.processes, self.log, self.ended_at = processes, log, 0.0

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        over = all(process.exitcode is not None for process in self.processes)
        self.ended_at = self.ended_at or (time.monotonic() if over else 0.0)
        return over

    @property
    def orphans(self) -> list[int]:
        """What the processes have started and left behind: each is the first of its own group."""
        groups = {str(process.pid) for process in self.processes}
        return [pid for pid, fields in _processes() if fields[2] in groups and fields[0] != "Z"]

    @property
    def workers(self) -> list[int]:
        """Processes that the first process has started, in the order of their ids."""
        return sorted(pid for pid, fields in _processes() if fields[1] == str(self.processes[0].pid))

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one process, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes, those of killed processes negative. AssertionError, and no process left, after
        ``seconds``.
        """
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        if late:
            self.kill()
            raise AssertionError(f"still running after {seconds:g} s: {late}\n{self.text}")
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to every process and what it started."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes:
            process.join(20)

    def until(self, what: Callable[[], bool], seconds: float = 60) -> None:
        """Return once ``what`` is true. AssertionError if the run ends or ``seconds`` pass before."""
        deadline = time.monotonic() + seconds
        while not what():
            assert not self.ended and time.monotonic() < deadline, self.text
            time.sleep(0.002)


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Id of every process with its state, parent, process group, ..."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            yield int(status.parent.name), status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile


def runs(pid: int) -> bool:
    return any(pid == other and fields[0] != "Z" for other, fields in _processes())


def start(
    data: Path,
    out: Path,
    *flags: str,
    processes: int = 1,
    hook: Hook | None = None,
    launcher: int | None = None,
) -> Job:
    """Begin a run; with ``launcher`` in one more process, torchrun's agent, which restarts the others up to
    so many times.
    """
    words = ["--data_path", str(data), "--output_dir", str(out), *SMALL, *flags]
    log = out.parent / f"{out.name}.log"
    port = free_port()
    if launcher is not None:
        jobs = [forks.Process(target=_launch, args=(words, log, processes, launcher, hook))]
    else:
        jobs = [
            forks.Process(target=_rank, args=(words, log, rank, processes, port, hook))
            for rank in range(processes)
        ]
    for job in jobs:
        job.start()
    return Job(jobs, log)


def watch(jobs: list[Job], seconds: float) -> None:
    """Return when all have ended, each with the time of its end, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not all([job.ended for job in jobs]) and time.monotonic() < deadline:
        time.sleep(0.02)


def train(data: Path, out: Path, *flags: str, code: int = 0, **options: Any) -> Job:
    """Run to the end and check the exit codes."""
    job = start(data, out, *flags, **options)
    codes = job.wait()
    assert codes == [code] * len(codes), f"exit codes {codes}, expected {code}\n{job.text}"
    return job


def together(work: Callable[..., None], size: int, folder: Path, *arguments: Any) -> None:
    """``work(rank, *arguments)`` in ``size`` processes of one gloo group. AssertionError with what they wrote
    if any fails.
    """
    log = folder / f"together{len(list(folder.iterdir()))}.log"
    port = free_port()
    jobs = [forks.Process(target=_member, args=(work, r, size, port, log, arguments)) for r in range(size)]
    for job in jobs:
        job.start()
    group = Job(jobs, log)
    assert group.wait() == [0] * size, group.text


def _member(
    work: Callable[..., None], rank: int, size: int, port: int, log: Path, arguments: tuple[Any, ...]
) -> None:
    from fastdino.engine import parallel

    os.setsid()
    redirect(log, 1, 2)
    torch.set_num_threads(1)
    place(rank, size, port)
    parallel.start("cpu")
    work(rank, *arguments)
    parallel.stop()


def _rank(words: list[str], log: Path, rank: int, size: int, port: int, hook: Hook | None) -> None:
    os.setsid()
    redirect(log, 1, 2)
    if size > 1:
        place(rank, size, port)
    _train(words, hook)


def _launch(words: list[str], log: Path, size: int, restarts: int, hook: Hook | None) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setsid()
    redirect(log, 1, 2)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _train)(words, hook)


def _train(words: list[str], hook: Hook | None) -> None:
    from fastdino import cli
    from fastdino.engine import logs

    torch.set_num_threads(1)
    logs._commit = lambda: None  # asks git, which takes longer than the training
    if hook is not None:
        hook(int(os.environ.get("RANK", "0")))
    sys.exit(cli.main(words))


def state_hash(out: Path) -> str:
    """SHA-256 of the newest checkpoint of a run: student, teacher, center, optimizer, schedules, counters."""
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None, f"no checkpoint in {out}"
    model, optimizer, meta = checkpoint.load(path)
    digest = hashlib.sha256()
    for tensors in (model, optimizer):
        for name in sorted(tensors):
            digest.update(name.encode() + str(tensors[name].dtype).encode() + tensors[name].numpy().tobytes())
    known = {key: meta[key] for key in ("step", "epoch", "scaler", "counters", "epoch_sums", "identity")}
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()


def newest(out: Path) -> int:
    """Step of the newest checkpoint, -1 without any; unverified."""
    found = checkpoint.checkpoints(out / "checkpoints")
    return checkpoint.step_of(found[0]) if found else -1


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def seeded(*words: object) -> random.Random:
    return random.Random(" ".join(map(str, words)))


def note_batches(file: Path) -> None:
    """From now on every step of this process appends its samples to ``file``."""
    from fastdino.engine.step import TrainStep

    enqueue = TrainStep.enqueue

    def noted(self: TrainStep, batches: Any, *arguments: Any) -> None:
        def noting() -> Any:
            for crops in batches:
                with open(file, "a") as lines:
                    lines.write(json.dumps(crops.ids.tolist()) + "\n")
                yield crops

        enqueue(self, noting(), *arguments)

    TrainStep.enqueue = noted  # type: ignore[method-assign]
