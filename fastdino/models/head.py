"""The DINO projection head (arXiv 2104.14294, section 3.2 and appendix C).

An MLP, an l2-normalised bottleneck, and a bias-free, weight-normalised linear layer onto K prototypes. Loss
kernels need not see the K logits of a row: they take ``bottleneck(x)`` and ``weight()``, whose product the
logits are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastdino_kernels import normalize_weight
from torch import Tensor, nn

from fastdino.models.linear import Linear
from fastdino.models.projector import ACTIVATIONS, hidden_layers
from fastdino.models.vit import init_linear


class WeightNormLinear(nn.Module):
    """Rows ``W_k = g_k v_k / |v_k|`` under the official parameter names; the gains start at 1."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self) -> Tensor:
        """W [K, in_dim]; in 16 bits under autocast, where that is the type its products run in."""
        return normalize_weight(self.weight_v, self.weight_g)


class DINOHead(nn.Module):
    """Projection head, [R, in_dim] -> [R, out_dim].

    ``nlayers`` counts the linear layers that map ``in_dim`` to the bottleneck through ``hidden_dim``; the
    prototype layer ``last_layer`` comes on top. With ``bottleneck_dim`` 0 there is no bottleneck, no
    normalisation and no weight norm: ``nlayers`` plain linear layers in all, the last of them (still named
    ``last_layer``) ending at ``out_dim``, with bias. ``norm_last_layer`` freezes the gains of the prototypes
    at 1. ``predictor``, which a student may be given, maps the bottleneck before it is normalised.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        act: str = "gelu",
    ) -> None:
        super().__init__()
        counts = {"in_dim": in_dim, "out_dim": out_dim, "nlayers": nlayers, "hidden_dim": hidden_dim}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if bottleneck_dim < 0:
            raise ValueError(f"bottleneck_dim must be positive, or 0 for none, got {bottleneck_dim}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
        self.out_dim = out_dim
        widths = [in_dim, *[hidden_dim] * (nlayers - 1)]
        layers, width = hidden_layers(widths, use_bn=use_bn, act=act), widths[-1]
        if bottleneck_dim:
            layers.append(Linear(width, bottleneck_dim))
        # A single linear layer is not wrapped: its official parameter names are mlp.weight and mlp.bias.
        self.mlp = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        self.predictor: nn.Module | None = None
        self.last_layer: nn.Linear | WeightNormLinear
        if bottleneck_dim:
            self.apply(init_linear)
            self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
            self.last_layer.weight_g.requires_grad_(not norm_last_layer)
        else:
            self.last_layer = nn.Linear(width, out_dim)
            self.apply(init_linear)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Features [R, in_dim] -> what the prototypes see, [R, D] in fp32 or wider; rows of length 1.

        Without a bottleneck these are the hidden features, not normalised, with a 1 for the bias in
        :meth:`weight`.
        """
        x = self.mlp(x)
        if self.predictor is not None:
            x = self.predictor(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(self.last_layer, WeightNormLinear):
            return F.normalize(x, dim=-1)
        return F.pad(x, (0, 1), value=1.0)

    def weight(self) -> Tensor:
        """Effective prototypes [out_dim, D]: ``forward(x) == bottleneck(x) @ weight().T``."""
        if isinstance(self.last_layer, WeightNormLinear):
            return self.last_layer()
        return torch.cat((self.last_layer.weight, self.last_layer.bias[:, None]), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [R, out_dim] of features [R, in_dim]."""
        return F.linear(self.bottleneck(x), self.weight())
