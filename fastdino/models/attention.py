"""Self-attention over crops of different sizes whose tokens lie one after another in a single matrix.

A batch of multi-crop views is described by ``groups``: a tuple of ``(crops, tokens per crop)``, one entry per
resolution, in the order of the rows. Everything that works on single tokens (norms, projections, MLPs) runs
once over all ``T`` rows; only the attention itself looks at the groups, each one a dense batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = tuple[tuple[int, int], ...]

# Longest crop whose 16-bit attention matrix is stored on CPU: 12.6 MB for one crop and six heads.
CPU_DENSE_TOKENS = 1024


def attention(qkv: Tensor, groups: Groups, num_heads: int) -> Tensor:
    """Softmax attention inside every crop.

    ``qkv`` is the output of the fused projection, [T, 3*D]: queries, keys, values, each of ``num_heads``
    heads. Returns [T, D].
    """
    outputs = []
    for part, (crops, tokens) in zip(split_groups(qkv, groups), groups, strict=True):
        q, k, v = _heads(part, crops, tokens, 3, num_heads)
        outputs.append(_attend(q, k, v).transpose(1, 2).reshape(crops * tokens, -1))
    return join(outputs).to(qkv.dtype)


def cls_attention(q: Tensor, kv: Tensor, groups: Groups, num_heads: int) -> Tensor:
    """What :func:`attention` gives for the first token of every crop, without computing the others.

    ``q`` [crops, D] holds the queries of the first tokens, ``kv`` [T, 2*D] the keys and values of all tokens.
    Returns [crops, D].
    """
    outputs = []
    queries = q.split([crops for crops, _ in groups])
    for query, part, (crops, tokens) in zip(queries, split_groups(kv, groups), groups, strict=True):
        k, v = _heads(part, crops, tokens, 2, num_heads)
        (query,) = _heads(query, crops, 1, 1, num_heads)
        outputs.append(_attend(query, k, v).reshape(crops, -1))
    return join(outputs).to(q.dtype)


def attention_map(qkv: Tensor, crops: int, num_heads: int) -> Tensor:
    """The attention probabilities, [crops, heads, N, N], for ``qkv`` [crops*N, 3*D]; rows sum to 1."""
    q, k, _ = _heads(qkv, crops, qkv.shape[0] // crops, 3, num_heads)
    with torch.autocast(qkv.device.type, enabled=False):
        q, k = _widened(q), _widened(k)
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def split_groups(rows: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """[T, D] -> one [crops*tokens, D] per group."""
    # Not slices: the backward of a split is one concatenation, that of slices a zero-filled matrix each.
    return rows.split([crops * tokens for crops, tokens in groups])


def join(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenation that copies nothing when there is a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _heads(rows: Tensor, crops: int, tokens: int, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """[crops*tokens, parts*D] -> ``parts`` views [crops, heads, tokens, D/heads]."""
    return rows.view(crops, tokens, parts, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [crops, heads, M, d], k and v [crops, heads, N, d] -> [crops, heads, M, d]."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        if q.dtype == torch.bfloat16 and k.shape[2] <= CPU_DENSE_TOKENS:
            return _dense_attention(q, k, v)
        # Far faster than in 16 bits, whose backward is pathological at the 37 tokens of a local crop.
        return F.scaled_dot_product_attention(_widened(q), _widened(k), _widened(v))


def _dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain matrix products; in bf16 on CPU 2 to 4 times faster than the fused kernel and as accurate."""
    crops, heads, rows, dim = q.shape
    q, k, v = (x.reshape(crops * heads, -1, dim) for x in (q, k, v))
    # beta=0 ignores the first argument; alpha scales before the product is rounded to bf16.
    logits = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    return torch.bmm(logits.softmax(dim=-1), v).view(crops, heads, rows, dim)
