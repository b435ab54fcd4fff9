"""The training command as a user types it, on the smallest run that has every part of a large one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A run of a few seconds: 96 images, 12 steps per epoch, 24 steps.
FLAGS = """ --arch vit_tiny --embed_dim 32 --depth 2 --num_heads 2 --patch_size 8 --out_dim 64
--head_hidden_dim 32 --bottleneck_dim 16 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2
--batch_size_per_gpu 8 --epochs 2 --warmup_epochs 1 --num_workers 1 --logger none --log_every 4 --report false
--device cpu --lr 0.01 """.split()


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def command(data: Path, out: Path, *flags: str, processes: int = 1) -> list[str]:
    """The training command; with several ``processes`` it goes through torchrun."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        *launch,
        str(ROOT / "train.py"),
        "--data_path",
        str(data),
        "--output_dir",
        str(out),
        *FLAGS,
        *flags,
    ]


def train(
    data: Path, out: Path, *flags: str, processes: int = 1, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run it to its end and check its exit code."""
    done = subprocess.run(
        command(data, out, *flags, processes=processes),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        cwd=out.parent,
    )
    assert done.returncode == code, (
        f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    )
    return done
