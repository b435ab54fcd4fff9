"""The C++ kernels of `csrc/`, as a ctypes library.

The library lies beside this file and has a plain C interface: functions named `fdk_*` that return 0 for
success and take the number of threads last (0: all). `setup.py` builds it; without it the package works,
through the eager reference code.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

ABI = 4  # fdk_abi() of csrc/abi.cpp
PATH = Path(__file__).with_name("libfastdino_cpu.so")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None (with a RuntimeWarning, once) when it is not built or does not fit."""
    reason = None
    try:
        lib = ctypes.CDLL(str(PATH))
        found = lib.fdk_abi()
        if found == ABI:
            return lib
        reason = f"{PATH} has interface version {found}, this package needs {ABI}"
    except (OSError, AttributeError) as error:
        reason = f"{PATH} is not built" if not PATH.exists() else str(error)
    warnings.warn(
        f"fastdino_kernels: no C++ kernels, the slow reference code runs instead: {reason}. "
        "Build them with a C++17 compiler: `pip install -e .`",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def num_threads() -> int:
    """Threads for a call of a kernel: those of torch (`torch.set_num_threads`, `OMP_NUM_THREADS`)."""
    import torch

    return torch.get_num_threads()


def check(code: int, name: str) -> None:
    """Raises ValueError for code 1 of the C function `name`, MemoryError for 2, RuntimeError for others."""
    if code == 1:
        raise ValueError(f"{name}: error 1, an argument that cannot be")
    if code == 2:
        raise MemoryError(f"{name}: out of memory")
    if code != 0:
        raise RuntimeError(f"{name}: error {code}")
