"""Which implementation answers: ``triton`` (CUDA tensors), ``cpu`` (the compiled library), ``reference``
(eager PyTorch), or ``auto``, the fastest there is for the tensors' device."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import csrc

BACKENDS = ("auto", "triton", "cpu", "reference")
_choice = "auto"


def set_backend(name: str) -> None:
    """Set the backend of the whole process: ``auto``, ``triton``, ``cpu`` or ``reference``."""
    global _choice
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cpu" and not _library_loaded():
        raise RuntimeError(
            "backend: 'cpu' needs the compiled library; run pip install again with a C++17 compiler"
        )
    if name == "triton" and not _triton_found():
        raise RuntimeError("backend: 'triton' needs the package triton, which CUDA builds of PyTorch bring")
    _choice = name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``with backend("reference"): ...`` for the calls inside."""
    before = _choice
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def resolve(*tensors: Tensor) -> str:
    """``triton``, ``cpu`` or ``reference`` for these tensors under the present choice.

    float64 is the reference's. The triton backend takes CPU tensors only in Triton's interpreter
    (``TRITON_INTERPRET=1``, for tests).
    """
    if _choice == "reference" or any(x.dtype == torch.float64 for x in tensors):
        return "reference"
    device = tensors[0].device
    if _choice == "triton":
        if device.type != "cuda" and not interpreted():
            raise ValueError(f"backend: 'triton' was set, but the tensors are on {device}")
        return "triton"
    if device.type == "cpu":
        return "cpu" if _library_loaded() else "reference"
    if _choice == "cpu":
        raise ValueError(f"backend: 'cpu' was set, but the tensors are on {device}")
    return "triton" if device.type == "cuda" and _triton_answers() else "reference"


def gemm_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of their products: autocast's where it is on for their device, else what all promote to."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_answers() -> bool:
    """As :func:`_triton_found`; says once that CUDA tensors take the slow path without it."""
    if not _triton_found():
        warnings.warn(
            "fastdino_kernels: no triton, the slow reference code runs on the GPU: pip install triton",
            RuntimeWarning,
            stacklevel=2,
        )
    return _triton_found()


def _library_loaded() -> bool:
    return csrc.library() is not None


# As torch.compiler.assume_constant_result does, whose call would import the compiler for 2 s.
for _function in (_library_loaded, _triton_answers, interpreted):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
