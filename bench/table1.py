"""Table 1 of the DINO paper, throughput of its networks: images per second of the forward pass.

python -m bench.table1 [--networks vit_small/16 ...] [--batch 128] [--official PATH] [--seconds 20] [--save]

Our ViT against the same network as plain eager code (`eager_step.py`) and, with --official, the official
repository's; ResNet-50 is torchvision's alone, where that can be imported. The weights are equal, and so must
the features be in fp32; then the sides take turns, in fp32 and in the hardware's best 16-bit type, to which
weights and images are converted. The paper's figures are one V100's, 128 images per pass, fp32 by their
arithmetic. FLOP: 24 N D^2 + 4 N^2 D per block of N tokens of width D, 6 D p^2 per patch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import official
from bench.eager_step import vit_features
from bench.harness import Transcript, interleave, save, summarise
from bench.machine import DTYPES, NAMES, device, exact, half, product_rate
from bench.providers import TOY, machine
from fastdino.config import Config, ModelConfig, backbone_shape, with_flags
from fastdino.evaluation.paper import paper_figure
from fastdino.models import build_backbone
from fastdino.models.attention import resolve_attention

NETWORKS = ("resnet50", "vit_small/16", "vit_small/8", "vit_base/16", "vit_base/8")
PAPER = {name: (paper_figure("throughput", "img_s_fp32", name, {}) or ("",))[0] for name in NETWORKS}
Forward = Callable[[Tensor], Tensor]


def forward_flops(model: ModelConfig, size: int) -> float:
    """FLOP of one image's forward pass through the backbone."""
    width, depth, _ = backbone_shape(model)
    patches = (size // model.patch_size) ** 2
    n = patches + 1
    blocks = depth * (24 * n * width**2 + 4 * n**2 * width)
    return float(blocks + 2 * patches * width * model.in_chans * model.patch_size**2)


def resnet50() -> nn.Module | str:
    """torchvision's, or why there is none."""
    try:
        from torchvision.models import resnet50 as make
    except (ImportError, RuntimeError) as error:  # beside a CPU build of torch it raises the latter
        known = isinstance(error, ModuleNotFoundError)
        return "torchvision is not installed" if known else "torchvision cannot be imported"
    return make()


def forwards(network: str, dtype: torch.dtype, args: argparse.Namespace) -> tuple[dict[str, Forward], Config]:
    """The sides' forward passes of one ViT, from equal weights."""
    arch, _, patch = network.partition("/")
    flags = dict(arch=arch, patch_size=int(patch), drop_path_rate=0.0) | (TOY if args.toy else {})
    config = with_flags(Config(), flags)
    model, size = config.model, config.crops.global_crops_size
    torch.manual_seed(0)
    ours = build_backbone(model, img_size=size).eval().to(device(), dtype)
    width, _, heads = backbone_shape(model)
    ours.set_attention(resolve_attention("auto", device=device(), dtype=dtype, head_dim=width // heads))
    found: dict[str, Forward] = {}
    if args.official is not None:
        rival = official.backbone(official.load(args.official), model, size).eval()
        rival.load_state_dict(ours.state_dict())
        found["official"] = rival.to(device(), dtype)
    found["eager"] = lambda images: vit_features(ours, images)
    found["fastdino"] = ours
    return found, config


@torch.no_grad()
def measure(network: str, args: argparse.Namespace, say: Transcript) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for dtype in [torch.float32] + [d for d in [half()] if d is not None]:
        if network == "resnet50":
            made = resnet50()
            if isinstance(made, str):
                say(f"{network:13} not measured ({made})")
                return rows
            calls: dict[str, Forward] = {"torchvision": made.eval().to(device(), dtype)}
            size, flops = 224, None
        else:
            calls, config = forwards(network, dtype, args)
            size = config.crops.global_crops_size
            flops = forward_flops(config.model, size)
        images = torch.randn(args.batch, 3, size, size, device=device()).to(dtype)
        if dtype == torch.float32:
            with exact():
                compare(network, {name: call(images[:2]) for name, call in calls.items()})
        times = interleave(
            {name: partial(call, images) for name, call in calls.items()},
            rounds=100,
            warmup=3 if device().type == "cuda" else 1,
            seconds=args.seconds,
        )
        for name, row in summarise(times, next(iter(calls))).items():
            rate = args.batch / row["median_s"]
            figures = {
                "network": network,
                "provider": name,
                "dtype": NAMES[dtype],
                "batch": args.batch,
                **row,
            }
            figures |= {"rounds": len(times[name]), "images_per_second": rate}
            if flops is not None:
                figures["gflop_per_image"] = flops / 1e9
                figures["mfu"] = rate * flops / product_rate(dtype, args.toy)
            rows.append(figures)
            say(line(figures))
    return rows


def compare(network: str, features: dict[str, Tensor]) -> None:
    """SystemExit unless all sides' features are equal up to rounding."""
    truth = features["fastdino"] if "fastdino" in features else next(iter(features.values()))
    for name, found in features.items():
        error = float((found - truth).norm() / truth.norm())
        if not error <= 1e-4:
            raise SystemExit(f"{network}: the features of {name} differ by {error:.1e}, nothing is timed")


def line(row: dict[str, Any]) -> str:
    rates = [row["batch"] / row[end] for end in ("max_s", "min_s")]
    text = f"{row['network']:13} {row['provider']:12} {row['dtype']:5} {row['images_per_second']:9.1f} "
    text += f"{rates[0]:9.1f}-{rates[1]:9.1f} {row['speedup']:8.2f}x "
    text += f"{row['mfu']:6.1%} " if "mfu" in row else f"{'':6} "
    return text + f"{PAPER.get(row['network'], ''):>6}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(PAPER), default=list(PAPER), metavar="NAME")
    parser.add_argument("--batch", type=int, help="images; 128 on a GPU, 8 on a CPU")
    parser.add_argument("--official", type=Path, metavar="PATH", help="checkout of facebookresearch/dino")
    parser.add_argument("--seconds", type=float, default=20, help="to spend on each network and type, about")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: checks this file; times mean nothing")
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    say = Transcript()

    args.batch = args.batch or (128 if device().type == "cuda" else 8)
    say(f"forward pass, batch {args.batch} (the paper's is 128), {machine()}")
    if args.official is None:
        say("official code: not measured (no --official PATH)")
    head = f"{'network':13} {'provider':12} {'type':5} {'img/s':>9} {'min-max':>19} {'speed-up':>9}"
    say(f"{head} {'MFU':>6} {'V100, paper':>6}")
    rows = [row for network in args.networks for row in measure(network, args, say)]
    rates = {d: product_rate(DTYPES[d], args.toy) for d in sorted({row["dtype"] for row in rows})}
    say("matrix product " + ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {d}" for d, rate in rates.items()))
    if args.save:
        print(save("table1", say, {"batch": args.batch, "roofline": {"flops_per_s": rates}, "rows": rows}))


if __name__ == "__main__":
    main()
