"""A worker dies, torchrun starts the group again, and the run ends with the weights of an undisturbed one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastdino.engine import checkpoint
from runs import command, environment

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")


def start(images, out, mesh):
    line = command(images, out, "--epochs", "6", "--save_every", "5", "--mesh", mesh, processes=2)
    line.insert(line.index("--standalone"), "--max-restarts=1")
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Else the second group reads the first one's addresses in torchrun's store and never connects.
        env=environment(),
        cwd=out.parent,
    )


def finish(process):
    try:
        text = process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends the workers too
        raise AssertionError(process.communicate(timeout=60)[0]) from None
    assert process.returncode == 0, text
    return text


def worker(launcher, rank):
    """The process that torchrun gave ``rank``."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}" in (status.parent / "environ").read_text().split("\0"):
                return int(status.parent.name)
        except OSError:
            continue  # it has ended meanwhile
    raise AssertionError(f"no worker of rank {rank}")


@pytest.mark.parametrize("mesh", ["replicate", "shard"])
def test_a_run_whose_worker_is_killed_ends_as_an_undisturbed_one(images, tmp_path, mesh):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(images, whole, mesh))
    process = start(images, killed, mesh)
    deadline = time.monotonic() + 60
    while not (killed / "checkpoints" / "step-00000005").exists():
        assert time.monotonic() < deadline and process.poll() is None, finish(process)
        time.sleep(0.002)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    text = finish(process)
    continued = re.search(r"continuing after step (\d+)", text)
    assert continued and 5 <= int(continued[1]) < 36, text
    wanted, found = (checkpoint.load(checkpoint.latest(out / "checkpoints")) for out in (whole, killed))
    assert wanted[2]["step"] == found[2]["step"] == 36
    version = checkpoint.SHARDED_FORMAT if mesh == "shard" else checkpoint.FORMAT
    assert wanted[2]["format"] == found[2]["format"] == version
    for one, two in zip(wanted[:2], found[:2], strict=True):
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
