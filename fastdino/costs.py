"""Parameters, FLOPs and kept activations of ResNet and Swin backbones by arithmetic, for the dry run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from fastdino.config import ALIASES, RESNETS, SWIN_PATCH, SWINS, ModelConfig

_RESNET_BLOCKS = (3, 4, 6, 3)


class Costs(NamedTuple):
    """Of the forward pass of one crop."""

    stem_flops: float
    """Of the layer that sees the pixels, which need no gradient."""
    flops: float
    """Of all others."""
    kept_elements: float
    """Activations kept in the compute type."""
    kept_bytes: float
    """What is kept besides, whose type does not depend on the precision."""


class _Convolution(NamedTuple):
    inputs: int
    outputs: int
    side: int
    """Of the kernel."""
    pixels: int
    """Side of its output."""
    activated: bool
    """Whether a ReLU output is kept too, besides what batch norm keeps."""


def parameters(model: ModelConfig) -> int:
    """Parameters of a ResNet or Swin without classifier."""
    arch = ALIASES.get(model.arch, model.arch)
    if arch in RESNETS:
        layers = _convolutions(RESNETS[arch], model.in_chans, 224)
        return sum(c.inputs * c.outputs * c.side**2 + 2 * c.outputs for c in layers)
    width, depths, _ = SWINS[arch]
    total = model.in_chans * SWIN_PATCH**2 * width + 3 * width + 2 * 8 * width
    for stage, depth in enumerate(depths):
        dim, (side, _) = width << stage, _window(arch, stage)
        total += depth * (12 * dim**2 + 13 * dim + (2 * side - 1) ** 2 * (dim // 32))
        total += 8 * dim + 8 * dim**2 if stage < 3 else 0
    return total


def costs(model: ModelConfig, size: int, kept_per_channel: float) -> Costs:
    """Of a crop of ``size`` pixels; a block of a Swin keeps ``kept_per_channel`` bytes of a token."""
    arch = ALIASES.get(model.arch, model.arch)
    if arch in RESNETS:
        return _resnet(RESNETS[arch], model.in_chans, size)
    return _swin(arch, model.in_chans, size, kept_per_channel)


def _resnet(width: int, in_chans: int, size: int) -> Costs:
    stem, *rest = _convolutions(width, in_chans, size)
    work = [2.0 * c.inputs * c.outputs * c.side**2 * c.pixels**2 for c in (stem, *rest)]
    kept = sum((1 + c.activated) * c.outputs * c.pixels**2 for c in (stem, *rest))
    pooled = width * _halved(stem.pixels) ** 2
    return Costs(work[0], sum(work[1:]), kept + pooled, 8.0 * pooled)  # the pool keeps int64 positions


def _convolutions(width: int, in_chans: int, size: int) -> Iterator[_Convolution]:
    size = _halved(size)
    yield _Convolution(in_chans, width, 7, size, True)
    size, channels = _halved(size), width
    for stage, blocks in enumerate(_RESNET_BLOCKS):
        planes = width << stage
        for block in range(blocks):
            before, size = size, _halved(size) if stage and not block else size
            yield _Convolution(channels, planes, 1, before, True)
            yield _Convolution(planes, planes, 3, size, True)
            yield _Convolution(planes, 4 * planes, 1, size, True)
            if not block:
                yield _Convolution(channels, 4 * planes, 1, size, False)
            channels = 4 * planes


def _halved(size: int) -> int:
    """Side of a map after a stride of 2."""
    return (size + 1) // 2


def _swin(arch: str, in_chans: int, size: int, kept_per_channel: float) -> Costs:
    width, depths, _ = SWINS[arch]
    side = size // SWIN_PATCH
    stem = 2.0 * side**2 * width * in_chans * SWIN_PATCH**2
    flops, kept = 0.0, 4.0 * side**2 * width
    for stage, depth in enumerate(depths):
        dim, tokens = width << stage, side**2
        window, shift = _window(arch, stage)
        for block in range(depth):
            pairs = _pairs(side, window, shift if block % 2 else 0) ** 2
            flops += 24.0 * tokens * dim**2 + 4.0 * pairs * dim
        kept += depth * tokens * dim * kept_per_channel
        if stage < 3:
            side = _halved(side)
            flops += 2.0 * side**2 * 8 * dim**2
            kept += 4.0 * side**2 * 4 * dim
    return Costs(stem, flops, 0.0, kept)


def _window(arch: str, stage: int) -> tuple[int, int]:
    """Side and shift of the windows of a stage."""
    largest, side = SWINS[arch][2], 224 // SWIN_PATCH >> stage
    return (side, 0) if side <= largest else (largest, largest // 2)


def _pairs(size: int, window: int, shift: int) -> int:
    """Pairs of rows of a map that share a window."""
    padded = -(-size // window) * window
    return sum(n**2 for n in Counter((row - shift) % padded // window for row in range(size)).values())
