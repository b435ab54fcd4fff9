"""What a step of every method costs beside DINO's, and whether that is more than its arithmetic.

python -m bench.methods [--rows dino byol ...] [--arch vit_small] [--local 8] [--seconds 240] [--save]

Our training step with the same backbone and crops, the methods by turns in one run. A method's share is its
time over DINO's, its arithmetic the ratio of the FLOP of both (products of backbone and head; queues and what
is done per element not counted); the last column is one over the other: above 1 a method costs more than its
arithmetic. Before anything is timed every method must make a step with a finite loss.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from bench.harness import Transcript, save, summarise
from bench.machine import best, device
from bench.providers import Problem, Provider, add_arguments, machine, problems, start, timed
from fastdino.dryrun import flops_per_image

ROWS: dict[str, dict[str, Any]] = {
    "dino": {},
    "predictor": {"predictor": "on"},
    "softmax_batch": {"teacher_op": "softmax_batch"},
    "sinkhorn": {"teacher_op": "sinkhorn"},
    "swav_dino": {"teacher_op": "sinkhorn", "teacher": "copy"},
    "mse": {"loss": "mse"},
    "infonce": {"loss": "infonce"},
    "byol": {"method": "byol"},
    "mocov2": {"method": "mocov2"},
    "swav": {"method": "swav"},
    "esvit": {"method": "esvit"},
}
TOY_SIZES = {"byol": {"hidden_mlp": 32}, "mocov2": {"hidden_mlp": 32}, "swav": {"hidden_mlp": 32}}


def measure(case: Problem, names: list[str], seconds: float) -> dict[str, dict[str, float]]:
    """Of each row median and range in seconds, time and FLOP relative to the first, peak memory in bytes."""
    plain: dict[str, Any] = dict(compile="off", cuda_graph=False) if device().type == "cpu" else {}
    flags = {name: ROWS[name] | plain | (TOY_SIZES.get(name, {}) if case.toy else {}) for name in names}
    crops = case.crops()
    sides = {
        name: start(Provider("fastdino", best(), flags=f), case, crops, None) for name, f in flags.items()
    }
    for name, side in sides.items():
        if not math.isfinite(side.loss):
            raise SystemExit(f"{name}: the loss is {side.loss}, nothing is timed")
    found = summarise(timed(sides, crops, seconds), names[0])
    work = {name: flops_per_image(case.config(f)) * case.batch for name, f in flags.items()}
    return {
        name: row
        | {"share": 1 / row["speedup"], "flops": work[name], "arithmetic": work[name] / work[names[0]]}
        | {"peak_bytes": sides[name].memory["peak_bytes"], "loss": sides[name].loss}
        for name, row in found.items()
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [
        f"{'method':14} {'ms/step':>9} {'min-max':>19} {'share':>6} {'arithmetic':>10} {'over it':>8} "
        f"{'peak GB':>8}"
    ]
    for name, r in rows.items():
        lines.append(
            f"{name:14} {r['median_s'] * 1e3:9.1f} {r['min_s'] * 1e3:9.1f}-{r['max_s'] * 1e3:9.1f} "
            f"{r['share']:6.2f} {r['arithmetic']:10.2f} {r['share'] / r['arithmetic']:8.2f} "
            f"{r['peak_bytes'] / 1e9:8.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, seconds=240)
    parser.add_argument("--local", type=int, default=8, help="local crops")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    args = parser.parse_args()
    say = Transcript()
    (case,) = problems(args, [args.local], say)
    say(f"{case}, {best()}, {machine()}")
    rows = measure(case, args.rows, args.seconds)
    say(table(rows))
    if args.save:
        print(save("methods", say, {"configuration": str(case), "rows": rows}))


if __name__ == "__main__":
    main()
