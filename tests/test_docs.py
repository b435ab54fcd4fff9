"""Every code block of the documents runs, ``sh`` and ``python``: each document's in order, in a folder of its
own that holds what the examples name. Commands are the real ones, on a network and data of toy size.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import FLAGS, ROOT

DOCUMENTS = ["README.md", "fastdino/RECIPES.md", "fastdino/TROUBLESHOOTING.md", "kernels/README.md"]
LINKING = [*DOCUMENTS, "bench/README.md", "tests/reliability/README.md"]
OFFICIAL = "official_checkpoint.pth"
SHOWN = {"text", ""}  # blocks that show something and are not run

# What a command is here: the real program, on toy sizes where it trains or would need a cluster.
COMMANDS = {
    "python": """
case "$*" in
  "train.py "*--list_presets*|"train.py "*--help*) exec {python} {root}/"$@" ;;
  "train.py "*) exec {python} {root}/"$@" {toy} ;;
  "-m fastdino.evaluation linear"*) exec {python} "$@" --epochs 2 ;;
  "-m fastdino.evaluation report"*) exec {python} "$@" --image_size 32 --protocols knn attention pca ;;
  *) exec {python} "$@" ;;
esac""",
    "torchrun": """
until [ "${{1%.py}}" != "$1" ]; do shift; done
script=$1; shift
exec {python} -m torch.distributed.run --standalone --nproc_per_node=2 {root}/$script "$@" {toy}""",
    "srun": 'exec "$@"',
    "scontrol": "echo node1",
    "make": 'exec {make} --dry-run --directory={root} "$@"',
    "pip": """
extra=$(echo "$*" | sed -n 's/.*\\[\\(.*\\)\\].*/\\1/p')
exec grep -q "^ *.$extra.: ." {root}/setup.py""",
}
TOY = [*FLAGS, "--batch_size", "16", "--max_steps", "3", "--epochs", "1", "--local_crops_scale", "0.2", "0.5"]


def blocks(document: str) -> list[tuple[int, str, str]]:
    """Line, language and text of every fenced block."""
    found, language, start, lines = [], None, 0, []
    for number, line in enumerate((ROOT / document).read_text().splitlines(), 1):
        if language is None and line.startswith("```"):
            language, start, lines = line[3:].strip(), number, []
        elif language is not None and line.startswith("```"):
            found.append((start, language, "\n".join(lines) + "\n"))
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{document}:{start}: the block does not end"
    return found


def pictures(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 64), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")


@pytest.fixture
def sandbox(tmp_path: Path, quick_python: str) -> Path:
    """The folder that examples run in: their data, and their commands in ``bin``."""
    for i, kind in enumerate(("bird", "cat")):
        pictures(tmp_path / "photos" / kind, 16, i)
        pictures(tmp_path / "labelled" / "train" / kind, 6, 2 + i)
        pictures(tmp_path / "labelled" / "val" / kind, 4, 4 + i)
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "train").symlink_to(tmp_path / "photos")
    shutil.copy(tmp_path / "photos" / "cat" / "0.jpg", tmp_path / "picture.jpg")
    np.save(tmp_path / "tiles.npy", np.random.default_rng(0).normal(size=(32, 12, 80, 96)).astype(np.float32))
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in COMMANDS.items():
        toy = " ".join(TOY)
        script = text.format(python=quick_python, root=ROOT, toy=toy, make=shutil.which("make"))
        (binaries / name).write_text(f"#!/bin/sh\n{script.strip()}\n")
        (binaries / name).chmod(0o755)
    (binaries / "quick").symlink_to(quick_python)
    return tmp_path


def run(block: str, language: str, sandbox: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{sandbox / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "PYTHON_EXEC": str(sandbox / "bin" / "quick"),  # what torchrun starts
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "node1",
    }
    quick = str(sandbox / "bin" / "quick")
    command = ["bash", "-e", "-c", block] if language == "sh" else [quick, "-c", block]
    return subprocess.run(command, cwd=sandbox, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_run(document: str, sandbox: Path) -> None:
    ran = 0
    for line, language, block in blocks(document):
        if language in SHOWN:
            continue
        assert language in ("sh", "python"), f"{document}:{line}: a block in {language!r}"
        if OFFICIAL in block:  # a file of the official code: what ours exports is one
            export = f"python -m fastdino.interop.official export runs/photos {OFFICIAL}"
            assert run(export, "sh", sandbox).returncode == 0
        done = run(block, language, sandbox)
        assert done.returncode == 0, (
            f"{document}:{line}\n{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
        ran += 1
    assert ran


def test_links_lead_somewhere() -> None:
    for document in LINKING:
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"
