"""Where the time and memory of a training step go: from the step as the official code organises it to ours,
one part after the other.

python -m bench.step [--arch vit_small] [--batch 8] [--local 8] [--official PATH] [--seconds 180] [--compile]

Each row replaces one more part of the row before by the one that training uses; the first one has none, and
with --official the official repository's own code comes before it. First all of them compute one step in
fp32, where losses and updated weights must agree. Then all take turns. A row gives the speed-up over the
first and over the previous one, and the peak memory of this step alone (see `bench.providers`). Compiled
blocks and CUDA graphs are for GPUs; --compile measures the former on a CPU too.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.harness import Transcript, save, summarise
from bench.machine import DTYPES, best, device, product_rate
from bench.providers import Problem, Provider, Side, add_arguments, gate, machine, problems, start, timed

Row = dict[str, Any]


def waterfall(gpu: bool, compiles: bool, official: bool) -> dict[str, Provider | str]:
    """The rows in order, or why one is not measured."""
    none = "this hardware has no fast 16-bit type" if best() == "fp32" else ""
    plain = dict(compile="off", cuda_graph=False)
    rows: dict[str, Provider | str] = {}
    rows["official"] = Provider("official") if official else "no --official PATH"
    rows["eager"] = Provider("eager", flags=dict(attention="math"))
    rows["+ packed crops"] = Provider("eager", options=dict(packed=True), flags=dict(attention="math"))
    rows["+ attention kernel"] = Provider("eager", options=dict(packed=True))
    rows["+ prototype_loss"] = Provider("eager", options=dict(packed=True, fused_loss=True))
    rows["+ AdamWEMA"] = Provider("train_step")
    rows["+ autocast"] = none or Provider("train_step", best())
    rows["+ memory kept"] = "for CPUs" if gpu else Provider("train_step", best(), dict(keep=True))
    rows["+ 16-bit weights"] = none or Provider("fastdino", best(), flags=plain)
    compiled = Provider("fastdino", best(), flags=plain | dict(compile="on"))
    rows["+ torch.compile"] = compiled if compiles else "no GPU, no --compile"
    graph = Provider("fastdino", best(), flags=dict(compile="on", cuda_graph=True))
    rows["+ CUDA graph"] = graph if gpu else "no GPU"
    return rows


def measure(case: Problem, args: argparse.Namespace, say: Transcript) -> list[Row]:
    rows = waterfall(device().type == "cuda", args.compile, args.official is not None)
    providers = {name: row for name, row in rows.items() if isinstance(row, Provider)}
    say(gate(case, providers, args.official))
    say(f"{case}, {machine()}")
    crops = case.crops()
    sides: dict[str, Side] = {name: start(p, case, crops, args.official) for name, p in providers.items()}
    times = timed(sides, crops, args.seconds)
    first = next(iter(providers))
    summary = summarise(times, first)
    found: list[Row] = []
    previous = first
    for name, row in rows.items():
        if isinstance(row, str):
            found.append({"row": name, "not_measured": row})
            continue
        over = summarise({p: times[p] for p in (previous, name)}, previous)[name]["speedup"]
        figures = summary[name] | {
            "over_previous": over,
            "rounds": len(times[name]),
            "loss": sides[name].loss,
        }
        found.append({"row": name, "dtype": row.dtype, **figures, **sides[name].memory})
        previous = name
    return found


def table(rows: list[Row]) -> str:
    head = f"{'step':18} {'type':4} {'ms':>9} {'min-max':>19} {'over first':>10} {'min-max':>13}"
    lines = [f"{head} {'previous':>8} {'peak GB':>8} {'of first':>8}"]
    base = next(row for row in rows if "median_s" in row)["peak_bytes"]
    for r in rows:
        if "not_measured" in r:
            lines.append(f"{r['row']:18} not measured ({r['not_measured']})")
            continue
        lines.append(
            f"{r['row']:18} {r['dtype']:4} {r['median_s'] * 1e3:9.1f} "
            f"{r['min_s'] * 1e3:9.1f}-{r['max_s'] * 1e3:9.1f} {r['speedup']:9.2f}x "
            f"{r['speedup_min']:6.2f}-{r['speedup_max']:6.2f} {r['over_previous']:7.2f}x "
            f"{r['peak_bytes'] / 1e9:8.2f} {r['peak_bytes'] / base:8.0%}"
        )
    return "\n".join(lines)


def targets(rows: list[Row]) -> list[str]:
    """What the project claims of the last row measured, against the official fp32 step."""
    rival, ours = rows[0], [row for row in rows if "median_s" in row][-1]
    claims = ("at least 3 times as fast as the official fp32 step", "in at most 60 % of its memory")
    if "not_measured" in rival:
        return [f"not measured  {claim}" for claim in claims]
    speed, memory = ours["speedup"], ours["peak_bytes"] / rival["peak_bytes"]
    return [
        f"{'met' if speed >= 3 else 'MISSED':12}  {claims[0]}: {speed:.2f}",
        f"{'met' if memory <= 0.6 else 'MISSED':12}  {claims[1]}: {memory:.0%}",
    ]


def roofline(case: Problem, toy: bool) -> str:
    """What a step would take that consisted of nothing but products as fast as a large one."""
    rates = {dtype: product_rate(DTYPES[dtype], toy) for dtype in dict.fromkeys(("fp32", best()))}
    found = ", ".join(
        f"{case.flops() / rate * 1e3:.0f} ms in {dtype} ({rate / 1e12:.2f} TFLOP/s)"
        for dtype, rate in rates.items()
    )
    return f"{case.flops() / 1e9:.0f} GFLOP at the rate of a large product: {found}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, seconds=180)
    parser.add_argument("--local", type=int, default=8, help="local crops")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile on a CPU too")
    args = parser.parse_args()
    args.compile |= device().type == "cuda"
    say = Transcript()

    (case,) = problems(args, [args.local], say)
    rows = measure(case, args, say)
    say(table(rows))
    say(roofline(case, args.toy))
    say("\n".join(targets(rows)))
    if args.save:
        print(save("step", say, {"configuration": str(case), "rows": rows}))


if __name__ == "__main__":
    main()
