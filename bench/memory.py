"""What a Transformer block keeps for its backward pass, and what that makes of a training step.

python -m bench.memory [--arch vit_small] [--patch_size 16] [--batch 64] [--save]

Counted, not timed: the storages that autograd keeps, each once, without weights and their 16-bit copies, in
bytes per token and channel under 16-bit autocast with an fp32 residual stream. The counts are those of a GPU:
in bf16 the CPU's flash kernel keeps what the GPU's does (q, k, v, the output, a number per query and head),
and the block of the official code computes softmax in fp32 as CUDA's autocast does. Our budget is 24: inputs
of the norms 4 + 4, q, k and v 6, attention's output 2, hidden layer 8. "compiled" is the block as the
partitioner of torch.compile divides it into forward and backward pass.

Attention's number per query and head, 4 H / D bytes per token and channel, comes on top of the budget, and
the last block, of which only [CLS] is used, stays far below it: "mean" is over all blocks, at 224 pixels.

Totals for the networks of the paper's Table 8 follow from the counts by arithmetic; with a GPU, the peak of
whole training steps is measured beside them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Transcript, save
from bench.machine import best, device
from bench.providers import Problem, Provider, start
from fastdino.config import ModelConfig, backbone_shape
from fastdino.models.attention import pack
from fastdino.models.linear import attach_low_precision
from fastdino.models.vit import CHECKPOINTING, Block, compiled_body

BUDGET = 24
# Local crops -> peak GB of the official code, from Table 8 of the paper (2 x 224 besides, 64 images per GPU).
TABLE_8 = {0: 9.3, 2: 10.5, 6: 12.9, 10: 15.4}
Body = Callable[[Tensor], Tensor]


def official_block(block: Block, x: Tensor) -> Tensor:
    """[B, N, D] -> [B, N, D] through the weights of ``block``, organised as in the official code."""
    attn, (batch, tokens, dim) = block.attn, x.shape
    qkv = F.linear(block.norm1(x), attn.qkv.weight, attn.qkv.bias)
    q, k, v = qkv.reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    p = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1, dtype=torch.float32)
    y = (p @ v).transpose(1, 2).reshape(batch, tokens, dim)
    x = x + F.linear(y, attn.proj.weight, attn.proj.bias)
    h = F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias)
    return x + F.linear(F.gelu(h), block.mlp.fc2.weight, block.mlp.fc2.bias)


def kept(function: Body, x: Tensor) -> int:
    """Bytes that ``function`` keeps for its backward pass, its input included.

    Weights and what is made of them are told by a second pass, which finds them again.
    """
    passes, results = [], []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            found: dict[int, int] = {}

            def keep(x: Tensor, found: dict[int, int] = found) -> Tensor:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                results.append(function(x.clone().requires_grad_()))
            passes.append(found)
    first, second = passes
    return sum(size for storage, size in second.items() if storage not in first)


def per_block(dim: int, heads: int, tokens: int, *, cls_only: bool = False) -> dict[str, float]:
    """Provider -> bytes per token and channel; ``cls_only``: our last block, of which only [CLS] is used."""
    crops = 2
    block = Block(dim, heads, 4.0)
    attach_low_precision(block, torch.bfloat16)
    groups = ((crops, tokens),)
    packing = pack(groups, "sdpa", "cpu", torch.bfloat16)._replace(kernels=("flash-cpu",))
    bodies: dict[str, Body] = {}
    if not cls_only:
        bodies["official"] = lambda x: official_block(block, x.view(crops, tokens, dim))
    for value in CHECKPOINTING:
        bodies[value] = lambda x, value=value: block(x, packing, cls_only=cls_only, checkpointing=value)
    body = compiled_body("aot_eager_decomp_partition")
    for value in ("none", "selective"):
        bodies[f"{value}, compiled"] = lambda x, value=value: block(
            x, packing, cls_only=cls_only, checkpointing=value, body=body
        )
    x = torch.randn(crops * tokens, dim)
    return {name: kept(function, x) / x.numel() for name, function in bodies.items()}


def counts(model: ModelConfig) -> list[dict[str, Any]]:
    """One row per provider: bytes per token and channel of a block, by the side of the crop."""
    width, _, heads = backbone_shape(model)
    sizes = {size: 1 + (size // model.patch_size) ** 2 for size in (224, 96)}
    blocks = {size: per_block(width, heads, tokens) for size, tokens in sizes.items()}
    last = {size: per_block(width, heads, tokens, cls_only=True) for size, tokens in sizes.items()}
    return [
        {
            "provider": name,
            "block": {size: blocks[size][name] for size in sizes},
            "last_block": {size: last[size].get(name, blocks[size][name]) for size in sizes},
        }
        for name in blocks[224]
    ]


def total(row: dict[str, Any], model: ModelConfig, batch: int, local: int) -> float:
    """Bytes that all blocks keep of ``batch`` images with 2 global and ``local`` local crops."""
    width, depth, _ = backbone_shape(model)
    found = 0.0
    for size, crops in ((224, 2), (96, local)):
        channels = batch * crops * (1 + (size // model.patch_size) ** 2) * width
        found += channels * depth * mean(row, depth, size)
    return found


def mean(row: dict[str, Any], depth: int, size: int) -> float:
    """Bytes per token and channel of a block, over all of them."""
    return ((depth - 1) * row["block"][size] + row["last_block"][size]) / depth


def count_table(rows: list[dict[str, Any]], model: ModelConfig, batch: int) -> str:
    head = f"{'':20}{'per block, bytes/token/channel':>32}{'computed: all blocks, GB, local crops':>48}"
    names = "".join(f"{local:>12}" for local in TABLE_8)
    lines = [head, f"{'':20}{'224':>8}{'96':>8}{'last':>8}{'mean':>8}{names}"]
    depth = backbone_shape(model)[1]
    for row in rows:
        block, last = row["block"], row["last_block"]
        sums = "".join(f"{total(row, model, batch, n) / 1e9:>12.2f}" for n in TABLE_8)
        lines.append(
            f"{row['provider']:20}{block[224]:>8.2f}{block[96]:>8.2f}{last[224]:>8.2f}"
            f"{mean(row, depth, 224):>8.2f}{sums}"
        )
    lines.append(f"{'budget':20}{BUDGET:>8.2f}{BUDGET:>8.2f}{'':8}{BUDGET:>8.2f}")
    paper = "".join(f"{peak:>12.1f}" for peak in TABLE_8.values())
    lines.append(f"{'paper, Table 8: peak of its step':52}{paper}")
    return "\n".join(lines)


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak bytes of training steps on this GPU; None where they did not fit."""
    sides = {"eager": Provider("eager", best())}
    for value in CHECKPOINTING:
        flags = {"activation_checkpointing": value, "cuda_graph": True}
        sides[value] = Provider("fastdino", best(), flags=flags)
    rows = []
    for name, provider in sides.items():
        peaks: dict[int, float | None] = {}
        for local in TABLE_8:
            problem = Problem(args.batch, local, args.arch, args.patch_size)
            try:
                peaks[local] = start(provider, problem, problem.crops(), None).memory["peak_bytes"]
            except torch.cuda.OutOfMemoryError:
                peaks[local] = None
        rows.append({"provider": name, "peak_bytes": peaks})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    say = Transcript()

    model = ModelConfig(arch=args.arch, patch_size=args.patch_size)
    rows = counts(model)
    what = f"{args.arch}/{args.patch_size}, batch {args.batch}, 2x224+Nx96"
    say(what)
    say(count_table(rows, model, args.batch))
    peaks = []
    if device().type == "cuda":
        peaks = measured(args)
        say("measured: peak GB of a training step, local crops " + ", ".join(map(str, TABLE_8)))
        for row in peaks:
            values = (math.nan if x is None else x / 1e9 for x in row["peak_bytes"].values())
            say(f"{row['provider']:52}" + "".join(f"{x:>12.2f}" for x in values))
    else:
        say("peak memory of a training step: not measured (no GPU)")
    if args.save:
        print(save("memory", say, {"configuration": what, "counts": rows, "peaks": peaks}))


if __name__ == "__main__":
    main()
