"""The arithmetic of bench/roofline.py, and that it finds what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.roofline import GPUS, Row, problems, residency, survey, table

ROW = Row(
    "m", "kernel", "A100", 80, "K=8", 64, 0, 1024, 4, 8, 0.5, "registers", 864, 1.0, 2039, 0, 0.001, "bytes"
)


@pytest.mark.parametrize(
    "capability,registers,shared,warps,expected",
    [
        (80, 32, 0, 4, (16, "warps")),
        (80, 32, 0, 1, (32, "programs")),
        (80, 128, 0, 4, (4, "registers")),
        (80, 129, 0, 4, (3, "registers")),  # 136 after rounding: 15 warps, of which 12 in multiples of 4
        (80, 255, 0, 8, (1, "registers")),
        (80, 32, 40 * 1024, 4, (4, "shared")),  # 1 KiB more for the system
        (90, 32, 227 * 1024, 4, (1, "shared")),
        (90, 32, 228 * 1024, 4, (0, "shared")),
        (70, 32, 48 * 1024, 4, (2, "shared")),
        (70, 32, 49 * 1024, 4, (1, "shared")),
    ],
)
def test_programs_per_multiprocessor(
    capability: int, registers: int, shared: int, warps: int, expected: tuple[int, str]
) -> None:
    assert residency(GPUS[capability], registers, shared, warps) == expected


def test_problems_are_named() -> None:
    assert problems(ROW) == []
    assert "spills 8 bytes" in problems(replace(ROW, spilled=8))[0]
    assert "shared memory, budget 163840" in problems(replace(ROW, shared=164 * 1024))[0]
    assert "does not fit" in problems(replace(ROW, programs_per_sm=0))[0]
    assert problems(replace(ROW, flops=1)) == []
    assert "matrix products" in problems(replace(ROW, capability=70, flops=1))[0]


def test_a_name_that_is_no_module() -> None:
    pytest.importorskip("triton")
    rows, found = survey(["nothing"], 1)
    assert rows == [] and "nothing" in found[0]
    assert "A100" in table([ROW])


KERNEL = """
import triton, triton.language as tl
from fastdino_kernels.gpu.launch import Launch

@triton.jit
def described(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) * 2)

@triton.jit
def forgotten(x_ptr):
    tl.store(x_ptr, 1.0)

def run(x):
    described[(1,)](x, N=128)
    forgotten[(1,)](x)

def launches():
    return [Launch("described", described, dict(x_ptr="*fp32"), dict(N=128), 4, 1, "N=128", 1, 1024)]
"""


def test_a_launched_kernel_that_nobody_describes_is_found(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "made_up.py").write_text(KERNEL)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import made_up\nfrom bench.roofline import undescribed, launched_kernels\n"
        "print(sorted(launched_kernels(made_up)), undescribed([made_up]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['described', 'forgotten'] ['made_up: forgotten is launched")


def test_gpus_are_what_their_data_sheets_say() -> None:
    assert [(g.name, g.bandwidth / 1e9, g.flops / 1e12) for g in GPUS.values()] == [
        ("V100", 900, 112),
        ("A100", 2039, 312),
        ("H200", 4800, 989),
    ]
