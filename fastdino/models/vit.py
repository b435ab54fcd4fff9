"""Vision Transformer with the parameter names, initialisation and position interpolation of official DINO.

Dosovitskiy et al. 2020 (arXiv 2010.11929) in the DeiT variant that DINO uses (arXiv 2104.14294, section 3.2):
pre-norm blocks, a [CLS] token, learned position embeddings. Crops of different resolutions go through in one
pass: the tokens of all crops form one matrix [T, D] for norms and linear layers, and only the attention works
per resolution (see ``attention.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import ARCHITECTURES, ConfigError
from fastdino.models.attention import Groups, attention, attention_map, cls_attention, join, split_groups


class PatchEmbed(nn.Module):
    """Linear projection of non-overlapping patches; ``proj`` has the shape of a convolution, [D, C, P, P]."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, (H//P)*(W//P), D]; pixels beyond the last whole patch are ignored."""
        batch, chans, height, width = x.shape
        p = self.patch_size
        h, w = height // p, width // p
        x = x[:, :, : h * p, : w * p].reshape(batch, chans, h, p, w, p)
        patches = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, chans * p * p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.proj(attention(self.qkv(x), groups, self.num_heads))

    def forward_cls(self, x: Tensor, groups: Groups) -> Tensor:
        """[T, D] -> [crops, D]: the rows of :meth:`forward` that belong to the [CLS] tokens."""
        dim = x.shape[1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(cls_rows(x, groups), weight[:dim], bias[:dim])
        kv = F.linear(x, weight[dim:], bias[dim:])
        return self.proj(cls_attention(q, kv, groups, self.num_heads))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block on packed tokens."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, groups: Groups, drop: Tensor | None = None, cls_only: bool = False
    ) -> Tensor:
        """[T, D] -> [T, D], or the [CLS] rows alone, [crops, D], with ``cls_only``.

        ``drop`` [T, 2] scales the rows of the two residual branches (stochastic depth), none changes nothing.
        """
        if cls_only:
            y = self.attn.forward_cls(self.norm1(x), groups)
            x = cls_rows(x, groups)
            drop = None if drop is None else cls_rows(drop, groups)
        else:
            y = self.attn(self.norm1(x), groups)
        if drop is None:
            x = x + y
            return x + self.mlp(self.norm2(x))
        x = torch.addcmul(x, y, drop[:, :1])
        return torch.addcmul(x, self.mlp(self.norm2(x)), drop[:, 1:])


class VisionTransformer(nn.Module):
    """ViT backbone: images to normalised [CLS] features.

    ``img_size`` fixes the grid of the learned position embeddings only; images of any size, square or not,
    are accepted and the embeddings are interpolated to them. ``drop_path_rate`` is the stochastic depth of
    the last block in training mode (0 in the first, linear in between); its random numbers come from
    PyTorch's default generator of the device.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        counts = {"patch_size": patch_size, "in_chans": in_chans, "depth": depth, "num_heads": num_heads}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if patch_size > img_size:
            raise ValueError(f"patch_size {patch_size} is larger than the image ({img_size} pixels)")
        if embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads ({num_heads}), got {embed_dim}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.depth = depth
        self.num_heads = num_heads
        self.drop_path_rate = drop_path_rate
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        # The order of the draws is the official one: the same seed gives the same weights.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Normalised [CLS] features.

        ``x`` is one batch of images [B, C, H, W] -> [B, D], or a sequence of batches of possibly different
        resolutions, whose features are returned one after another: [sum of B, D].
        """
        tokens, groups = self.prepare_tokens([x] if isinstance(x, Tensor) else x)
        drop = self._drop_scales(tokens, groups)
        *blocks, last = self.blocks
        for i, block in enumerate(blocks):
            tokens = block(tokens, groups, drop[i])
        # Nothing but the [CLS] rows leaves the last block, so it computes no others.
        return self.norm(last(tokens, groups, drop[-1], cls_only=True))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Images [B, C, H, W] -> normalised tokens [B, 1+N, D] of the last ``n`` blocks, deepest last."""
        if not 1 <= n <= self.depth:
            raise ValueError(f"n must be between 1 and the number of blocks ({self.depth}), got {n}")
        tokens, groups = self.prepare_tokens([x])
        drop = self._drop_scales(tokens, groups)
        outputs = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, groups, drop[i])
            if self.depth - i <= n:
                outputs.append(self.norm(tokens).view(*groups[0], self.embed_dim))
        return outputs

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> attention of the last block [B, heads, 1+N, 1+N]; row 0 is [CLS]."""
        tokens, groups = self.prepare_tokens([x])
        drop = self._drop_scales(tokens, groups)
        *blocks, last = self.blocks
        for i, block in enumerate(blocks):
            tokens = block(tokens, groups, drop[i])
        assert isinstance(last, Block)
        return attention_map(last.attn.qkv(last.norm1(tokens)), len(x), self.num_heads)

    def prepare_tokens(self, crops: Sequence[Tensor]) -> tuple[Tensor, Groups]:
        """Patch tokens with [CLS] and positions, all crops in one matrix [T, D], and the groups they form."""
        if not crops:
            raise ValueError("expected at least one batch of images, got an empty sequence")
        positions: dict[tuple[int, int], Tensor] = {}
        parts: list[Tensor] = []
        groups: list[tuple[int, int]] = []
        for x in crops:
            self._check_images(x)
            batch, _, height, width = x.shape
            if (height, width) not in positions:
                positions[height, width] = self.interpolate_pos_encoding(height, width)
            cls_tokens = self.cls_token.expand(batch, -1, -1)
            tokens = torch.cat((cls_tokens, self.patch_embed(x)), dim=1) + positions[height, width]
            parts.append(tokens.flatten(0, 1))
            if groups and groups[-1][1] == tokens.shape[1]:
                groups[-1] = (groups[-1][0] + batch, tokens.shape[1])
            else:
                groups.append((batch, tokens.shape[1]))
        return join(parts), tuple(groups)

    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        """Position embeddings [1, 1+N, D] for an image of ``height`` x ``width`` pixels, differentiable.

        Bicubic, without antialiasing. The scale handed to the interpolation is (n + 0.1) / grid as in the
        official code and also sets the sampling positions: released weights expect it, and n / grid gives
        quite other embeddings.
        """
        num_patches = self.pos_embed.shape[1] - 1
        p = self.patch_size
        h, w = height // p, width // p
        # The official condition: 225 x 225 pixels take the embeddings as they are, 225 x 224 do not.
        if h * w == num_patches and height == width:
            return self.pos_embed
        side = math.isqrt(num_patches)
        grid = self.pos_embed[:, 1:].reshape(1, side, side, self.embed_dim).permute(0, 3, 1, 2)
        scale = ((h + 0.1) / math.sqrt(num_patches), (w + 0.1) / math.sqrt(num_patches))
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat((self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, H, W], got shape {tuple(x.shape)}")
        if min(x.shape[2:]) < self.patch_size:
            size = f"{x.shape[2]} x {x.shape[3]} pixels"
            raise ValueError(f"images must hold at least one patch of {self.patch_size} pixels, got {size}")

    def _drop_scales(self, tokens: Tensor, groups: Groups) -> Sequence[Tensor | None]:
        """Per block [T, 2]: 0 in the rows of a crop whose residual branch is dropped, else 1 / (1 - rate)."""
        if not self.training or self.drop_path_rate == 0.0:
            return [None] * self.depth
        rates = torch.linspace(0, self.drop_path_rate, self.depth, dtype=tokens.dtype, device=tokens.device)
        draws = torch.rand(self.depth, sum(crops for crops, _ in groups), 2, device=tokens.device)
        scales = (draws >= rates[:, None, None]) / (1 - rates)[:, None, None]  # [depth, crops, 2]
        parts = zip(scales.split([crops for crops, _ in groups], dim=1), groups, strict=True)
        repeated = [part[:, :, None].expand(-1, -1, n, -1).flatten(1, 2) for part, (_, n) in parts]
        return join(repeated, dim=1).unbind(0)


def cls_rows(x: Tensor, groups: Groups) -> Tensor:
    """[T, D] -> [crops, D]: the first token of every crop."""
    parts = zip(split_groups(x, groups), groups, strict=True)
    return join([part.view(*group, -1)[:, 0] for part, group in parts])


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights (std 0.02) and zero biases for linear layers; other modules are left alone."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def standard_vit(arch: str, **overrides: Any) -> VisionTransformer:
    """The backbone named ``arch``; arguments of :class:`VisionTransformer` that are not None override it."""
    if arch not in ARCHITECTURES:
        raise ConfigError("arch", f"expected one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    embed_dim, depth, num_heads = ARCHITECTURES[arch]
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return VisionTransformer(
        **sizes | {name: value for name, value in overrides.items() if value is not None}
    )


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """12 blocks of width 192, 3 heads. Further arguments as for :class:`VisionTransformer`."""
    return standard_vit("vit_tiny", patch_size=patch_size, **kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """12 blocks of width 384, 6 heads (Table 1). Further arguments as for :class:`VisionTransformer`."""
    return standard_vit("vit_small", patch_size=patch_size, **kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """12 blocks of width 768, 12 heads (Table 1). Further arguments as for :class:`VisionTransformer`."""
    return standard_vit("vit_base", patch_size=patch_size, **kwargs)
