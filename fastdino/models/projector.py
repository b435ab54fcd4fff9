"""Projectors and predictors: plain MLPs onto an embedding, for losses that compare embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdino.models.linear import Linear

if TYPE_CHECKING:
    from fastdino.models import Backbone

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def hidden_layers(widths: Sequence[int], *, use_bn: bool, act: str) -> list[nn.Module]:
    """Linear layers from one width to the next, each with batch norm, if any, and activation."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers.append(Linear(before, after))
        if use_bn:
            layers.append(nn.BatchNorm1d(after))
        layers.append(ACTIVATIONS[act]())
    return layers


def mlp(widths: Sequence[int], *, use_bn: bool, act: str, last_bias: bool = True) -> nn.Sequential:
    """Hidden layers through ``widths``, then a linear layer to the last of them."""
    hidden = hidden_layers(widths[:-1], use_bn=use_bn, act=act)
    return nn.Sequential(*hidden, Linear(widths[-2], widths[-1], bias=last_bias))


class Projector(nn.Module):
    """MLP [R, widths[0]] -> [R, widths[-1]], followed by ``predictor`` where there is one: in a student."""

    def __init__(
        self, widths: Sequence[int], *, use_bn: bool = True, act: str = "relu", last_bias: bool = True
    ) -> None:
        super().__init__()
        self.out_dim = widths[-1]
        self.mlp = mlp(widths, use_bn=use_bn, act=act, last_bias=last_bias)
        self.predictor: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings in fp32 or wider, not normalised."""
        x = self.mlp(x)
        if self.predictor is not None:
            x = self.predictor(x)
        return x.to(torch.promote_types(x.dtype, torch.float32))


class EmbeddingModel(nn.Module):
    """Backbone and projector; parameters are named ``backbone.*`` and ``head.*``."""

    def __init__(self, backbone: Backbone, head: Projector) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        """Crops, [B, C, H, W] or a sequence of such -> embeddings [sum of B, D]."""
        return self.head(self.backbone(crops))
