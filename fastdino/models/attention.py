"""Self-attention over crops of different sizes whose tokens lie one after another in a single matrix.

A batch of multi-crop views is described by ``groups``: a tuple of ``(crops, tokens per crop)``, one entry per
resolution, in the order of the rows. Everything that works on single tokens (norms, projections, MLPs) runs
once over all ``T`` rows; only the attention itself looks at the groups. Four backends compute it:

    sdpa      every group a dense batch, through a fused kernel of PyTorch that is called by name, so that
              nothing slower can take its place: flash (sm_80 and later, 16 bits), efficient (other GPUs, and
              fp32), flash-cpu; on the CPU in bf16 plain products are faster
    varlen    all crops in one call, told apart by their bounds: flash or efficient; CUDA only
    xformers  all crops in one call with a BlockDiagonalMask: flash or cutlass; CUDA only
    math      the formula, softmax(q k^T / sqrt(d)) v, with fp32 logits and probabilities; the oracle
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.models.attention_kernels import KERNELS

Groups = tuple[tuple[int, int], ...]

BACKENDS = ("sdpa", "xformers", "varlen", "math")

# Longest crop whose 16-bit attention matrix is stored on CPU: 12.6 MB for one crop and six heads.
CPU_DENSE_TOKENS = 1024

aten = torch.ops.aten


class Sequences(NamedTuple):
    """Crops as pieces of one long row: crop i has the queries ``q_bounds[i]`` to ``q_bounds[i + 1]``."""

    q_bounds: Tensor  # [crops + 1] int32 on the device, as k_bounds
    k_bounds: Tensor
    longest_q: int
    longest_k: int
    mask: Any = None  # of xformers


class Packing(NamedTuple):
    """Which rows form a crop, and what computes their attention; made by :func:`pack`."""

    groups: Groups
    backend: str
    dtype: torch.dtype  # of queries, keys and values
    kernels: tuple[str, ...]  # one per group
    tokens: Sequences | None = None  # of varlen and xformers: all tokens are queries
    cls: Sequences | None = None  # the first token of every crop is its only query


@cache
def pack(
    groups: Groups,
    backend: str = "sdpa",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Packing:
    """The packing of ``groups`` for queries of ``dtype`` on ``device``.

    Packings are kept for ever: no step after the first copies bounds to the device, and a captured CUDA graph
    can rely on their addresses.
    """
    device = torch.device(device)
    if backend in ("sdpa", "math"):
        kernels = tuple("math" if backend == "math" else _kernel(device, dtype, n) for _, n in groups)
        return Packing(groups, backend, dtype, kernels)
    kernel = _kernel(device, dtype, 0)
    lengths = [tokens for crops, tokens in groups for _ in range(crops)]
    with torch.inference_mode(False):  # in case that an evaluation comes first
        ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        firsts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
        tokens = Sequences(ends, ends, max(lengths), max(lengths))
        cls = Sequences(firsts, ends, 1, max(lengths))
        if backend == "xformers":
            from xformers.ops.fmha import BlockDiagonalMask

            mask = BlockDiagonalMask.from_seqlens(lengths, device=device)
            cls_mask = BlockDiagonalMask.from_seqlens([1] * len(lengths), lengths, device=device)
            tokens, cls = tokens._replace(mask=mask), cls._replace(mask=cls_mask)
    return Packing(groups, backend, dtype, (kernel,) * len(groups), tokens, cls)


def resolve_attention(choice: str, *, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that ``choice`` (auto or a backend) stands for, after it has run once on ``device``.

    ``dtype`` is the compute type. auto means sdpa until measurements say otherwise. Raises ConfigError naming
    what was expected and what came when the backend cannot run here.
    """
    backend = "sdpa" if choice == "auto" else choice
    if backend not in BACKENDS:
        raise ConfigError("attention", f"expected one of auto, {', '.join(BACKENDS)}, got {choice!r}")
    problem = _problem(backend, torch.device(device), dtype, head_dim)
    if problem:
        raise ConfigError("attention", f"{backend} {problem}")
    return backend


def describe_attention(backend: str, *, device: torch.device | str, dtype: torch.dtype) -> str:
    """Backend and the kernel that answers, as ``sdpa (flash)``."""
    if backend == "math":
        return backend
    device = torch.device(device)
    short, long = (_kernel(device, dtype, tokens) for tokens in (1, CPU_DENSE_TOKENS + 1))
    kernel = short if short == long else f"{short}; above {CPU_DENSE_TOKENS} tokens {long}"
    if backend == "xformers" and kernel == "efficient":
        kernel = "cutlass"
    return f"{backend} ({kernel})"


def _problem(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps ``backend`` from running, None if nothing does."""
    if backend == "math":
        return None
    if device.type == "cpu":
        return None if backend == "sdpa" else "expected a CUDA device, got cpu; sdpa runs there"
    name = str(dtype).removeprefix("torch.")
    if head_dim % 8:
        return f"expected heads whose width is a multiple of 8, got {head_dim}; math takes any"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"expected float16, bfloat16 or float32, got {name}; math takes any"
    kernel = _kernel(device, dtype, 0)
    if kernel == "efficient" and dtype == torch.bfloat16:
        major, minor = capability(device)
        return f"expected float16 or float32 on compute capability {major}.{minor}, got {name}"
    if kernel == "flash" and head_dim > 256:
        return f"expected heads of at most 256 channels, got {head_dim}; math takes any"
    problem = _xformers_problem() if backend == "xformers" else None
    return problem or _trial(backend, device, dtype, head_dim)


def _xformers_problem() -> str | None:
    try:
        from xformers import _cpp_lib
    except ImportError as error:
        return f"expected the package xformers, got {error}"
    cause = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    if cause is None:
        return None
    while cause.__cause__ is not None:
        cause = cause.__cause__
    # Although its attention is PyTorch's own, xformers refuses it without this library.
    return (
        f"expected a wheel built for CUDA {torch.version.cuda}, got one whose library does not load ({cause})"
    )


def _trial(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Forward and backward pass of two small groups, both forms; what went wrong."""
    groups = ((2, 5), (1, 3))
    try:
        packing = pack(groups, backend, device, dtype)
        qkv = torch.zeros(13, 3 * head_dim, dtype=dtype, device=device, requires_grad=True)
        q, kv = qkv[:3, :head_dim].contiguous(), qkv[:, head_dim:].contiguous()
        out = torch.cat((attention(qkv, packing, 1), cls_attention(q, kv, packing, 1)))
        torch.autograd.grad(out.sum(), qkv)
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        return f"failed on {device}: {' '.join(str(error).split())}"
    return None


def attention(qkv: Tensor, packing: Packing, num_heads: int) -> Tensor:
    """Softmax attention inside every crop.

    ``qkv`` is the output of the fused projection, [T, 3*D]: queries, keys, values, each of ``num_heads``
    heads. Returns [T, D].
    """
    if packing.tokens is not None:
        q, k, v = qkv.view(qkv.shape[0], 3, num_heads, -1).unbind(1)
        return _attend_packed(q, k, v, packing, packing.tokens)
    return _attend_grouped(packing, num_heads, qkv, None)


def cls_attention(q: Tensor, kv: Tensor, packing: Packing, num_heads: int) -> Tensor:
    """What :func:`attention` gives for the first token of every crop, without computing the others.

    ``q`` [crops, D] holds the queries of the first tokens, ``kv`` [T, 2*D] the keys and values of all tokens.
    Returns [crops, D].
    """
    if packing.cls is not None:
        k, v = kv.view(kv.shape[0], 2, num_heads, -1).unbind(1)
        return _attend_packed(q.view(q.shape[0], num_heads, -1), k, v, packing, packing.cls)
    return _attend_grouped(packing, num_heads, q, kv)


def attention_map(qkv: Tensor, crops: int, num_heads: int) -> Tensor:
    """The attention probabilities, [crops, heads, N, N], for ``qkv`` [crops*N, 3*D]; rows sum to 1."""
    q, k, _ = _heads(qkv, crops, qkv.shape[0] // crops, 3, num_heads)
    return _probabilities(q, k)


def split_groups(rows: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """[T, D] -> one [crops*tokens, D] per group."""
    # Not slices: the backward of a split is one concatenation, that of slices a zero-filled matrix each.
    return rows.split([crops * tokens for crops, tokens in groups])


def join(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenation that copies nothing when there is a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


# -- all crops in one call ---------------------------------------------------------------------------------


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, crops: Sequences) -> Tensor:
    """q [M, heads, d], k and v [T, heads, d] -> [M, heads*d]."""
    kernel = packing.kernels[0]
    if packing.backend == "xformers":
        from xformers.ops import fmha

        family = fmha.flash if kernel == "flash" else fmha.cutlass
        operators = (family.FwOp, family.BwOp)
        q, k, v = q[None], k[None], v[None]
        return fmha.memory_efficient_attention(q, k, v, attn_bias=crops.mask, op=operators)[0].flatten(1)
    if kernel == "flash":
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, crops.q_bounds, crops.k_bounds, crops.longest_q, crops.longest_k)
        assert isinstance(out, Tensor)
        return out.flatten(1)
    bounds = (crops.q_bounds, crops.k_bounds, crops.longest_q, crops.longest_k)
    out, *_ = aten._efficient_attention_forward(q[None], k[None], v[None], None, *bounds, 0.0, 0, True)
    return out[0].flatten(1)


# -- every group a dense batch -----------------------------------------------------------------------------


def _attend_grouped(packing: Packing, num_heads: int, first: Tensor, second: Tensor | None) -> Tensor:
    """Of qkv and None, or of q and kv."""
    rows = _given(first, second)
    if packing.backend == "math":
        views = _views_of_all(rows, packing.groups, num_heads)
        return join([_as_rows(_math(*qkv)) for qkv in views]).to(first.dtype)
    for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in rows)
    return _Grouped.apply(packing.groups, packing.kernels, num_heads, for_backward, first, second)


def _given(first: Tensor, second: Tensor | None) -> tuple[Tensor, ...]:
    return (first,) if second is None else (first, second)


class _Grouped(torch.autograd.Function):
    """Keeps its inputs, its output (which the next projection keeps anyway) and a number per query and head.

    The heads are views, and the gradients are written to where they belong in that of the fused projection.
    """

    @staticmethod
    def forward(
        ctx: Any,
        groups: Groups,
        kernels: tuple[str, ...],
        num_heads: int,
        for_backward: bool,
        first: Tensor,
        second: Tensor | None,
    ) -> Tensor:
        rows = _given(first, second)
        outputs, extras = [], []
        for kernel, qkv in zip(kernels, _views_of_all(rows, groups, num_heads), strict=True):
            out, *extra = KERNELS[kernel].forward(*qkv, for_backward)
            outputs.append(out)
            extras.append(extra)
        joined = _joined(outputs, rows[0].dtype)
        if for_backward:
            ctx.save_for_backward(joined, *rows, *(x for extra in extras for x in extra))
            ctx.setting = groups, kernels, num_heads, len(rows), [len(extra) for extra in extras]
        return joined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups, kernels, num_heads, count, counts = ctx.setting
        joined, *saved = ctx.saved_tensors
        rows, extras = saved[:count], iter(saved[count:])
        grads = [torch.empty_like(x) for x in rows]
        queries = groups if count == 1 else _firsts(groups)
        parts = zip(
            kernels,
            [[next(extras) for _ in range(count)] for count in counts],
            _views_of_all(rows, groups, num_heads),
            _views_of_all(grads, groups, num_heads),
            _views(joined, queries, 1, num_heads),
            _views(grad.contiguous(), queries, 1, num_heads),
            strict=True,
        )
        for kernel, extra, qkv, targets, (out,), (dout,) in parts:
            values = KERNELS[kernel].backward(dout, *qkv, out, *extra)
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
        return None, None, None, None, grads[0], grads[1] if count == 2 else None


def _joined(outputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One [crops, heads, M, d] per group -> rows [sum of crops*M, D], each copied once if at all."""
    if len(outputs) == 1:
        return _as_rows(outputs[0]).to(dtype)
    groups = tuple((len(out), out.shape[2]) for out in outputs)
    heads, dim = outputs[0].shape[1], outputs[0].shape[3]
    rows = outputs[0].new_empty(sum(crops * m for crops, m in groups), heads * dim, dtype=dtype)
    for (target,), out in zip(_views(rows, groups, 1, heads), outputs, strict=True):
        target.copy_(out)
    return rows


def _kernel(device: torch.device, dtype: torch.dtype, tokens: int) -> str:
    """The kernel for crops of ``tokens`` tokens."""
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cpu":
        return "flash" if half and capability(device) >= (8, 0) else "efficient"
    if dtype == torch.bfloat16 and tokens <= CPU_DENSE_TOKENS:
        return "dense"
    return "flash-cpu in fp32" if half else "flash-cpu"


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In fp32 or wider."""
    with torch.autocast(q.device.type, enabled=False):
        return _probabilities(q, k) @ _widened(v)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        q, k = _widened(q), _widened(k)
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _views_of_all(rows: Sequence[Tensor], groups: Groups, num_heads: int) -> list[tuple[Tensor, ...]]:
    """q, k and v of every group, as views of qkv [T, 3*D], or of q [crops, D] and kv [T, 2*D]."""
    if len(rows) == 1:
        return _views(rows[0], groups, 3, num_heads)
    queries, others = _views(rows[0], _firsts(groups), 1, num_heads), _views(rows[1], groups, 2, num_heads)
    return [q + kv for q, kv in zip(queries, others, strict=True)]


def _views(rows: Tensor, groups: Groups, parts: int, num_heads: int) -> list[tuple[Tensor, ...]]:
    """[T, parts*D] -> per group ``parts`` views [crops, heads, tokens, d]."""
    split = zip(split_groups(rows, groups), groups, strict=True)
    return [_heads(part, *group, parts, num_heads) for part, group in split]


def _firsts(groups: Groups) -> Groups:
    return tuple((crops, 1) for crops, _ in groups)


def _heads(rows: Tensor, crops: int, tokens: int, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """[crops*tokens, parts*D] -> ``parts`` views [crops, heads, tokens, D/heads]."""
    return rows.view(crops, tokens, parts, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _as_rows(x: Tensor) -> Tensor:
    """[crops, heads, tokens, d] -> [crops*tokens, D]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)
