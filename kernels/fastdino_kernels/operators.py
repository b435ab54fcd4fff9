"""Functions as operators of PyTorch: opaque to torch.compile, with autograd and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str, device: str = "cpu") -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes a function the form for ``device`` of the operator ``namespace::name``.

    Returns the operator. ``device="default"`` is for functions that launch Triton kernels: they run on CUDA
    tensors and, under Triton's interpreter, on those of the CPU.

    The function neither writes to its arguments nor returns one of them. ``torch.library.custom_op`` does the
    same, but imports all of torch.compile at the first call, which takes longer than the rest of the start.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, device, function)
        namespace, _, short = name.partition("::")
        return getattr(getattr(torch.ops, namespace), short).default

    return register
