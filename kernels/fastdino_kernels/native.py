"""Calling the C functions of `csrc/` with tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import csrc

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # codes of the C interface
_HUGE_PAGES_FROM = 4 << 20  # bytes

# Memory for the C functions, whatever torch's default type and device are.
empty = partial(torch.empty, dtype=torch.float32, device="cpu")
zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
tensor = partial(torch.tensor, dtype=torch.float32, device="cpu")


def call(name: str, *arguments: object) -> None:
    """Run a kernel on torch's number of threads; errors as those of :func:`csrc.check`."""
    library = csrc.library()
    assert library is not None, "callers ask backend.resolve first"
    csrc.check(getattr(library, name)(*arguments, ctypes.c_int(csrc.num_threads())), name)


def pointer(x: Tensor) -> ctypes.c_void_p:
    assert x.device.type == "cpu", x.device
    return ctypes.c_void_p(x.data_ptr())


def int64(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, values))


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Array of addresses, null for None."""
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def sizes(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(tensors))(*(x.numel() for x in tensors))


def on_huge_pages(x: Tensor) -> Tensor:
    """``x``, fresh and not yet written to; if it is large, the system is asked for huge pages under it."""
    if x.nbytes >= _HUGE_PAGES_FROM:
        call("fdk_advise_huge_pages", pointer(x), *int64(x.nbytes))
    return x
