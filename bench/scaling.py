"""Scaling over processes: measured where there are several, and a model of the communication on clusters.

python -m bench.scaling [--processes 1 2] [--mesh replicate shard] [--batch 8] [--seconds 30] [--step_ms MS]

Measured: the command starts each number of processes by itself (gloo between CPUs, NCCL between GPUs). Weak
scaling gives every process `--batch` images, strong scaling divides them; efficiency is the rate per process
over that of a single one. On a CPU every process has the same number of cores in all runs, its part of the
cores in the largest one.

Model: bytes that one process sends in a step, from the parameter counts alone. With G bytes of gradients
(fp32), W of student and teacher weights (16 bits, the prototypes in fp32), n processes:

    replicate   all-reduce of the gradients                   2 G (n-1)/n
    shard       gather both models, scatter the gradients     (W + G) (n-1)/n
    RxS         the same inside of S, then an all-reduce      (W + G) (S-1)/S + 2 G/S (R-1)/R

Its time is that of the slowest link, where rings pass every node once and its GPUs share the network. A step
without communication takes --step_ms, or else its FLOP at --mfu of the data sheet's peak. The overlap needed
is the part that computation has to hide for an efficiency of 95 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import Transcript, save, synchronize
from bench.machine import best, device
from bench.providers import HYPER, Problem, add_arguments, problems
from fastdino.config import Config
from fastdino.dryrun import backbone_parameters, flops_per_image, head_parameters
from fastdino.engine import parallel
from fastdino.engine.build import build

KEPT = 0.95  # efficiency
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs; bytes per second in each direction: ``inside`` per GPU, ``outside`` per node."""

    name: str
    nodes: int
    gpus: int  # of a node
    inside: float
    outside: float
    peak: float  # FLOP/s, 16 bit, data sheet

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus


CLUSTERS = (
    Cluster("8 x V100, one node each, 100 Gb/s Ethernet", 8, 1, 150e9, 12.5e9, 125e12),
    Cluster("2 x 8 V100 (NVLink), 100 Gb/s Ethernet", 2, 8, 150e9, 12.5e9, 125e12),
    Cluster("8 x 8 A100 (NVLink), 100 Gb/s Ethernet", 8, 8, 300e9, 12.5e9, 312e12),
    Cluster("8 x 8 A100 (NVLink), 8 x 200 Gb/s InfiniBand", 8, 8, 300e9, 200e9, 312e12),
)


@dataclass(frozen=True)
class Volume:
    """Bytes that a process sends in one step: in rings over all processes, inside of its node, and between
    the replicas of its shard.
    """

    everywhere: float = 0.0
    inside: float = 0.0
    between: float = 0.0

    @property
    def total(self) -> float:
        return self.everywhere + self.inside + self.between

    def seconds(self, cluster: Cluster) -> float:
        """On the slowest link: a ring crosses each node's network once, the rings of its shards one each."""
        network = self.everywhere + cluster.gpus * self.between if cluster.nodes > 1 else 0.0
        return max(network / cluster.outside, self.total / cluster.inside if cluster.gpus > 1 else 0.0)


def volume(config: Config, mesh: str, processes: int, shards: int) -> Volume:
    """``mesh`` as the training flag has it, with RxS for ``shards`` processes that share one model."""
    model = config.model
    student = backbone_parameters(model, config.crops.global_crops_size) + head_parameters(model)
    frozen = model.out_dim if model.norm_last_layer and model.bottleneck_dim else 0
    prototypes = model.out_dim * model.bottleneck_dim
    gradients, weights = 4.0 * (student - frozen), 2 * (2.0 * student + 2.0 * prototypes)  # both models'
    if mesh == "replicate":
        return Volume(everywhere=2 * gradients * (processes - 1) / processes)
    if mesh == "shard":
        return Volume(everywhere=(gradients + weights) * (processes - 1) / processes)
    replicas = processes // shards
    inside = (gradients + weights) * (shards - 1) / shards
    return Volume(inside=inside, between=2 * gradients / shards * (replicas - 1) / replicas)


def model_rows(case: Problem, step_ms: float | None, mfu: float) -> list[Row]:
    """For each cluster and mesh what a step's communication takes, and how much of it has to be hidden."""
    config = case.config({})
    rows = []
    for cluster in CLUSTERS:
        step = step_ms / 1e3 if step_ms else flops_per_image(config) * case.batch / (mfu * cluster.peak)
        meshes = ["replicate", "shard"]
        if 1 < cluster.gpus < cluster.processes:
            meshes.append(f"{cluster.nodes}x{cluster.gpus}")
        for mesh in meshes:
            sent = volume(config, mesh, cluster.processes, cluster.gpus)
            took = sent.seconds(cluster)
            hidden = max(0.0, took - step * (1 / KEPT - 1)) / took
            figures = {"cluster": cluster.name, "mesh": mesh, "step_s": step, "bytes": sent.total}
            figures |= {"communication_s": took, "overlap_needed": hidden}
            rows.append(figures | {"efficiency_without_overlap": step / (step + took)})
    return rows


def model_table(rows: list[Row]) -> str:
    lines = []
    for r in rows:
        lines.append(
            f"model  {r['cluster']:46} {r['mesh']:10} {r['bytes'] / 1e6:7.1f} MB sent, "
            f"{r['communication_s'] * 1e3:6.1f} ms beside a step of {r['step_s'] * 1e3:6.1f} ms: "
            f"{r['overlap_needed']:4.0%} to be hidden, else {r['efficiency_without_overlap']:4.0%} efficiency"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- measured


def worker(words: dict[str, Any]) -> None:
    """One process of a measured run; rank 0 prints the seconds per step."""
    world = parallel.start("auto")
    case = Problem(**words["problem"])
    flags = {"mesh": words["mesh"], "precision": words["precision"], "compile": "off"}
    step, crops = build(case.config(flags), world).step, case.crops()
    times: list[float] = []
    began = time.perf_counter()
    while True:
        parallel.barrier()
        start = time.perf_counter()
        for _ in range(words["steps"]):
            step.enqueue(iter([crops]), HYPER)
            step.ring.take()
        synchronize()
        times.append((time.perf_counter() - start) / words["steps"])
        late = time.perf_counter() - began > words["seconds"] and len(times) > 3
        if parallel.any_of(late, world.device):
            break
    if world.main:
        print(json.dumps(times[1:]), flush=True)
    parallel.stop()


def run(case: Problem, processes: int, mesh: str, seconds: float, threads: int = 1) -> list[float]:
    """Seconds per step of every round, in ``processes`` fresh processes of ``threads`` threads each."""
    gpu = device().type == "cuda"
    words = {
        "problem": asdict(case),
        "mesh": mesh,
        "precision": best(),
        "seconds": seconds,
        "steps": 10 if gpu else 1,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launch, "-m", "bench.scaling", "--worker", json.dumps(words)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise SystemExit(f"{processes} processes, mesh {mesh}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Problem, args: argparse.Namespace, say: Transcript) -> list[Row]:
    rows: list[Row] = []
    threads = max(1, len(os.sched_getaffinity(0)) // max(args.processes))
    if device().type == "cpu":
        threads = min(threads, torch.get_num_threads())
        say(f"{threads} threads per process")
    say(f"{case}: images per second of all processes, per process against 1")
    one: float | None = None
    for processes in sorted(set(args.processes)):
        for mesh in args.mesh if processes > 1 else ["replicate"]:
            for kind in ("weak", "strong") if processes > 1 else ("weak",):
                share = case.batch if kind == "weak" else case.batch // processes
                if share == 0:
                    say(f"{processes} processes, strong: not measured (batch {case.batch})")
                    continue
                part = Problem(**asdict(case) | {"batch": share})
                times = run(part, processes, mesh, args.seconds, threads)
                rates = [processes * share / t for t in times]
                rate = statistics.median(rates)
                one = rate if processes == 1 else one
                row = {"processes": processes, "mesh": mesh, "kind": kind, "batch": share, "seconds": times}
                row |= {"images_per_second": rate, "min": min(rates), "max": max(rates)}
                row["efficiency"] = rate / (processes * one) if one else None
                rows.append(row)
                told = f"{row['efficiency']:6.0%}" if one else "not measured (no run of 1 process)"
                say(
                    f"{processes:3} x {share:3} images {mesh:10} {kind:6} {rate:9.1f} img/s "
                    f"{min(rates):9.1f}-{max(rates):9.1f}  efficiency {told}"
                )
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, seconds=30)
    parser.add_argument("--local", type=int, default=8, help="local crops")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="none: the model alone")
    parser.add_argument("--mesh", nargs="+", default=["replicate", "shard"])
    parser.add_argument("--step_ms", type=float, help="a step without communication, for the model")
    parser.add_argument("--mfu", type=float, default=0.35, help="of the data sheet's peak, without --step_ms")
    args = parser.parse_args()
    say = Transcript()

    gpus = torch.cuda.device_count()
    available = device().type == "cpu" or max(args.processes, default=0) <= gpus
    measured: list[Row] = []
    if args.processes and available:
        (case,) = problems(args, [args.local], say)
        measured = measure(case, args, say)
    elif args.processes:
        say(f"several processes: not measured ({gpus} GPU)")
    node = Problem(64, args.local, args.arch, args.patch_size, args.out_dim, args.toy)
    rows = model_rows(node, args.step_ms, args.mfu)
    say(f"\nmodel, not measured: {node} per GPU")
    say(model_table(rows))
    if args.save:
        print(save("scaling", say, {"configuration": str(node), "measured": measured, "model": rows}))


if __name__ == "__main__":
    main()
