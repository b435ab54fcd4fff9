"""What this machine is and the rates it reaches, measured: a large copy, and large products of random
matrices.

python -m bench.machine [--toy]

The copy counts bytes read and written; a product of two n x n matrices is 2 n^3 FLOP. These are the peaks
that the other benchmarks relate to: MFU (model FLOP utilisation) is a step's FLOP (`fastdino.dryrun`) over
its time and the rate of the product in the step's type.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

import torch

from bench.harness import synchronize
from fastdino.engine.logs import environment

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half() -> torch.dtype | None:
    """The 16-bit type whose products this hardware computes fast, if any."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def best() -> str:
    """Name of the type that training runs in here."""
    return NAMES[half() or torch.float32]


def exact() -> AbstractContextManager[None]:
    """Inside of it cuDNN's convolutions of fp32 tensors compute in fp32, not in TF32 as by default."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _seconds(call: Callable[[], object], calls: int) -> float:
    """Median over a few rounds of ``calls`` calls, per call."""
    call()
    times = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


@cache
def copy_rate(toy: bool = False) -> float:
    """Bytes read and written per second by a copy far larger than the caches."""
    gpu = torch.cuda.is_available()
    source = torch.randn(1 << (20 if toy else 29 if gpu else 26), device=device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), 10 if gpu else 2)


@cache
def product_rate(dtype: torch.dtype, toy: bool = False) -> float:
    """FLOP per second of a matrix product that fills the machine; random numbers, as zeros are faster."""
    gpu = torch.cuda.is_available()
    n = 256 if toy else 8192 if gpu else 2048
    a, b = (torch.randn(n, n, device=device(), dtype=dtype) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: a @ b, 10 if gpu else 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="tiny sizes: checks this file, not the machine")
    args = parser.parse_args()
    for name, value in environment(1, device()).items():
        print(f"{name}: {value}")
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(device())
        print(f"GPU: {facts.multi_processor_count} multiprocessors, sm_{facts.major}{facts.minor}, ", end="")
        print(f"{facts.total_memory / 2**30:.1f} GiB")
    print(f"copy: {copy_rate(args.toy) / 1e9:.1f} GB/s read and written")
    for dtype in [torch.float32] + [dtype for dtype in [half()] if dtype is not None]:
        print(f"matrix product, {NAMES[dtype]}: {product_rate(dtype, args.toy) / 1e12:.2f} TFLOP/s")


if __name__ == "__main__":
    main()
