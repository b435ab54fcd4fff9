"""What every launcher shares: device scalars, the launching device, address width, described launches."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOG2E = 1.4426950408889634  # kernels take exponentials to the base 2


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """0-dim fp32 tensor beside ``like``; a number arrives by a fill, so no step waits for the host."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and like.is_cuda:
        value = value.item()  # a copy from memory that is not pinned would wait for the device
    if isinstance(value, Tensor):
        return value.detach().to(device=like.device, dtype=torch.float32)
    return torch.full((), float(value), dtype=torch.float32, device=like.device)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def needs_int64(*tensors: Tensor) -> bool:
    """Whether an element's offset from the start of some tensor exceeds 31 bits."""
    return any(
        sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31
        for x in tensors
        if x.numel()
    )


@dataclass(frozen=True)
class Launch:
    """A kernel in the configuration that production uses, as ahead-of-time compilation and rooflines need it.

    ``signature`` maps every parameter to its type ("*bf16", "fp32", "i32", ...), constants to a value in
    ``constants``. ``grid``, ``bytes`` and ``flops`` belong to the problem named in ``problem``: programs, the
    least traffic that any implementation needs, and floating-point operations in matrix products.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    problem: str
    grid: int
    bytes: int
    flops: int = 0
    capabilities: tuple[int, ...] = (70, 80, 90)
    fp_fusion: bool = True  # whether products and sums may be contracted
