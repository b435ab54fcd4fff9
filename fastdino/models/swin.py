"""Swin Transformer (Liu et al. 2021, arXiv 2103.14030) as EsViT trains it (Li et al. 2021, arXiv 2106.09785),
with the published parameter names: no class token, no absolute positions.

Crops of different resolutions go through in one pass: the tokens of all crops are the rows of one matrix for
norms and linear layers, and lie in the order of the windows in which they attend (see ``swin_windows.py``).
Pads are never computed. A pad's normed features are zeros, so its key and value are the biases b_k and b_v of
the projection; for the query i all pads P of a window together are one more key b_k with the value b_v and

    sum over j in P of exp(q_i b_k + B_ij) = exp(q_i b_k + logsumexp over j in P of B_ij)

where B is position bias plus mask. That equals the padded form, and what pads themselves attend to is thrown
away there too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import ALIASES, SWIN_PATCH, SWINS, ConfigError
from fastdino.models.attention import join
from fastdino.models.linear import Linear, norm_linear
from fastdino.models.stochastic_depth import NOTHING, Drop, add_branch
from fastdino.models.swin_windows import Layout, Maps, Move, Stage, plan, relative_position_index
from fastdino.models.vit import CHECKPOINTING, Mlp, PatchEmbed, init_linear, recompute

EPS = 1e-6

Output = tuple[Stage, Layout, Tensor]  # of a block: rows in the order of the layout


class WindowAttention(nn.Module):
    """Attention inside windows with a learned bias per head and relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        # Part of published state dictionaries; the pairs of a Layout are its entries.
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, norm: nn.LayerNorm, layout: Layout) -> Tensor:
        """Attention of the normed rows, [T, C] -> [T, C], both in the order of ``layout``."""
        qkv = norm_linear(x, norm, self.qkv)
        biases = self.biases(layout, qkv.dtype)
        pad = self.qkv.bias.to(qkv.dtype).view(3, self.num_heads, 1, -1)[1:]  # [2, heads, 1, d]
        parts = qkv.split([kind.windows * kind.tokens for kind in layout.kinds])
        outputs = []
        for kind, bias, rows in zip(layout.kinds, biases, parts, strict=True):
            heads = rows.view(kind.windows, kind.tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = heads.unbind(0)  # [windows, heads, tokens, d]
            if kind.pads:
                pads = pad[:, None].expand(-1, kind.windows, -1, -1, -1)
                k, v = torch.cat((k, pads[0]), dim=2), torch.cat((v, pads[1]), dim=2)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            outputs.append(out.transpose(1, 2).reshape(len(rows), -1))
        return self.proj(join(outputs))

    def biases(self, layout: Layout, dtype: torch.dtype) -> list[Tensor]:
        """What is added to the logits, for every kind of windows [1, heads, tokens, keys]."""
        values = self.relative_position_bias_table[layout.pairs] + layout.mask[:, None]
        found = []
        for kind, part in zip(
            layout.kinds, values.split([k.tokens * (k.tokens + k.pads) for k in layout.kinds]), strict=True
        ):
            matrix = part.view(1, kind.tokens, -1, self.num_heads).permute(0, 3, 1, 2)
            if kind.pads:
                real, pads = matrix.split([kind.tokens, kind.pads], dim=3)
                matrix = torch.cat((real, pads.logsumexp(3, keepdim=True)), dim=3)
            found.append(matrix.to(dtype, memory_format=torch.contiguous_format))
        return found


class Block(nn.Module):
    """Pre-norm block on rows in the order of its windows; keeps for the backward pass what a ViT's does."""

    def __init__(self, dim: int, window: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = WindowAttention(dim, window, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, layout: Layout, drops: tuple[Drop, Drop], checkpointing: str) -> Tensor:
        """[T, C] -> [T, C]; ``drops`` says what stochastic depth does to the two branches."""
        if checkpointing == "full" and torch.is_grad_enabled():
            return recompute(self.body, x, layout, drops, False)
        return self.body(x, layout, drops, checkpointing == "selective" and torch.is_grad_enabled())

    def body(self, x: Tensor, layout: Layout, drops: tuple[Drop, Drop], selective: bool) -> Tensor:
        x = add_branch(x, self.attn(x, self.norm1, layout), drops[0])
        y = recompute(self.mlp, x, self.norm2) if selective else self.mlp(x, self.norm2)
        return add_branch(x, y, drops[1])


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)

    def forward(self, x: Tensor, merge: Move) -> Tensor:
        """[T, C] -> [T', 2C]."""
        rows = move_rows(x, merge).view(-1, 4 * x.shape[1])
        return norm_linear(rows, self.norm, self.reduction).to(x.dtype)


class SwinStage(nn.Module):
    """Blocks of one resolution, then the merging into the next."""

    def __init__(
        self, dim: int, depth: int, window: int, num_heads: int, mlp_ratio: float, last: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, window, num_heads, mlp_ratio) for _ in range(depth))
        self.downsample = None if last else PatchMerging(dim)


class SwinPatchEmbed(PatchEmbed):
    """Patches of 4 x 4 pixels, then a norm."""

    def __init__(self, img_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(img_size, SWIN_PATCH, in_chans, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)


class SwinTransformer(nn.Module):
    """Swin backbone: images of any size to the mean of their normalised tokens, ``embed_dim`` wide.

    ``width`` is that of the first stage. The windows of a stage are ``window`` tokens wide, and every second
    block is shifted by half of that, unless the map of an ``img_size`` image is not larger: then the window
    is the map and nothing is shifted, for images of all sizes. ``num_heads`` are as many as make heads of 32
    channels. ``drop_path_rate`` is the stochastic depth of the last block in training mode (0 in the first,
    linear in between), drawn for every crop by PyTorch's default generator of the device.
    """

    def __init__(
        self,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        window: int = 7,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        num_heads: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        img_size: int = 224,
    ) -> None:
        super().__init__()
        widths = [width << i for i in range(len(depths))]
        heads = [max(1, w // 32) for w in widths] if num_heads is None else list(num_heads)
        for name, value in {"width": width, "window": window, "in_chans": in_chans}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if any(w % h for w, h in zip(widths, heads, strict=True)):
            raise ValueError(f"num_heads must divide the widths {widths}, got {heads}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        self.embed_dim, self.depths = widths[-1], tuple(depths)
        self.patch_size, self.in_chans, self.window = SWIN_PATCH, in_chans, window
        self.drop_path_rate = drop_path_rate
        self._checkpointing = "none"
        self.patch_embed = SwinPatchEmbed(img_size, in_chans, width)
        self.layers = nn.ModuleList()
        self.windows: tuple[tuple[tuple[int, int], ...], ...] = ()  # (side, shift) of every block
        for i, depth in enumerate(depths):
            side = img_size // SWIN_PATCH >> i
            size, shift = (side, 0) if side <= window else (window, window // 2)
            self.windows += (tuple((size, shift * (j % 2)) for j in range(depth)),)
            last = i + 1 == len(depths)
            self.layers.append(SwinStage(widths[i], depth, size, heads[i], mlp_ratio, last))
        self.norm = nn.LayerNorm(self.embed_dim, eps=EPS)
        self.apply(init_linear)

    @property
    def name(self) -> str:
        """Of the architecture, as ``--arch`` knows it, or the sizes of one that it does not know."""
        first = self.embed_dim >> len(self.depths) - 1
        named = [arch for arch, sizes in SWINS.items() if sizes == (first, self.depths, self.window)]
        return named[0] if named else f"swin {self.depths} {self.embed_dim} wide, window {self.window}"

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.depths)

    @property
    def checkpointing(self) -> str:
        """What the blocks recompute in the backward pass: none, selective (the MLPs) or full (blocks)."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: str) -> None:
        if value not in CHECKPOINTING:
            raise ValueError(f"checkpointing: expected one of {', '.join(CHECKPOINTING)}, got {value!r}")
        self._checkpointing = value

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Mean of the normalised tokens: one batch of images [B, C, H, W] -> [B, D], or a sequence of batches
        of possibly different resolutions -> [sum of B, D].
        """
        return self.forward_regions(x)[0]

    def forward_regions(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What :meth:`forward` gives, and the normalised tokens in the order of rows: one [B, T, D] for each
        resolution (neighbours of equal size are one).
        """
        tokens, stages, _ = self._run(x)
        regions = by_crop(self.norm(tokens), stages[-1], stages[-1].blocks[-1])
        return join([part.mean(1) for part in regions]), regions

    def probe_features(self, x: Tensor, n: int = 4) -> Tensor:
        """What a linear classifier sees: mean tokens of the last ``n`` blocks one after another, deepest
        last, those of the last stage normalised. Images [B, C, H, W] -> [B, sum of widths].
        """
        if not 1 <= n <= self.depth:
            raise ValueError(f"n must be between 1 and the number of blocks ({self.depth}), got {n}")
        _, stages, outputs = self._run(x, last=n)
        features = []
        for stage, layout, tokens in outputs:
            tokens = self.norm(tokens) if stage is stages[-1] else tokens
            features.append(join([part.mean(1) for part in by_crop(tokens, stage, layout)]))
        return torch.cat(features, dim=1)

    def _run(
        self, x: Tensor | Sequence[Tensor], last: int = 0
    ) -> tuple[Tensor, Sequence[Stage], deque[Output]]:
        """Tokens after the last block, the stages, and what each of the ``last`` blocks gave."""
        tokens, maps = self.prepare_tokens([x] if isinstance(x, Tensor) else x)
        stages = plan(maps, self.windows, tokens.device, self.training)
        drops = iter(self._drops(tokens, maps))
        outputs: deque[Output] = deque(maxlen=last)
        for stage, layer in zip(stages, self.layers, strict=True):
            assert isinstance(layer, SwinStage)
            for layout, block in zip(stage.blocks, layer.blocks, strict=True):
                scales = next(drops)
                pair = NOTHING if scales is None else scales.index_select(0, layout.crop).split(1, dim=1)
                tokens = block(move_rows(tokens, layout.enter), layout, pair, self.checkpointing)
                outputs.append((stage, layout, tokens))
            if layer.downsample is not None:
                assert stage.merge is not None
                tokens = layer.downsample(tokens, stage.merge)
        return tokens, stages, outputs

    def prepare_tokens(self, crops: Sequence[Tensor]) -> tuple[Tensor, Maps]:
        """Normalised patch tokens of all crops in one matrix [T, C], crop after crop, and the maps they
        form.
        """
        if not crops:
            raise ValueError("expected at least one batch of images, got an empty sequence")
        parts: list[Tensor] = []
        maps: list[tuple[int, int, int]] = []
        for x in crops:
            if x.ndim != 4 or x.shape[1] != self.in_chans or min(x.shape[2:]) < SWIN_PATCH:
                expected = f"[B, {self.in_chans}, H, W] with H and W of at least {SWIN_PATCH}"
                raise ValueError(f"images must be {expected}, got shape {tuple(x.shape)}")
            batch, height, width = len(x), x.shape[2] // SWIN_PATCH, x.shape[3] // SWIN_PATCH
            parts.append(self.patch_embed(x).flatten(0, 1))
            if maps and maps[-1][1:] == (height, width):
                batch += maps.pop()[0]
            maps.append((batch, height, width))
        rows, norm = join(parts), self.patch_embed.norm
        return norm(rows.to(torch.promote_types(rows.dtype, norm.weight.dtype))), tuple(maps)

    def _drops(self, tokens: Tensor, maps: Maps) -> list[Tensor | None]:
        """For every block what its branches are multiplied with, [crops, 2]."""
        if not self.training or self.drop_path_rate == 0.0:
            return [None] * self.depth
        rates = torch.linspace(0, self.drop_path_rate, self.depth, dtype=tokens.dtype, device=tokens.device)
        draws = torch.rand(self.depth, sum(n for n, _, _ in maps), 2, device=tokens.device)
        keep = 1 - rates[:, None, None]
        return list(((draws < keep) / keep).unbind(0))


def by_crop(tokens: Tensor, stage: Stage, layout: Layout) -> list[Tensor]:
    """Rows in the order of ``layout`` -> [B, H*W, C] for each resolution, row by row."""
    rows = move_rows(tokens, layout.raster)
    parts = rows.split([n * h * w for n, h, w in stage.maps])
    return [part.view(n, h * w, -1) for part, (n, h, w) in zip(parts, stage.maps, strict=True)]


def move_rows(x: Tensor, move: Move | None) -> Tensor:
    """The rows of ``x`` [T, C] as ``move`` says."""
    return x if move is None else _MoveRows.apply(x, move)


class _MoveRows(torch.autograd.Function):
    """A gather whose backward pass is a gather too: every row goes to one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move) -> Tensor:
        ctx.move = move
        return (F.pad(x, (0, 0, 0, 1)) if move.padded else x).index_select(0, move.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.move.inverse), None


def resize_bias_table(table: Tensor, window: int) -> Tensor:
    """A bias table [(2v - 1)^2, heads] for windows of ``window`` tokens instead of v: bicubic, per head."""
    side = round(len(table) ** 0.5)
    if side == 2 * window - 1:
        return table
    grid = table.t().reshape(1, -1, side, side)
    size = (2 * window - 1, 2 * window - 1)
    return F.interpolate(grid, size=size, mode="bicubic", align_corners=False)[0].flatten(1).t().contiguous()


def standard_swin(arch: str, **arguments: Any) -> SwinTransformer:
    """The Swin named ``arch``; further arguments as for :class:`SwinTransformer`."""
    name = ALIASES.get(arch, arch)
    if name not in SWINS:
        raise ConfigError("arch", f"expected one of {', '.join(SWINS)}, got {arch!r}")
    width, depths, window = SWINS[name]
    return SwinTransformer(width, depths, window, **arguments)
