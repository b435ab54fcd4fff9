from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton reads this when a kernel is defined: where there is no GPU, its kernels run in its interpreter on CPU
# tensors. Ahead-of-time compilation, which needs the real compiler, has a process of its own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell's background jobs ignore SIGINT, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from fastdino_kernels import backend  # noqa: E402


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where the test's tensors belong, with the triton backend chosen: the GPU, or the CPU interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with backend("triton"):
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A program that does as this Python does, without its imports taking time. It sees no GPU."""
    folder, zygote = tmp_path_factory.mktemp("zygote"), Path(__file__).with_name("zygote.py")
    program, place = folder / "python", folder / "socket"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I {zygote} {place} "$@"\n')
    program.chmod(0o755)
    root = zygote.parents[1]
    known = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | known
    server = subprocess.Popen([sys.executable, zygote, "--serve", place], env=environment)
    while not place.exists():
        assert server.poll() is None, "the server has ended"
        time.sleep(0.01)
    yield str(program)
    server.kill()
    server.wait()
