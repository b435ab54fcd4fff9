"""Vision Transformer with the parameter names, initialisation and position interpolation of official DINO.

Dosovitskiy et al. 2020 (arXiv 2010.11929) in the DeiT variant that DINO uses (arXiv 2104.14294, section 3.2):
pre-norm blocks, a [CLS] token, learned position embeddings. Crops of different resolutions go through in one
pass: the tokens of all crops form one matrix [T, D] for norms and linear layers, and only the attention works
per resolution (see ``attention.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdino.config import ARCHITECTURES, ConfigError
from fastdino.models.attention import (
    BACKENDS,
    Groups,
    Packing,
    attention,
    attention_map,
    cls_attention,
    join,
    pack,
)
from fastdino.models.linear import Linear, compute_dtype, gelu_linear, linear, norm_linear
from fastdino.models.stochastic_depth import (
    NOTHING,
    Drop,
    Kept,
    add_branch,
    branch_input,
    cls_rows,
    draw,
    first_rows,
)

CHECKPOINTING = ("none", "selective", "full")


class PatchEmbed(nn.Module):
    """Linear projection of non-overlapping patches; ``proj`` has the shape of a convolution, [D, C, P, P]."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.proj.register_buffer("low_precision", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, (H//P)*(W//P), D]; pixels beyond the last whole patch are ignored.

        The images are copied once, into rows of patches in the type of the product; for channels-last images
        the weight follows their order.
        """
        batch, chans, height, width = x.shape
        p = self.patch_size
        h, w = height // p, width // p
        x = x[:, :, : h * p, : w * p]
        weight, low = self.proj.weight, self.proj._buffers["low_precision"]
        if x.stride(1) == 1:
            patches = x.permute(0, 2, 3, 1).reshape(batch, h, p, w, p * chans).transpose(2, 3)
            weight, low = weight.permute(0, 2, 3, 1), None if low is None else low.permute(0, 2, 3, 1)
        else:
            patches = x.reshape(batch, chans, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        rows = patches.to(compute_dtype(x), memory_format=torch.contiguous_format)
        rows = rows.reshape(batch * h * w, p * p * chans)
        low = None if low is None else low.flatten(1)
        return linear(rows, weight.flatten(1), self.proj.bias, low).view(batch, h * w, -1)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm, packing: Packing, cls_only: bool) -> Tensor:
        """Attention of the normed rows, [T, D] -> [T, D]; with ``cls_only`` its [CLS] rows, [crops, D]."""
        if not cls_only:
            return self.proj(attention(norm_linear(x, norm, self.qkv), packing, self.num_heads))
        dim = x.shape[1]
        q = norm_linear(cls_rows(x, packing.groups), norm, self.qkv, slice(dim))
        kv = norm_linear(x, norm, self.qkv, slice(dim, None))
        return self.proj(cls_attention(q, kv, packing, self.num_heads))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The normed rows through two layers, [T, D] -> [T, D]."""
        return gelu_linear(norm_linear(x, norm, self.fc1), self.fc2)


class Block(nn.Module):
    """Pre-norm Transformer block on packed tokens.

    Bytes kept for the backward pass per token and channel, in 16 bits with an fp32 residual stream: inputs
    of the norms 4 + 4, q, k and v 6, attention's output 2, the MLP's hidden layer before GELU 8: 24 in all.
    Norms and GELU are recomputed. ``checkpointing`` "selective" recomputes the hidden layer too, a third of
    the products' work in a forward pass, and keeps 16; "full" recomputes the block and keeps 4.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        drops: tuple[Drop, Drop] = NOTHING,
        cls_only: bool = False,
        checkpointing: str = "none",
        body: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """[T, D] -> [T, D], or the [CLS] rows alone, [crops, D], with ``cls_only``.

        ``drops`` says what stochastic depth does to the two branches; ``body`` is a compiled :meth:`body`.
        """
        body = Block.body if body is None else body
        checkpointing = checkpointing if torch.is_grad_enabled() else "none"
        if checkpointing == "full":
            return recompute(body, self, x, packing, drops, cls_only, False)
        return body(self, x, packing, drops, cls_only, checkpointing == "selective")

    def body(
        self, x: Tensor, packing: Packing, drops: tuple[Drop, Drop], cls_only: bool, selective: bool
    ) -> Tensor:
        first, second = drops
        inner = first.packing if isinstance(first, Kept) else packing
        y = self.attn(branch_input(x, first), self.norm1, inner, cls_only)
        if cls_only:
            x = cls_rows(x, packing.groups)
            first, second = first_rows(first, packing.groups), first_rows(second, packing.groups)
        x = add_branch(x, y, first)
        rows = branch_input(x, second)
        y = recompute(self.mlp, rows, self.norm2) if selective else self.mlp(rows, self.norm2)
        return add_branch(x, y, second)


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
        self.attention = "sdpa"
        self._checkpointing = "none"
        self._body: Callable[..., Tensor] | None = None
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
        tokens, packing = self._start([x] if isinstance(x, Tensor) else x)
        drops = self._drops(tokens, packing)
        *blocks, last = self.blocks
        how: dict[str, Any] = dict(
            checkpointing=self.checkpointing, body=self._body if self.training else None
        )
        for block, pair in zip(blocks, drops[:-1], strict=True):
            tokens = block(tokens, packing, pair, **how)
        # Nothing but the [CLS] rows leaves the last block, so it computes no others.
        return self.norm(last(tokens, packing, drops[-1], cls_only=True, **how))

    def forward_regions(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What :meth:`forward` gives, and the normalised patch tokens in the order of rows: one [B, N, D] for
        each resolution (neighbours of equal size are one). The last block computes all tokens.
        """
        tokens, packing = self._start([x] if isinstance(x, Tensor) else x)
        body = self._body if self.training else None
        for block, pair in zip(self.blocks, self._drops(tokens, packing), strict=True):
            tokens = block(tokens, packing, pair, checkpointing=self.checkpointing, body=body)
        parts = self.norm(tokens).split([crops * n for crops, n in packing.groups])
        crops = [part.view(*group, -1) for part, group in zip(parts, packing.groups, strict=True)]
        return join([part[:, 0] for part in crops]), [part[:, 1:] for part in crops]

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Images [B, C, H, W] -> normalised tokens [B, 1+N, D] of the last ``n`` blocks, deepest last."""
        if not 1 <= n <= self.depth:
            raise ValueError(f"n must be between 1 and the number of blocks ({self.depth}), got {n}")
        tokens, packing = self._start([x])
        outputs = []
        for i, (block, pair) in enumerate(zip(self.blocks, self._drops(tokens, packing), strict=True)):
            tokens = block(tokens, packing, pair)
            if self.depth - i <= n:
                outputs.append(self.norm(tokens).view(*packing.groups[0], self.embed_dim))
        return outputs

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> attention of the last block [B, heads, 1+N, 1+N]; row 0 is [CLS]."""
        tokens, packing = self._start([x])
        drops = self._drops(tokens, packing)
        *blocks, last = self.blocks
        for block, pair in zip(blocks, drops[:-1], strict=True):
            tokens = block(tokens, packing, pair)
        assert isinstance(last, Block)
        return attention_map(norm_linear(tokens, last.norm1, last.attn.qkv), len(x), self.num_heads)

    def set_attention(self, backend: str) -> None:
        """Compute attention with ``backend``, as ``resolve_attention`` returns it; sdpa from the start."""
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        self.attention = backend

    @property
    def checkpointing(self) -> str:
        """What the blocks recompute in the backward pass instead of keeping it, see :class:`Block`."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: str) -> None:
        if value not in CHECKPOINTING:
            raise ValueError(f"checkpointing: expected one of {', '.join(CHECKPOINTING)}, got {value!r}")
        self._checkpointing = value

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks for the passes of a training step, those of :meth:`forward` in training mode.

        All blocks, also of another model, share one graph per kind of pass: with and without gradients, all
        tokens and [CLS] alone, and every number of crops that stochastic depth keeps. Shapes are static;
        evaluation, with its many shapes, stays eager.
        """
        if self.attention == "xformers":
            raise ConfigError(
                "compile", "expected another --attention than xformers, whose masks do not trace"
            )
        self._body = compiled_body(backend)

    def _start(self, crops: Sequence[Tensor]) -> tuple[Tensor, Packing]:
        tokens, groups = self.prepare_tokens(crops)
        return tokens, pack(groups, self.attention, tokens.device, compute_dtype(tokens))

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

    def _drops(self, tokens: Tensor, packing: Packing) -> list[tuple[Drop, Drop]]:
        if not self.training or self.drop_path_rate == 0.0:
            return [NOTHING] * self.depth
        return draw(self.drop_path_rate, self.depth, tokens, packing)


def compiled_body(backend: str) -> Callable[..., Tensor]:
    """:meth:`Block.body` compiled. Changes settings of torch.compile in this process: more graphs of a
    function, and backward passes recompute what comes before a product, as ours do, instead of keeping it.
    """
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    dynamo.recompile_limit = max(dynamo.recompile_limit, 128)
    functorch.ban_recompute_materialized_backward = False
    return torch.compile(Block.body, backend=backend, fullgraph=True, dynamic=False)


def recompute(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """``function(*args)``, of which only the arguments are kept; it draws no random numbers."""
    # Saving the generator's state would stop a GPU, and a CUDA graph could not be captured.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


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
