"""Self-attention over crops of different sizes whose tokens lie one after another in a single matrix.

A batch of multi-crop views is described by ``groups``: a tuple of ``(crops, tokens per crop)``, one entry per resolution, in
the order of the rows. Everything that works on single tokens (norms, projections, MLPs) runs once over all ``T`` rows; only the
attention itself looks at the groups, each one a dense batch for ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = tuple[tuple[int, int], ...]


def attention(qkv: Tensor, groups: Groups, num_heads: int) -> Tensor:
    """Softmax attention inside every crop.

    ``qkv`` is the output of the fused projection, [T, 3*D]: queries, keys, values, each of ``num_heads`` heads. Returns [T, D].
    """
    outputs = []
    for part, (crops, tokens) in zip(_split(qkv, groups), groups, strict=True):
        q, k, v = _heads(part, crops, tokens, 3, num_heads)
        outputs.append(_sdpa(q, k, v).transpose(1, 2).reshape(crops * tokens, -1))
    return _join(outputs).to(qkv.dtype)


def cls_attention(q: Tensor, kv: Tensor, groups: Groups, num_heads: int) -> Tensor:
    """What :func:`attention` gives for the first token of every crop, without computing the others.

    ``q`` [crops, D] holds the queries of the first tokens, ``kv`` [T, 2*D] the keys and values of all. Returns [crops, D].
    """
    outputs = []
    queries = q.split([crops for crops, _ in groups])
    for query, part, (crops, tokens) in zip(queries, _split(kv, groups), groups, strict=True):
        k, v = _heads(part, crops, tokens, 2, num_heads)
        (query,) = _heads(query, crops, 1, 1, num_heads)
        outputs.append(_sdpa(query, k, v).reshape(crops, -1))
    return _join(outputs).to(q.dtype)


def attention_map(qkv: Tensor, crops: int, num_heads: int) -> Tensor:
    """The attention probabilities themselves, [crops, heads, N, N], for ``qkv`` [crops*N, 3*D]; rows sum to 1."""
    q, k, _ = _heads(qkv, crops, qkv.shape[0] // crops, 3, num_heads)
    with _no_autocast(qkv):
        q, k = _wide(q), _wide(k)
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def _split(rows: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    # Not slices: the backward of a split is one concatenation, that of slices a zero-filled matrix each and their sum.
    return rows.split([crops * tokens for crops, tokens in groups])


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _heads(rows: Tensor, crops: int, tokens: int, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """[crops*tokens, parts*D] -> ``parts`` views [crops, heads, tokens, D/heads]."""
    return rows.view(crops, tokens, parts, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    return torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    # The 16-bit backward on CPU is several times slower than the fp32 one at the 37 tokens of a local crop.
    with _no_autocast(q):
        return F.scaled_dot_product_attention(_wide(q), _wide(k), _wide(v))
