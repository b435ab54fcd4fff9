"""Images per second of the forward pass (DINO paper, Table 1): evaluation mode, no gradients, random images
on the device, passes to warm up, then timed ones between two synchronisations.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import nn

from fastdino.evaluation.features import evaluating

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def images_per_second(
    network: nn.Module,
    *,
    batch_size: int = 128,
    image_size: int = 224,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    warmup: int = 50,
    passes: int = 30,
) -> float:
    """Mean rate over ``passes`` forward passes after ``warmup`` others.

    Weights and images are of ``dtype``: the network is converted, and back to fp32 afterwards, which rounds
    its weights; fp32 is computed in fp32, not in TF32. Raises ValueError unless there is a pass to time.
    """
    device = torch.device(device)
    if passes < 1 or warmup < 0:
        raise ValueError(f"throughput: expected a pass or more, got {passes} and {warmup} to warm up")
    network.to(device, dtype)
    _choose_attention(network, device, dtype)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device).to(dtype)
    try:
        with evaluating(network), _no_tf32():
            for _ in range(warmup):
                network(images)
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(passes):
                network(images)
            _synchronize(device)
            seconds = time.perf_counter() - start
    finally:
        network.to(dtype=torch.float32)
    return passes * batch_size / seconds


def _choose_attention(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """The kernels that training would choose here; networks without attention have none."""
    from fastdino.models.attention import resolve_attention
    from fastdino.models.vit import VisionTransformer

    if isinstance(network, VisionTransformer):
        head_dim = network.embed_dim // network.num_heads
        network.set_attention(resolve_attention("auto", device=device, dtype=dtype, head_dim=head_dim))


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    """Products and convolutions of fp32 tensors in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
