"""DINO on CIFAR-10 against the clock: seconds from the start of the process to a k-NN accuracy, without
labels.

python -m bench.speedrun --images DIR [--preset NAME] [--target 39] [--seeds 0 1 2] [--save] [FLAG ...]

DIR holds CIFAR-10 (or another set) as image files, train/ and test/ with a folder per class. Each seed is
`train.py --preset cifar10-speedrun`, without a GPU `cifar10-cpu`, in a process of its own, from random
weights, with empty caches for what it compiles: the recipe is the preset, this program reads what the run
logs; every other FLAG goes to train.py. Decoded images stay in memory, that of the GPU if there is one, whose
kernels make the crops.

Accuracy: k-NN top-1 (k = 20) of the teacher on test/, labelled by images of train/; a time is that of the end
of the first evaluation that reaches the target. Times count everything since the process began: imports,
listing and decoding the images, compiling, evaluations. Beside them the same without compiling, and the
training steps alone. CPU seconds are those of all threads, and hardly change when others use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness import Transcript, save

ROOT = Path(__file__).parents[1]
LAYOUT = "expected DIR/train/CLASS/*.png or .jpg and DIR/test/CLASS/*"
TARGETS = {"cifar10-speedrun": 70.0, "cifar10-cpu": 39.0}
STEP = ("t_forward", "t_backward", "t_update")  # phases in which something may be compiled
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito's


def run(images: Path, preset: str, seed: int, flags: list[str], out: Path) -> dict[str, Any]:
    """Train with ``preset`` in ``out``; what the run logged, and when, seen from outside.

    -> ``started`` (time of day), ``cpu`` {step of an evaluation: CPU seconds until then}, ``gpu`` (whether
    it ran on one), ``metrics``, ``evaluations``, ``environment``. SystemExit if the run fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = ["--data_path", images / "train", "--eval_data_path", images / "test", "--output_dir", out]
    words = ["--preset", preset, *paths, "--seed", seed, *flags]
    caches = {f"{name}_CACHE_DIR": str(out / "compiled") for name in ("TORCHINDUCTOR", "TRITON")}
    cpu: dict[int, float] = {}
    before, started = cpu_seconds(), time.time()
    child = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words)], env=os.environ | caches)
    try:
        while True:
            ended = child.poll() is not None
            for record in lines(out / "eval.jsonl"):
                if record["step"] not in cpu:
                    cpu[record["step"]] = cpu_seconds() - before if ended else cpu_seconds(child.pid)
            if ended:
                break
            time.sleep(0.2)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if child.returncode:
        raise SystemExit(f"seed {seed}: train.py ended with exit code {child.returncode}")
    facts = json.loads((out / "environment.json").read_text())
    found = {"metrics": lines(out / "metrics.jsonl"), "evaluations": lines(out / "eval.jsonl")}
    gpu = torch.cuda.is_available() and facts["device"] == torch.cuda.get_device_name()
    return {"started": started, "cpu": cpu, "gpu": gpu, "environment": facts, **found}


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file that is being written: those whose line is complete."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def cpu_seconds(pid: int | None = None) -> float:
    """CPU time of a running child and its threads so far, or of all children that have ended."""
    if pid is None:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timeline(found: dict[str, Any], target: float) -> dict[str, Any]:
    """The curve of a run and its seconds at the target, from what it logged.

    A log line covers the steps since the one before it: n of them took n * batch / img_s. What compiling
    took: by how much the first line's steps were longer than later ones, the wait for data left out, and the
    first evaluation longer than later ones; only a GPU compiles. -> ``curve``: rows of {step, epoch, knn,
    seconds, without_compile, training, cpu}; ``reached``: the first of them at the target, or None;
    ``phases``: seconds of the whole run by what they went into; ``gpu``.
    """
    batch, metrics, evaluations = found["environment"]["global_batch"], found["metrics"], found["evaluations"]
    ends = [record["step"] for record in metrics]
    counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    took = [n * batch / record["img_s"] for n, record in zip(counts, metrics, strict=True)]
    compiling = {"steps": 0.0, "evaluation": 0.0}
    if found["gpu"] and len(metrics) > 1:
        phases = [sum(record[phase] for phase in STEP) for record in metrics]
        compiling["steps"] = max(0.0, counts[0] * (phases[0] - statistics.median(phases[1:])))
        later = [record["seconds"] for record in evaluations[1:]]
        compiling["evaluation"] = max(0.0, evaluations[0]["seconds"] - statistics.median(later))
    curve = []
    for record in evaluations:
        step, seconds = record["step"], record["time"] - found["started"]
        compiled = compiling["evaluation"] + (compiling["steps"] if step else 0.0)
        # the part of a log line's steps that were taken by then
        shares = [min(1.0, max(0.0, (step - end + n) / n)) for end, n in zip(ends, counts, strict=True)]
        training = sum(share * t for share, t in zip(shares, took, strict=True))
        curve.append(
            {
                "step": step,
                "epoch": record["epoch"],
                "knn": record["knn"]["20"],
                "seconds": seconds,
                "without_compile": seconds - compiled,
                "training": max(0.0, training - (compiling["steps"] if step else 0.0)),
                "cpu": found["cpu"][step],
            }
        )
    end = curve[-1]
    evaluating = sum(record["seconds"] for record in evaluations) - compiling["evaluation"]
    phases = {
        "start": end["without_compile"] - end["training"] - evaluating,
        "compiling": sum(compiling.values()),
        "training": end["training"],
        "evaluations": evaluating,
    }
    reached = next((row for row in curve if row["step"] and row["knn"] >= target), None)
    return {"curve": curve, "reached": reached, "phases": phases, "gpu": found["gpu"]}


def report(
    say: Transcript, results: dict[int, dict[str, Any]], baselines: dict[str, float], target: float
) -> None:
    """The table: a line per seed and their median, then where the time went."""
    known = ", ".join(f"{name} {value:.1f} %" for name, value in baselines.items())
    say(f"k-NN top-1 (k = 20) without training: {known}")
    say(f"{'':8} {'final':>7} {f'seconds to {target:g} %:':>22} {'without':>12} {'steps':>8} {'CPU':>9}")
    say(f"{'':8} {'k-NN, %':>7} {'from process start':>22} {'compiling':>12} {'alone':>8} {'seconds':>9}")
    keys = {"seconds": 22, "without_compile": 12, "training": 8, "cpu": 9}
    for seed, result in results.items():
        row = result["reached"]
        times = "".join(f" {row[key]:{width}.1f}" for key, width in keys.items()) if row else " not reached"
        say(f"seed {seed:<3} {result['curve'][-1]['knn']:7.1f}{times}")
    reached = [result["reached"] for result in results.values()]
    if len(reached) > 1 and all(reached):
        final = statistics.median(result["curve"][-1]["knn"] for result in results.values())
        times = "".join(
            f" {statistics.median(row[key] for row in reached):{w}.1f}" for key, w in keys.items()
        )
        say(f"median   {final:7.1f}{times}")
    for seed, result in results.items():
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["phases"].items())
        total = result["curve"][-1]["seconds"]
        say(f"seed {seed}: {total:.1f} s to the last evaluation: {spent}")


def picture(
    results: dict[int, dict[str, Any]], baselines: dict[str, float], target: float, title: str, path: Path
) -> None:
    """Accuracy against seconds since the process began, a line per seed; of a run without a GPU also against
    its CPU seconds, dashed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for i, (seed, result) in enumerate(results.items()):
        clocks = {"seconds": f"seed {seed}"}
        clocks |= {} if result["gpu"] else {"cpu": f"seed {seed}, CPU seconds"}
        for (key, label), style in zip(clocks.items(), ("-o", "--s"), strict=False):
            xs, ys = ([row[name] for row in result["curve"]] for name in (key, "knn"))
            axes.plot(xs, ys, style, ms=4, lw=1.8, color=COLORS[i % len(COLORS)], label=label)
    for (name, value), style in zip([("target", target), *baselines.items()], ("-", ":", "--"), strict=True):
        color = "black" if name == "target" else "#777777"
        axes.axhline(value, color=color, lw=1, ls=style, label=f"{name}, {value:.1f} %")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the process began")
    axes.set_ylabel("k-NN top-1 (k = 20) on the test images, %")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="train/ and test/")
    default = "cifar10-speedrun" if torch.cuda.is_available() else "cifar10-cpu"
    parser.add_argument("--preset", default=default, help="the recipe (default here: %(default)s)")
    parser.add_argument("--target", type=float, help=f"k-NN top-1 in percent (default: {TARGETS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, help="keep the runs here")
    parser.add_argument("--save", action="store_true", help="write bench/results/, with the picture")
    args, flags = parser.parse_known_args()
    for name in ("train", "test"):
        if not (args.images / name).is_dir():
            parser.error(f"--images {args.images}: {LAYOUT}, found no folder {name}")
    target = TARGETS.get(args.preset, 50.0) if args.target is None else args.target
    say, results, found = Transcript(), {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            found = run(args.images, args.preset, seed, flags, (args.runs or Path(scratch)) / f"seed-{seed}")
            results[seed] = timeline(found, target)
    first, facts = found["evaluations"][0], found["environment"]
    baselines = {"untrained": first["untrained"]["20"], "raw pixels": first["raw_pixels"]["20"]}
    title = f"{args.preset}, {facts['images']} images, {facts['precision']} on {facts['device']}"
    say(" ".join([title, *flags]))
    report(say, results, baselines, target)
    if args.save:
        kept = {"preset": args.preset, "flags": flags, "target": target, "baselines": baselines}
        path = save("speedrun", say, {**kept, "seeds": results})
        print(path)
        picture(results, baselines, target, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
