"""Which implementation answers: ``cpu`` (the compiled library), ``reference`` (eager PyTorch) or ``auto``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import csrc

BACKENDS = ("auto", "cpu", "reference")
_choice = "auto"


def set_backend(name: str) -> None:
    """Set the backend of the whole process: ``auto`` (fastest for the device), ``cpu`` or ``reference``."""
    global _choice
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cpu" and not _library_loaded():
        raise RuntimeError(
            "backend: 'cpu' needs the compiled library; run pip install again with a C++17 compiler"
        )
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
    """``cpu`` or ``reference`` for these tensors under the present choice; float64 is the reference's."""
    if _choice == "reference" or any(x.dtype == torch.float64 for x in tensors):
        return "reference"
    if tensors[0].device.type == "cpu":
        return "cpu" if _library_loaded() else "reference"
    if _choice == "cpu":
        raise ValueError(f"backend: 'cpu' was set, but the tensors are on {tensors[0].device}")
    return "reference"


def _library_loaded() -> bool:
    return csrc.library() is not None


# As torch.compiler.assume_constant_result does, whose call would import the compiler for 2 s.
_library_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]
