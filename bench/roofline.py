"""What every Triton kernel can reach at best, without a GPU: ahead-of-time compilation and arithmetic.

python -m bench.roofline [--json] [--jobs 2] [MODULE ...]

Every launch that the files of fastdino_kernels/gpu describe is compiled for V100 (sm_70), A100 (sm_80) and
H200 (sm_90). Registers, spills and shared memory are the compiler's; programs per multiprocessor (SM) and
occupancy follow from them and the GPU's limits; the floor is the time that the memory needs for the launch's
bytes at the data sheet's bandwidth, or the tensor cores for its FLOP, whichever is longer. **Floors are
computed, nothing here is measured**: no kernel can be faster; how close it comes is for `bench.kernels`.

Exits with 1, and says why, when a kernel spills, does not compile, needs more shared memory than its budget,
uses matrix products on V100 (Triton has no tensor cores there), or is launched without being described.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import fastdino_kernels.gpu
from fastdino_kernels.gpu.launch import Launch

from bench.ahead import compile_ahead

KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """Limits of one architecture (CUDA programming guide, compute capabilities) and of its usual board."""

    name: str
    bandwidth: float  # bytes/s, data sheet
    flops: float  # fp16 or bf16 tensor cores, dense, data sheet
    sms: int
    shared_per_sm: int
    shared_budget: int  # for one program: below the hardware's limit
    shared_reserved: int  # by the system, for each program
    shared_granule: int


GPUS = {
    70: Gpu("V100", 900e9, 112e12, 80, 96 * KIB, 96 * KIB, 0, 256),
    80: Gpu("A100", 2039e9, 312e12, 108, 164 * KIB, 160 * KIB, KIB, 128),
    90: Gpu("H200", 4800e9, 989e12, 132, 228 * KIB, 224 * KIB, KIB, 128),
}
WARPS_PER_SM, PROGRAMS_PER_SM, REGISTERS_PER_SM = 64, 32, 65536


@dataclass(frozen=True)
class Row:
    """One launch on one architecture."""

    module: str
    name: str
    gpu: str
    capability: int
    problem: str
    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per program
    warps: int  # per program
    programs_per_sm: int
    occupancy: float  # resident warps / 64
    limited_by: str
    grid: int
    waves: float  # grid / programs resident on the whole GPU
    bytes: int
    flops: int
    floor_us: float
    bound: str  # bytes or flops


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def residency(gpu: Gpu, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """Programs that one SM holds, and what limits them."""
    register_warps = REGISTERS_PER_SM // _round_up(32 * max(1, registers), 256) // 4 * 4
    shared_each = _round_up(shared + gpu.shared_reserved, gpu.shared_granule)
    limits = {
        "warps": WARPS_PER_SM // warps,
        "programs": PROGRAMS_PER_SM,
        "registers": register_warps // warps,
        "shared": gpu.shared_per_sm // shared_each if shared_each else PROGRAMS_PER_SM,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def modules() -> list[ModuleType]:
    """The files of fastdino_kernels.gpu that define Triton kernels or describe launches."""
    found = []
    for info in pkgutil.iter_modules(fastdino_kernels.gpu.__path__):
        module = importlib.import_module(f"fastdino_kernels.gpu.{info.name}")
        if hasattr(module, "launches") or launched_kernels(module):
            found.append(module)
    return found


def launched_kernels(module: ModuleType) -> dict[str, Any]:
    """Kernels that the file launches, ``kernel[grid](...)``, by name."""
    from triton.runtime.jit import JITFunction

    names = {
        node.func.value.id
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }
    kernels = {name: getattr(module, name, None) for name in sorted(names)}
    return {name: kernel for name, kernel in kernels.items() if isinstance(kernel, JITFunction)}


def short(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def undescribed(found: list[ModuleType]) -> list[str]:
    described = {id(launch.kernel) for module in found for launch in getattr(module, "launches", list)()}
    return [
        f"{short(module)}: {name} is launched, but launches() does not describe it"
        for module in found
        for name, kernel in launched_kernels(module).items()
        if id(kernel) not in described
    ]


def compile_row(module: str, index: int, capability: int) -> Row | str:
    """The row, or what went wrong; runs in a process of its own."""
    launch: Launch = importlib.import_module(f"fastdino_kernels.gpu.{module}").launches()[index]
    try:
        compiled = compile_ahead(launch, capability)
    except Exception as error:  # whatever the compiler raises is a finding, not an end
        return f"{module}: {launch.name} for sm_{capability}: {type(error).__name__}: {error}"
    gpu = GPUS[capability]
    programs, limit = residency(gpu, compiled.registers, compiled.shared, compiled.num_warps)
    memory, compute = launch.bytes / gpu.bandwidth, launch.flops / gpu.flops
    return Row(
        module,
        launch.name,
        gpu.name,
        capability,
        launch.problem,
        compiled.registers,
        compiled.spilled,
        compiled.shared,
        compiled.num_warps,
        programs,
        programs * compiled.num_warps / WARPS_PER_SM,
        limit,
        launch.grid,
        launch.grid / (max(1, programs) * gpu.sms),
        launch.bytes,
        launch.flops,
        max(memory, compute) * 1e6,
        "bytes" if memory >= compute else "flops",
    )


def problems(row: Row) -> list[str]:
    gpu, where = GPUS[row.capability], f"{row.module}: {row.name} for {row.gpu}"
    found = []
    if row.spilled:
        found.append(f"{where}: spills {row.spilled} bytes per thread")
    if row.shared > gpu.shared_budget:
        found.append(f"{where}: {row.shared} bytes of shared memory, budget {gpu.shared_budget}")
    if row.programs_per_sm == 0:
        found.append(f"{where}: a program does not fit a multiprocessor ({row.limited_by})")
    if row.capability < 80 and row.flops:
        found.append(f"{where}: matrix products, which Triton computes without tensor cores there")
    return found


def survey(only: list[str], jobs: int) -> tuple[list[Row], list[str]]:
    """All rows, in the order of the files, and all problems."""
    found = [module for module in modules() if not only or short(module) in only]
    if not found:
        return [], [f"no module of fastdino_kernels.gpu is named {' or '.join(only) or 'anything'}"]
    tasks = [
        (short(module), index, capability)
        for module in found
        for index, launch in enumerate(getattr(module, "launches", list)())
        for capability in launch.capabilities
    ]
    if jobs > 1:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(compile_row, *zip(*tasks, strict=True)))
    else:
        results = [compile_row(*task) for task in tasks]
    rows = [result for result in results if isinstance(result, Row)]
    failed = [result for result in results if isinstance(result, str)]
    return rows, undescribed(found) + failed + [text for row in rows for text in problems(row)]


def table(rows: list[Row]) -> str:
    head = f"{'launch':38} {'GPU':5} {'reg':>4} {'spill':>5} {'shared':>7} {'warps':>5} {'prog/SM':>7}"
    lines = [f"{head} {'occ.':>5} {'limit':9} {'waves':>7} {'MB':>8} {'GFLOP':>7} {'floor us':>9}  problem"]
    for r in rows:
        lines.append(
            f"{r.name:38} {r.gpu:5} {r.registers:4} {r.spilled:5} {r.shared:7} {r.warps:5} "
            f"{r.programs_per_sm:7} {r.occupancy:5.0%} {r.limited_by:9} {r.waves:7.1f} {r.bytes / 1e6:8.1f} "
            f"{r.flops / 1e9:7.1f} {r.floor_us:9.1f}  {r.problem}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="files of fastdino_kernels/gpu; all without")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined: interpreted ones do not compile
    rows, found = survey(args.modules, args.jobs)
    if args.json:
        print(json.dumps({"launches": [asdict(row) for row in rows], "problems": found}, indent=1))
    else:
        print("Floors are computed from bytes, FLOP and data sheets; nothing here is measured.\n")
        print(table(rows))
    for text in found:
        print(text, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
