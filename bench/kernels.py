"""Every operation of fastdino_kernels against eager PyTorch, torch.compile, foreach, and lightly, Liger and
apex where they can be imported.

python -m bench.kernels [--op NAME ...] [--quick] [--seconds 20] [--save] [--readme]

First all results are compared, by their errors relative to the largest value in fp32 arithmetic of the same
inputs: ours must agree, or nothing is timed; a rival that computes something else is left out and named. Then
the providers take turns. The roofline is measured in the same run, a copy and a large matrix product; a
percentage is the time that the least traffic or FLOP (kernel_cases.py) would take at those rates over the
time taken. Extra memory is the peak above the inputs and the returned results.

`--save` writes JSON, CSV and plots to bench/results and the tables of kernels/README.md, `--readme` only
those tables, from what was saved. `--quick` takes tiny problems: it checks this file, not the kernels' speed.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import kernel_cases as losses
from bench import kernel_report
from bench import update_cases as updates
from bench.harness import Transcript, interleave, save, summarise
from bench.kernel_cases import OURS, Case, Setting
from bench.kernel_report import OPERATIONS, Row, size_text
from bench.machine import copy_rate, product_rate

HEAD = 65536  # prototypes of the paper
KS = (1024, 4096, 16384, HEAD, 262144)
ROUNDS = (3, 15)


def cases(op: str, setting: Setting, quick: bool) -> Iterator[Callable[[], Case]]:
    """The problems of one operation, made one after another; the one with the paper's sizes comes first."""
    gpu = setting.device.type == "cuda"
    half = torch.bfloat16 if not gpu or torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    full, dtypes = torch.float32, (half, torch.float32) if gpu else (torch.float32, half)
    k, images, views = (1024, 2, 4) if quick else (HEAD, 64, 12 if gpu else 10)
    if op in ("dino_loss", "prototype_loss"):
        make = losses.dino_loss_case if op == "dino_loss" else losses.prototype_loss_case
        for dtype in dtypes:
            yield lambda dtype=dtype: make(setting, dtype, k, images, views)
        for other in (2048,) if quick else KS:
            if other != k:
                yield lambda other=other: make(setting, dtypes[0], other, images, views)
        for other in (4,) if quick else (8, 16, 32, 128):
            yield lambda other=other: make(setting, dtypes[0], k, other, views)
    elif op in ("soft_cross_entropy", "centered_softmax", "sinkhorn_knopp", "info_nce"):
        make = getattr(losses, f"{op}_case")
        for dtype in dtypes:
            yield lambda dtype=dtype: make(
                setting, dtype, k, 256 if op == "info_nce" and not quick else images
            )
    elif op == "patch_loss":
        for dtype in dtypes[:1] if quick else dtypes:
            yield lambda dtype=dtype: losses.patch_loss_case(setting, dtype, k, 12 if quick else 1024)
    elif op == "region_loss":
        regions = [4, 4, 1, 1] if quick else [49, 49, *[9] * 8]
        yield lambda: losses.region_loss_case(setting, dtypes[0], k, images if quick or gpu else 8, regions)
    elif op == "normalize_weight":
        yield lambda: losses.normalize_weight_case(setting, full, k)
    else:
        make = {
            "AdamWEMA": updates.adamw_ema_case,
            "LARS": updates.lars_case,
            "LAMB": updates.lamb_case,
            "ema_update_": updates.ema_update_case,
            "clip_grad_per_tensor_": updates.clip_grad_case,
        }[op]
        yield lambda: make(setting, k, small=quick)


# ------------------------------------------------------------------------------------------------- measuring


def error(results: Sequence[Tensor], oracle: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value of its tensor; NaN counts as infinite."""
    worst = 0.0
    for value, truth in zip(results, oracle, strict=True):
        scale = truth.float().abs().max().clamp(min=1e-30)
        found = float((value.float() - truth.float()).abs().max() / scale)
        worst = max(worst, found if math.isfinite(found) else math.inf)
    return worst


def gate(case: Case) -> tuple[dict[str, float], list[str]]:
    """Errors of the providers that compute the same, and who was left out why.

    Rivals get more room than we do: eager code rounds half-precision logits once more, and adds up norms in
    fp32. The baseline stays in whatever its error, which is reported.
    """
    half = case.sizes["dtype"] != torch.float32
    baseline = next(iter(case.providers))
    oracle = [x.clone() for x in (case.oracle or case.providers[baseline])()]
    errors, left_out = {}, list(case.absent)
    for name in list(case.providers):
        if case.oracle is None and name == baseline:
            errors[name] = 0.0
            continue
        try:
            found = error(case.providers[name](), oracle)
        except Exception as failure:
            if name in (OURS, baseline):
                raise
            left_out.append(f"{name}: {type(failure).__name__}")
            del case.providers[name]
            continue
        if name == OURS and found > (0.05 if half else 1e-3):
            raise SystemExit(f"{case.op} {case.sizes}: differs by {found:.1e}; nothing is timed")
        if name != baseline and found > (0.5 if half else 1e-2):
            left_out.append(f"{name}: differs by {found:.1e}")
            del case.providers[name]
            continue
        errors[name] = found
    return errors, left_out


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """Several calls as one, so that the host's overhead hides behind the device's work."""

    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def timings(case: Case, budget: float) -> tuple[dict[str, list[float]], int]:
    """Seconds per call, by turns, within about ``budget`` seconds; the number of rounds."""
    once = {name: seconds(call) for name, call in case.providers.items()}
    least = 0.02 if torch.cuda.is_available() else 0.005
    counts = {name: max(1, min(100, math.ceil(least / t))) for name, t in once.items()}
    round_time = sum(once[name] * counts[name] for name in once)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(budget / round_time)))
    calls = {name: repeated(call, counts[name]) for name, call in case.providers.items()}
    times = interleave(calls, rounds=rounds, warmup=0)
    return {name: [t / counts[name] for t in values] for name, values in times.items()}, rounds


def peak_bytes(case: Case, name: str) -> int:
    """Peak of the memory allocated during a call, beyond what it returns."""
    call = case.providers[name]
    for x in case.leaves:
        x.grad = None
    if torch.cuda.is_available():
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            results = call()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        now = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
    return max(0, peak - (0 if case.in_place else sum(x.nbytes for x in results)))


class Roofline:
    """Rates of this machine: a copy, bytes read and written per second, and large matrix products."""

    def __init__(self, quick: bool) -> None:
        self.bandwidth = copy_rate(quick)
        self.products: dict[torch.dtype, float] = {}  # as far as they were asked for
        self._toy = quick

    def flops(self, dtype: torch.dtype) -> float:
        self.products[dtype] = product_rate(dtype, self._toy)
        return self.products[dtype]

    def least_seconds(self, case: Case) -> float:
        compute = case.flops / self.flops(case.sizes["dtype"]) if case.flops else 0.0
        return max(case.bytes / self.bandwidth, compute)


def measure(case: Case, roofline: Roofline, budget: float) -> tuple[list[Row], list[str]]:
    errors, left_out = gate(case)
    case.settle()
    times, rounds = timings(case, budget)
    summary = summarise(times, next(iter(case.providers)))
    least = roofline.least_seconds(case)
    rows = []
    for name, row in summary.items():
        rows.append(
            {
                "op": case.op,
                **{key: _plain(value) for key, value in case.sizes.items()},
                "provider": name,
                **row,
                "rounds": rounds,
                "gbytes_per_s": case.bytes / row["median_s"] / 1e9,
                "tflops": case.flops / row["median_s"] / 1e12,
                "roofline": least / row["median_s"],
                "extra_bytes": peak_bytes(case, name),
                "logits_bytes": case.logits,
                "error": errors[name],
            }
        )
    return rows, left_out


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


# -------------------------------------------------------------------------------------------------- reporting


def table(rows: Sequence[Row]) -> str:
    head = f"{'provider':30} {'median ms':>10} {'min-max':>19} {'speed-up':>9} {'GB/s':>7} {'TFLOP/s':>8}"
    lines = [f"{head} {'roofline':>8} {'extra MiB':>10} {'error':>8}"]
    for r in rows:
        lines.append(
            f"{r['provider']:30} {r['median_s'] * 1e3:10.3f} {r['min_s'] * 1e3:9.3f}-{r['max_s'] * 1e3:9.3f} "
            f"{r['speedup']:8.2f}x {r['gbytes_per_s']:7.1f} {r['tflops']:8.2f} {r['roofline']:8.0%} "
            f"{r['extra_bytes'] / 2**20:10.1f} {r['error']:8.1e}"
        )
    return "\n".join(lines)


def find(rows: Sequence[Row], op: str, provider: str, **sizes: Any) -> Row | None:
    wanted = {"op": op, "provider": provider, **sizes}
    return next((r for r in rows if all(r.get(key) == value for key, value in wanted.items())), None)


def targets(rows: Sequence[Row], device: str) -> list[str]:
    """The claims that the project makes for this kind of device, each met, missed or not measured."""
    k = dict(K=HEAD, B=64)
    loss, prototypes = find(rows, "dino_loss", OURS, **k), find(rows, "prototype_loss", OURS, **k)
    adamw, ema = find(rows, "AdamWEMA", OURS), find(rows, "ema_update_", OURS)
    chain = find(rows, "prototype_loss", "GEMM + dino_loss", **k)
    # A quick run's network is not the one that the claims are about.
    adamw, ema = (row if row and row["parameters"] > 40e6 else None for row in (adamw, ema))
    claims: list[tuple[str, Any, Callable[[], tuple[float, bool]]]] = []
    if device == "cpu":
        claims += [
            ("dino_loss >= 8x the official double loop", loss, lambda: _at_least(loss["speedup"], 8)),
            (
                "AdamWEMA >= 2x foreach AdamW and the official loops",
                adamw,
                lambda: _at_least(adamw["speedup"], 2),
            ),
            (
                "prototype_loss: extra memory <= 10 % of the logits",
                prototypes,
                lambda: _at_most(prototypes["extra_bytes"] / prototypes["logits_bytes"], 0.1),
            ),
        ]
    else:
        claims += [
            ("dino_loss >= 85 % of the roofline", loss, lambda: _at_least(loss["roofline"], 0.85)),
            ("AdamWEMA >= 85 % of the roofline", adamw, lambda: _at_least(adamw["roofline"], 0.85)),
            ("ema_update_ >= 90 % of the roofline", ema, lambda: _at_least(ema["roofline"], 0.9)),
            (
                "prototype_loss no slower than GEMM + dino_loss",
                prototypes and chain,
                lambda: _at_most(prototypes["median_s"] / chain["median_s"], 1.0),
            ),
            (
                "prototype_loss: extra memory <= 5 % of GEMM + dino_loss",
                prototypes and chain,
                lambda: _at_most(prototypes["extra_bytes"] / chain["extra_bytes"], 0.05),
            ),
        ]
    lines = []
    for text, there, value in claims:
        if not there:
            lines.append(f"not measured  {text}")
            continue
        number, met = value()
        lines.append(f"{'met' if met else 'MISSED':12}  {text}: {number:.3g}")
    return lines


def _at_least(value: float, bound: float) -> tuple[float, bool]:
    return value, value >= bound


def _at_most(value: float, bound: float) -> tuple[float, bool]:
    return value, value <= bound


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=OPERATIONS, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="tiny problems, no torch.compile")
    parser.add_argument("--seconds", type=float, default=20.0, help="to spend on timing each problem, about")
    parser.add_argument("--save", action="store_true", help="write bench/results/ and kernels/README.md")
    parser.add_argument("--readme", action="store_true", help="only rewrite the tables of kernels/README.md")
    args = parser.parse_args()

    if args.readme:
        kernel_report.write_readme()
        return
    if args.save and args.quick:
        parser.error("--save: a quick run's times mean nothing; nothing is kept of them")
    say = Transcript()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    setting = Setting(device, compiles=not args.quick)
    roofline = Roofline(args.quick)
    say(f"copy {roofline.bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    rows: list[Row] = []
    for op in args.op:
        for make in cases(op, setting, args.quick):
            if setting.compiles:
                torch.compiler.reset()
            gc.collect()
            found, left_out = measure(make(), roofline, 0.0 if args.quick else args.seconds)
            rows += found
            say(f"\n{op}, {size_text(found[0])}\n{table(found)}")
            for line in left_out:
                say(f"left out: {line}")
    rates = {str(_plain(dtype)): rate for dtype, rate in roofline.products.items()}
    for dtype, rate in rates.items():
        say(f"\nmatrix product in {dtype}: {rate / 1e12:.2f} TFLOP/s")
    say("\n" + "\n".join(targets(rows, device.type)))
    if args.save:
        claim = "kernels" if set(args.op) == set(OPERATIONS) else "kernels-" + "-".join(args.op)
        roof = {"copy_bytes_per_s": roofline.bandwidth, "flops_per_s": rates}
        path = save(claim, say, {"roofline": roof, "rows": rows})
        write_csv(path.with_suffix(".csv"), rows)
        print(path, *kernel_report.plot(path, rows), kernel_report.write_readme(), sep="\n")


if __name__ == "__main__":
    main()
