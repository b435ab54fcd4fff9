"""Goal 23: of many starts in one output directory one runs, the others name it and end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastdino
from fastdino.engine import exits, lock
from fastdino.engine.step import TrainStep
from reliability.promises import cases_of, promise
from runs import FLAGS, ROOT, command, environment

HOLD = """
import sys, time
from pathlib import Path
from fastdino.engine import lock
lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def start(*line: str) -> subprocess.Popen:
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))),
        cwd=ROOT / "tests",
    )


def test_of_many_simultaneous_starts_one_runs(images, tmp_path):
    out, number = tmp_path / "out", cases_of(ci=8, nightly=20)
    line = command(images, out, "--epochs", "500")
    processes = [start(*line) for _ in range(number)]
    refused = {}
    deadline = time.monotonic() + 300
    while len(refused) < number - 1 and time.monotonic() < deadline:
        for process in [process for process in processes if process not in refused]:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                refused[process] = used.ru_utime + used.ru_stime
        time.sleep(0.02)
    (holder,) = (process for process in processes if process not in refused)
    try:
        with promise(23, f"{number} simultaneous starts") as cases:
            for process, seconds in refused.items():
                with cases.case(f"process {process.pid}"):
                    text = process.stderr.read()
                    assert process.returncode == exits.OUTPUT, text
                    host = lock.socket.gethostname()
                    assert f"{out}: in use by another run: process {holder.pid} on {host}, since" in text
                    assert len(text.splitlines()) == 1, text
                    assert seconds < 2, f"{seconds} s of the processor"
            with cases.case("the one that runs"):
                assert holder.poll() is None
                while not (out / "metrics.jsonl").exists():
                    assert holder.poll() is None, holder.communicate()
                    time.sleep(0.02)
    finally:
        holder.kill()
        holder.communicate()
    with promise(23, "a start after the run was killed") as cases, cases.case("the same command"):
        lock.take(out)
        lock.release(out)


def test_the_lock_is_free_after_a_sigkill(tmp_path):
    with promise(23, "the lock after a SIGKILL") as cases:
        for number in range(cases_of(ci=5, nightly=50)):
            with cases.case(f"kill {number}"):
                holder = start(sys.executable, "-c", HOLD, str(tmp_path))
                assert holder.stdout.readline() == "held\n"
                with pytest.raises(lock.OutputError, match=f"in use by another run: process {holder.pid} on"):
                    lock.take(tmp_path)
                holder.send_signal(signal.SIGKILL)
                holder.communicate()
                lock.take(tmp_path)
                lock.release(tmp_path)


def test_a_child_that_lives_on_does_not_hold_the_lock(tmp_path):
    with promise(23, "the lock while a child of the killed run lives") as cases, cases.case("fork"):
        lock.take(tmp_path)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        lock.release(tmp_path)
        holder = start(sys.executable, "-c", HOLD, str(tmp_path))
        try:
            assert holder.stdout.readline() == "held\n", holder.stderr.read()
        finally:
            holder.kill()
            holder.communicate()
            os.close(write)
            os.close(read)
            os.waitpid(child, 0)


def test_a_process_may_take_its_lock_again_and_sees_when_it_is_lost(tmp_path):
    out = tmp_path / "a" / "b"
    with promise(23, "the lock of one process") as cases:
        with cases.case("taken twice"):
            lock.take(out)
            lock.take(Path(os.path.relpath(out)))
            lock.check(out)
        for change in (lambda: (out / lock.NAME).unlink(), lambda: out.rename(tmp_path / "gone")):
            with cases.case("lost"):
                change()
                with pytest.raises(FileNotFoundError, match="removed or replaced"):
                    lock.check(out)
        with cases.case("lost, as another file's error shows"):
            with pytest.raises(FileNotFoundError, match="removed or replaced"), lock.explaining(out):
                (out / "train.log").open("a")
        lock.release(out)
        with cases.case("an error that has another reason"):
            with pytest.raises(FileNotFoundError, match="train.log"), lock.explaining(out):
                (out / "train.log").open("a")
        lock.check(out)


def assert_free(out: Path) -> None:
    process = start(sys.executable, "-c", HOLD, str(out))
    assert process.stdout.readline() == "held\n", process.stderr.read()
    process.kill()
    process.wait()


def test_a_call_that_fails_lets_the_folder_go(images, tmp_path, monkeypatch):
    """Of a notebook, say, which goes on afterwards."""
    (tmp_path / "empty").mkdir()
    with promise(23, "a failed call from Python lets another process have the folder") as cases:
        with cases.case("no images"):
            with pytest.raises(ValueError, match="no image"):
                fastdino.train(tmp_path / "out", tmp_path / "empty", device="cpu")
            assert_free(tmp_path / "out")
        with cases.case("an error in training"):
            monkeypatch.setattr(TrainStep, "enqueue", lambda *_: next(iter([])))
            flags = {name[2:]: value for name, value in zip(FLAGS[::2], FLAGS[1::2], strict=True)}
            with pytest.raises(StopIteration):
                fastdino.train(tmp_path / "out", images, **flags)
            assert_free(tmp_path / "out")
