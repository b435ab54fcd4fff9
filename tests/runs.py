"""The training command as a user types it, on the smallest run that has every part of a large one."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# A run of a few seconds: 96 images, 12 steps per epoch, 24 steps.
FLAGS = """ --arch vit_tiny --embed_dim 32 --depth 2 --num_heads 2 --patch_size 8 --out_dim 64
--head_hidden_dim 32 --bottleneck_dim 16 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2
--batch_size_per_gpu 8 --epochs 2 --warmup_epochs 1 --num_workers 1 --logger none --log_every 4 --report false
--device cpu --lr 0.01 """.split()

# Processes forked from one that has imported everything: imports take longer than such a run.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    [
        "fastdino.cli",
        "fastdino.engine.trainer",
        "fastdino.engine.sharding",
        "fastdino.data.preview",
        "nvidia.dali.fn",
        "runs",
        "reliability.toy",
    ]
)


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def command(data: Path, out: Path, *flags: str, processes: int = 1) -> list[str]:
    """The training command; with several ``processes`` it goes through torchrun."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launch, str(ROOT / "train.py"), *_words(data, out, *flags)]


class Done(NamedTuple):
    """What all processes of a run wrote."""

    stdout: str
    stderr: str


def train(data: Path, out: Path, *flags: str, processes: int = 1, code: int = 0) -> Done:
    """Run :func:`command` to its end, without torchrun and in forked processes, and check the exit codes."""
    streams = [out.with_name(f"{out.name}.{stream}") for stream in ("stdout", "stderr")]
    for stream in streams:
        stream.unlink(missing_ok=True)
    port = free_port()
    words = _words(data, out, *flags)
    codes = exit_codes(_run, [(words, streams, rank, processes, port) for rank in range(processes)], 300)
    done = Done(*(stream.read_text() for stream in streams))
    assert codes == [code] * processes, f"exit codes {codes}, expected {code}\n{done.stdout}\n{done.stderr}"
    return done


def exit_codes(work: Callable[..., None], arguments: Iterable[tuple[Any, ...]], seconds: float) -> list[int]:
    """Of forked processes, one for each of ``arguments``; who has not ended after ``seconds`` is killed."""
    jobs = [forks.Process(target=work, args=given) for given in arguments]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(seconds)
        if job.exitcode is None:
            job.kill()
            job.join()
    return [job.exitcode for job in jobs]


def spawn(work: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """``work(rank, *arguments)`` in each of ``processes``. Raises what one of them raises."""
    import torch.multiprocessing as mp

    mp.start_processes(work, arguments, processes, start_method="forkserver")


def _words(data: Path, out: Path, *flags: str) -> list[str]:
    return ["--data_path", str(data), "--output_dir", str(out), *FLAGS, *flags]


def _run(words: list[str], streams: list[Path], rank: int, size: int, port: int) -> None:
    import torch

    from fastdino import cli

    for descriptor, stream in enumerate(streams, 1):
        redirect(stream, descriptor)
    os.chdir(streams[0].parent)
    torch.set_num_threads(1)
    if size > 1:
        place(rank, size, port)
    sys.exit(cli.main(words))


def redirect(log: Path, *descriptors: int) -> None:
    """Append what this process writes to them to ``log``; it sees no GPU."""
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in descriptors:
        os.dup2(opened, descriptor)
    os.close(opened)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def place(rank: int, size: int, port: int) -> None:
    """What torchrun tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


_kept: deque[socket.socket] = deque(maxlen=64)


def free_port() -> int:
    """A port that the system gives to nobody who asks for any, while it is among the last of these."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # whoever asks for this one may have it
    holder.bind(("127.0.0.1", 0))
    _kept.append(holder)
    return holder.getsockname()[1]
