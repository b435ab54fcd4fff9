"""Table 8 of the DINO paper, time and memory of multi-crop: a training step with 0, 2, 6 and 10 local crops.

python -m bench.table8 [--rows 0 2 6 10] [--batch 64] [--official PATH] [--seconds 60] [--save]

Ours against plain eager code (`eager_step.py`) and, with --official, the official repository's own. First all
sides' losses and updates are compared in fp32; then they take turns. GFLOP per image are those of
`fastdino.dryrun` (student forward and backward, teacher forward), MFU relates them to a matrix product
measured in the same run or to --peak_tflops. The implied hours are those that 16 such devices would take for
100 epochs of 1,281,167 images, at perfect scaling and with a loader that keeps up. Peak memory is that of
one step alone: on a GPU what PyTorch allocates, on a CPU the growth of a fresh process; the paper's is that
of its GPUs.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.harness import Transcript, save, summarise
from bench.machine import DTYPES, copy_rate, product_rate
from bench.providers import Problem, Provider, add_arguments, gate, machine, problems, standard, start, timed

PAPER = {0: (15.3, 9.3), 2: (17.0, 10.5), 6: (20.3, 12.9), 10: (24.2, 15.4)}  # local crops: hours, GB
IMAGES, EPOCHS, DEVICES = 1_281_167, 100, 16


def hours(images_per_second: float) -> float:
    """Of the paper's run, on its number of devices with this rate each."""
    return IMAGES * EPOCHS / DEVICES / images_per_second / 3600


def measure(
    case: Problem, providers: dict[str, Provider], args: argparse.Namespace, say: Transcript
) -> list[dict[str, Any]]:
    """One row of the table: every provider's figures."""
    say(f"\n{case}: {case.flops() / case.batch / 1e9:.1f} GFLOP per image")
    crops = case.crops()
    sides = {name: start(p, case, crops, args.official) for name, p in providers.items()}
    times = timed(sides, crops, args.seconds)
    rows = []
    for name, row in summarise(times, next(iter(providers))).items():
        dtype, rate = providers[name].dtype, case.batch / row["median_s"]
        flops = args.peak_tflops * 1e12 if args.peak_tflops else product_rate(DTYPES[dtype], args.toy)
        rows.append(
            {
                "local": case.local,
                "provider": name,
                "dtype": dtype,
                "batch": case.batch,
                **row,
                "rounds": len(times[name]),
                "loss": sides[name].loss,
                "images_per_second": rate,
                "gflop_per_image": case.flops() / case.batch / 1e9,
                "mfu": case.flops() / row["median_s"] / flops,
                **sides[name].memory,
                "hours": hours(rate),
            }
        )
    say(table(rows))
    if case.local in PAPER and not case.toy:
        time, size = PAPER[case.local]
        rate = IMAGES * EPOCHS / DEVICES / time / 3600
        step = f"{'paper, 16 V100':16} {64e3 / rate:9.1f} {'':42}"
        say(f"{step} {rate:8.1f} {'':6} {size:8.2f} {'':7} {time:9.1f}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'provider':16} {'ms/step':>9} {'min-max':>19} {'speed-up':>9} {'min-max':>12} {'img/s':>8}"
    lines = [f"{head} {'MFU':>6} {'peak GB':>8} {'memory':>7} {'hours':>9}"]
    for r in rows:
        lines.append(
            f"{r['provider']:16} {r['median_s'] * 1e3:9.1f} {r['min_s'] * 1e3:9.1f}-{r['max_s'] * 1e3:9.1f} "
            f"{r['speedup']:8.2f}x {r['speedup_min']:5.2f}-{r['speedup_max']:6.2f} "
            f"{r['images_per_second']:8.1f} {r['mfu']:6.1%} {r['peak_bytes'] / 1e9:8.2f} "
            f"{r['peak_bytes'] / rows[0]['peak_bytes']:7.0%} {r['hours']:9.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, seconds=60)
    parser.add_argument("--rows", type=int, nargs="+", default=list(PAPER), help="numbers of local crops")
    parser.add_argument("--peak_tflops", type=float, help="for MFU; by default measured")
    args = parser.parse_args()
    say = Transcript()

    cases = problems(args, args.rows, say)
    providers = standard(args.official)
    if args.official is None:
        say("official code: not measured (no --official PATH)")
    say(gate(cases[-1], providers, args.official))
    rates = {d: product_rate(DTYPES[d], args.toy) for d in sorted({p.dtype for p in providers.values()})}
    found = ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {d}" for d, rate in rates.items())
    say(f"matrix product {found}; copy {copy_rate(args.toy) / 1e9:.1f} GB/s; {machine()}")
    peaks = {"copy_bytes_per_s": copy_rate(args.toy), "flops_per_s": rates}
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows += measure(case, providers, args, say)
        if args.save:  # after every row: what is measured survives a time limit
            print(save("table8", say, {"configuration": str(case), "roofline": peaks, "rows": rows}))


if __name__ == "__main__":
    main()
