"""Training step of fastdino against the same step organised as the official code does it, on the same
tensors.

python -m bench.step [--arch vit_small] [--batch 8] [--local 8] [--rounds 5] [--save]

Correctness first: with everything in fp32, loss and updated weights of the two must agree. Then both are
timed in turns. GFLOP per image (student forward and backward, teacher forward) at ViT-S/16: 73.7 for 2 x 224,
113.4 with 8 x 96, 123.4 with 10."""

from __future__ import annotations

import argparse
import copy
import resource

import numpy as np
import torch

from bench.eager_step import EagerStep
from bench.harness import Transcript, interleave, save, summarise, table
from fastdino.config import Config
from fastdino.data.loader import Crops
from fastdino.engine.optim import Updater
from fastdino.engine.schedules import Hyper
from fastdino.engine.step import Scaler, train_step
from fastdino.engine.trainer import compute_dtype
from fastdino.methods.dino import DINO

HYPER = Hyper(lr=2e-5, weight_decay=0.04, momentum=0.996, teacher_temp=0.04, freeze_last_layer=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--local", type=int, default=8)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    say = Transcript()

    config = Config()
    config.model.arch, config.model.patch_size, config.model.out_dim = (
        args.arch,
        args.patch_size,
        args.out_dim,
    )
    config.model.drop_path_rate = 0.0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    method = DINO(config).to(device)
    crops = Crops(
        torch.randn(2 * args.batch, 3, 224, 224, device=device),
        torch.randn(args.local * args.batch, 3, 96, 96, device=device) if args.local else None,
        np.arange(args.batch),
    )
    rival = copy.deepcopy(method)
    eager = EagerStep(
        rival, lr=HYPER.lr, weight_decay=HYPER.weight_decay, momentum=0.996, teacher_temp=0.04, clip=3.0
    )
    ours = Updater(method.student, method.teacher, config.optim)

    def step(dtype: torch.dtype) -> float:
        return train_step(method, ours, iter([crops]), HYPER, dtype=dtype, scaler=Scaler(False)).loss

    loss_ours, loss_eager = step(torch.float32), eager(crops.global_, crops.local)
    worst = max(
        float((a - b).abs().max())
        for (name, a), b in zip(method.student.named_parameters(), rival.student.parameters(), strict=True)
        if not name.endswith("qkv.bias")  # the keys' part of it has no gradient but rounding noise
    )
    say(
        f"correctness (fp32): loss {loss_ours:.6f} against {loss_eager:.6f}, "
        f"largest weight difference {worst:.1e}"
    )
    # AdamW's first step moves a weight by lr * sign(gradient): where a gradient is rounding noise, by 2 lr at
    # most
    if abs(loss_ours - loss_eager) > 1e-4 * abs(loss_eager) or worst > 2.1 * HYPER.lr:
        raise SystemExit("the two steps disagree: nothing is timed")

    best = compute_dtype(config, device)
    names = {
        "eager fp32": lambda: eager(crops.global_, crops.local),
        "fastdino fp32": lambda: step(torch.float32),
    }
    if best != torch.float32:
        names[f"fastdino {str(best).removeprefix('torch.')}"] = lambda: step(best)
    rows = summarise(interleave(names, rounds=args.rounds), "eager fp32")
    what = f"{args.arch}/{args.patch_size}, 2x224+{args.local}x96, batch {args.batch}, "
    what += f"K {args.out_dim}, {torch.get_num_threads()} threads"
    say(what)
    say(table(rows, unit=dict.fromkeys(names, args.batch)))
    say(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if args.save:
        print(save("step", say, {"configuration": what, "rounds": args.rounds, "providers": rows}))


if __name__ == "__main__":
    main()
