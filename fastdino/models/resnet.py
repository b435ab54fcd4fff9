"""ResNet-50 with torchvision's parameter names (He et al. 2016, arXiv 1512.03385; stride on the 3x3
convolutions), wider by a factor if asked (Caron et al. 2020, arXiv 2006.09882), without a classifier.

Batch norm must not mix resolutions: crops of different sizes go through one after another, and each pass
moves the running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import ALIASES, RESNETS, ConfigError
from fastdino.models.attention import join

BLOCKS = (3, 4, 6, 3)
EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1 to ``planes`` channels, 3x3 with ``stride``, 1x1 to four times as many, added to the input."""

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * planes
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out:
            shortcut = nn.Conv2d(in_channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, 4 planes, H', W']."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(convolve(self.conv2, y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y.add_(x if self.downsample is None else self.downsample(x)))


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``layer(x)`` for a kernel of 3x3 with padding 1."""
    if x.shape[3] > 1:
        return layer(x)
    # Of a single column only the middle of the kernel sees anything. In bf16 with stride 2, oneDNN leaves the
    # weight gradients of the other columns as it found them in memory (torch 2.13 on a CPU).
    return F.conv2d(x, layer.weight[..., 1:2], stride=layer.stride, padding=(1, 0))


class ResNet(nn.Module):
    """Four stages of bottlenecks; ``width`` channels after the stem, features 32 times as wide."""

    drop_path_rate = 0.0  # there is no stochastic depth

    def __init__(self, width: int = 64, in_chans: int = 3, blocks: Sequence[int] = BLOCKS) -> None:
        super().__init__()
        for name, value in {"width": width, "in_chans": in_chans, "blocks": min(blocks)}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_chans = in_chans
        self.embed_dim = 8 * EXPANSION * width
        self.blocks = tuple(blocks)
        self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for i, number in enumerate(blocks):
            planes, stride = width << i, 1 if i == 0 else 2
            first = Bottleneck(channels, planes, stride)
            channels = EXPANSION * planes
            rest = [Bottleneck(channels, planes, 1) for _ in range(number - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def name(self) -> str:
        """Of the architecture, as ``--arch`` knows it, or the sizes of one that it does not know."""
        named = [arch for arch, width in RESNETS.items() if self.conv1.out_channels == width]
        return named[0] if named and self.blocks == BLOCKS else f"resnet {self.blocks} {self.embed_dim} wide"

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Mean of the last stage's map: one batch of images [B, C, H, W] -> [B, D], or a sequence of batches
        of possibly different resolutions -> [sum of B, D].
        """
        return join([self.feature_map(part).mean((2, 3)) for part in by_resolution(x)])

    def forward_regions(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What :meth:`forward` gives, and the last stage's map as regions in the order of rows: one
        [B, T, D] per resolution.
        """
        maps = [self.feature_map(part).flatten(2).mT for part in by_resolution(x)]
        return join([regions.mean(1) for regions in maps]), maps

    def probe_features(self, x: Tensor, n: int = 1) -> Tensor:
        """What a linear classifier sees, [B, D]: the features, whatever ``n`` blocks are asked for."""
        return self(x)

    def feature_map(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H/32, W/32] (rounded up), in fp32 or wider."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, H, W], got shape {tuple(x.shape)}")
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return x.to(torch.promote_types(x.dtype, torch.float32))


def by_resolution(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One batch per resolution: neighbours of equal height and width are concatenated.

    Raises ValueError for an empty sequence.
    """
    if isinstance(x, Tensor):
        return [x]
    if not x:
        raise ValueError("expected at least one batch of images, got an empty sequence")
    return [join(list(batches)) for _, batches in groupby(x, key=lambda batch: batch.shape[2:])]


def standard_resnet(arch: str, **arguments: Any) -> ResNet:
    """The ResNet named ``arch``; further arguments as for :class:`ResNet`."""
    name = ALIASES.get(arch, arch)
    if name not in RESNETS:
        raise ConfigError("arch", f"expected one of {', '.join(RESNETS)}, got {arch!r}")
    return ResNet(RESNETS[name], **arguments)
