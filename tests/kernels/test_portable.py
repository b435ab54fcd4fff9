"""One library for every processor of its kind: vector instructions only where they were asked for first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastdino_kernels import csrc

from source_tree import ROOT, needs_compiler

X86 = pytest.mark.skipif(os.uname().machine not in ("x86_64", "AMD64"), reason="about x86-64")

# Functions that only the choice at load time (clones) or at run time (the level of multicrop) leads to.
CHOSEN = re.compile(r"\.arch_x86_64_v[34]|avx2|avx512|vbmi|down_16")


def beyond_the_baseline(disassembly: str) -> set[str]:
    """Functions with instructions of AVX and later: their mnemonics begin with v, those of masks with k."""
    functions, function = set(), ""
    for line in disassembly.splitlines():
        if found := re.match(r"^[0-9a-f]+ <(.+)>:$", line):
            function = found[1]
        elif re.match(
            r"^ *[0-9a-f]+:\t(?:v|k(?:mov|or|and|xor|shift|test|not|unpck|add)|[^#]*%[yz]mm)", line
        ):
            functions.add(function)
    return functions


@X86
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_avx_is_only_in_functions_that_are_chosen(library: object) -> None:
    line = ["objdump", "--disassemble", "--no-show-raw-insn", str(csrc.PATH)]
    found = beyond_the_baseline(subprocess.check_output(line, text=True))
    assert found, "objdump shows no vector code at all"
    assert not {name for name in found if not CHOSEN.search(name)}


def test_the_search_finds_avx() -> None:
    text = "0000 <f>:\n  10:\tvaddps %ymm0,%ymm1,%ymm2\n0020 <g>:\n  21:\taddps %xmm0,%xmm1\n"
    assert beyond_the_baseline(text) == {"f"}
    assert beyond_the_baseline("0000 <h>:\n  10:\tkmovw  %eax,%k1\n") == {"h"}


# Losses, gradients and updated weights, saved in the file that is named.
COMPUTE = """
import sys
from pathlib import Path

import torch
from fastdino_kernels import csrc

if len(sys.argv) > 2:
    csrc.PATH = Path(sys.argv[2])
import fastdino_kernels as fk

assert csrc.library() is not None
torch.manual_seed(0)
out = []
with fk.backend("cpu"):
    for dtype in (torch.float32, torch.bfloat16):
        x, t = torch.randn(15, 1037).to(dtype).requires_grad_(), torch.randn(6, 1037).to(dtype)
        loss = fk.dino_loss(x, t, torch.randn(1037), student_temp=0.1, teacher_temp=0.04).loss
        loss.backward()
        out += [loss.detach(), x.grad]
        x = torch.randn(7, 203).to(dtype).requires_grad_()
        loss = fk.soft_cross_entropy(x, torch.rand(7, 203).softmax(1), temp=0.1)
        loss.sum().backward()
        out += [loss.detach(), x.grad]
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (1, 33, 1000)]
    teachers = [torch.randn(p.shape) for p in parameters]
    for p in parameters:
        p.grad = torch.randn(p.shape)
    fk.AdamWEMA(parameters, teachers).step(momentum=0.9)
    out += [p.detach() for p in parameters] + teachers
torch.save(out, sys.argv[1])
"""
SOURCES = ("abi", "parallel", "memory", "dino_loss", "soft_cross_entropy", "adamw_ema")


@X86
@needs_compiler
def test_the_baseline_computes_the_same(library: object, tmp_path: Path) -> None:
    """Code without clones is what a processor without AVX runs; only fused multiply-adds differ."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    flags = [
        "-O1",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-pthread",
        "-fno-math-errno",
        "-Wno-psabi",
        "-DFDK_CLONES=",
    ]
    sources = [f"csrc/{name}.cpp" for name in SOURCES]
    baseline = tmp_path / "libbaseline.so"
    subprocess.run([*compiler.split(), *flags, *sources, "-o", str(baseline)], cwd=ROOT, check=True)
    if shutil.which("objdump"):
        text = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", str(baseline)], text=True)
        assert not beyond_the_baseline(text)
    results = []
    for name, extra in (("chosen", []), ("baseline", [str(baseline)])):
        line = [sys.executable, "-c", COMPUTE, str(tmp_path / name), *extra]
        subprocess.run(line, check=True, timeout=120)
        results.append(torch.load(tmp_path / name, weights_only=True))
    for got, expected in zip(*results, strict=True):
        ulp = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=32 * ulp, atol=4 * ulp * expected.abs().max().item())
