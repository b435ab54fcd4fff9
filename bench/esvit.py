"""The loss of EsViT and MoCo's InfoNCE: time and memory of forward and backward against plain eager code.

python -m bench.esvit [--images 32] [--local 8] [--out_dim 65536] [--queries 256] [--seconds 120] [--save]

EsViT: 2 + N views of each image with 49 regions in a global and 9 in a local one (Swin, crops of 224 and 96
pixels), both prototype layers, matching, loss and gradients. The eager side is organised as the published
code is, a pair of views at a time: similarities, gathered rows of the teacher's softmax, log-softmax. Its
memory, in rows of K numbers for B images: B (98 + 9 N) logits of the student and 98 B targets, and for the
backward pass q and log p of every pair, 2 B (98 + 18 N): 6.3 GB in fp32 at the default sizes, transients and
gradients not counted.

InfoNCE: as many queries as MoCo's batch, 128 wide, a queue of 65536.

Both sides get the same fp32 tensors and run under autocast in the row's type, as training does. First they
must agree in fp32 on a few images. Memory is what a call adds to that of a fresh process which holds the
inputs, results included. Targets on a CPU: EsViT at least 3 times faster in at most 15 % of the memory,
InfoNCE in at most 20 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fastdino_kernels import info_nce, match_regions, prototype_loss, region_loss
from torch import Tensor

from bench.harness import Transcript, interleave, save, summarise, synchronize
from bench.machine import DTYPES, NAMES, device, exact, half
from bench.providers import load_libraries, machine, memory

S, U, T_CONTRAST = 0.1, 0.04, 0.1  # temperatures of student, teacher and contrast
MEMORY_TARGETS = {"esvit": 0.15, "info_nce": 0.20}
TIME_TARGET = 3.0
SIDES = ("eager", "fastdino")
Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Problem:
    """``rows`` are images of EsViT or queries of InfoNCE, ``columns`` prototypes or keys in the queue."""

    op: str
    rows: int
    columns: int
    dtype: str = "fp32"
    regions: tuple[int, ...] = ()
    """Of each view."""
    bottleneck: int = 256
    width: int = 768
    """Of the backbone's features."""


# --------------------------------------------------------------------------------------------------- EsViT


def esvit_inputs(p: Problem) -> dict[str, Tensor]:
    """Bottlenecks and prototypes of views and regions, of student (with gradients) and teacher."""
    rows = {"view": p.rows * len(p.regions), "region": p.rows * sum(p.regions)}
    teacher_rows = {"view": 2 * p.rows, "region": p.rows * sum(p.regions[:2])}
    found = {}
    for kind in rows:
        found[f"{kind}_z"] = unit(rows[kind], p.bottleneck)
        found[f"{kind}_weight"] = unit(p.columns, p.bottleneck)
        found[f"{kind}_y"] = unit(teacher_rows[kind], p.bottleneck)
        found[f"{kind}_target"] = unit(p.columns, p.bottleneck)
        found[f"{kind}_center"] = 0.01 * torch.randn(p.columns, device=device())
    found["features"] = torch.randn(rows["region"], p.width, device=device())
    found["teacher_features"] = torch.randn(teacher_rows["region"], p.width, device=device())
    return found


def esvit_eager(p: Problem, x: dict[str, Tensor]) -> Tensor:
    images = p.rows
    with torch.no_grad():
        q_view, q_region = (
            ((F.linear(x[f"{kind}_y"], x[f"{kind}_target"]) - x[f"{kind}_center"]) / U).softmax(-1)
            for kind in ("view", "region")
        )
    parts = [images * n for n in p.regions]
    student = (F.linear(x["view_z"], x["view_weight"]) / S).split(images)
    student_regions = (F.linear(x["region_z"], x["region_weight"]) / S).split(parts)
    features = x["features"].split(parts)
    losses = []
    for g in range(2):
        of_teacher = q_region.split(parts[:2])[g].view(images, p.regions[g], -1)
        unit_teacher = F.normalize(
            x["teacher_features"].split(parts[:2])[g].view(images, p.regions[g], -1), dim=2
        )
        for v, n in enumerate(p.regions):
            if v == g:
                continue
            of_view = -(q_view.split(images)[g] * student[v].log_softmax(-1)).sum(-1).mean()
            likeness = F.normalize(features[v].view(images, n, -1), dim=2) @ unit_teacher.mT
            best = likeness.argmax(2)  # [B, n]
            gathered = of_teacher.gather(1, best[:, :, None].expand(-1, -1, p.columns))  # [B, n, K]
            log_p = student_regions[v].view(images, n, -1).log_softmax(-1)
            losses.append((of_view - (gathered * log_p).sum(-1).mean()) / 2)
    return torch.stack(losses).mean()


def esvit_fastdino(p: Problem, x: dict[str, Tensor]) -> Tensor:
    view, region = (
        [x[f"{kind}_{name}"] for name in ("z", "weight", "y", "target", "center")]
        for kind in ("view", "region")
    )
    temps: dict[str, Any] = dict(student_temp=S, teacher_temp=U)
    match = match_regions(x["features"], x["teacher_features"], p.regions)
    return (prototype_loss(*view, **temps).loss + region_loss(*region, match, **temps).loss) / 2


# ------------------------------------------------------------------------------------------------- InfoNCE


def info_nce_inputs(p: Problem) -> dict[str, Tensor]:
    return {
        "z": unit(p.rows, p.bottleneck),
        "key": unit(p.rows, p.bottleneck),
        "queue": unit(p.columns, p.bottleneck).T.contiguous(),
    }


def info_nce_eager(p: Problem, x: dict[str, Tensor]) -> Tensor:
    positive = (x["z"] * x["key"]).sum(1, keepdim=True)
    logits = torch.cat([positive, x["z"] @ x["queue"]], dim=1) / T_CONTRAST
    return F.cross_entropy(logits, torch.zeros(p.rows, dtype=torch.int64, device=logits.device))


def info_nce_fastdino(p: Problem, x: dict[str, Tensor]) -> Tensor:
    return info_nce(x["z"], x["key"], x["queue"], temp=T_CONTRAST).loss


INPUTS = {"esvit": esvit_inputs, "info_nce": info_nce_inputs}
LOSSES = {
    ("esvit", "eager"): esvit_eager,
    ("esvit", "fastdino"): esvit_fastdino,
    ("info_nce", "eager"): info_nce_eager,
    ("info_nce", "fastdino"): info_nce_fastdino,
}


# ----------------------------------------------------------------------------------------------- measuring


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, device=device()), dim=1)


def calls(p: Problem) -> dict[str, Call]:
    """Forward and backward of each side on the same tensors: the loss and the gradients, by name."""
    torch.manual_seed(0)
    x = INPUTS[p.op](p)
    leaves = [x[name].requires_grad_() for name in sorted(x) if name.endswith(("z", "weight"))]

    def call(side: str) -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(device().type, DTYPES[p.dtype], enabled=p.dtype != "fp32"):
            loss = LOSSES[p.op, side](p, x)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return {side: lambda side=side: call(side) for side in SIDES}  # type: ignore[misc]


def gate(p: Problem) -> str:
    """Loss and gradients of both sides agree in fp32, on few rows; SystemExit otherwise."""
    small = replace(p, rows=min(p.rows, 2), dtype="fp32")
    with exact():
        eager, ours = (call() for call in calls(small).values())
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(eager, ours, strict=True)]
    said = f"{p.op}, fp32, {small.rows} rows: largest relative difference {max(errors):.0e}"
    if not max(errors) <= 1e-4:
        raise SystemExit(f"{said}: the sides disagree, nothing is timed")
    return said


def added(p: Problem, side: str) -> int:
    """Bytes that one call adds at its peak to this process, which holds the inputs already."""
    load_libraries()
    call = calls(p)[side]
    if device().type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = memory()["now"]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
    call()
    return max(1, memory()["peak"] - before)


def peak(p: Problem, side: str) -> int | None:
    """:func:`added` in a fresh process; None if that died, for want of memory."""
    command = [sys.executable, "-c", "from bench import esvit; esvit.child()", json.dumps([asdict(p), side])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return None if done.returncode else int(done.stdout.splitlines()[-1])


def child() -> None:
    """What the fresh process does."""
    words, side = json.loads(sys.argv[1])
    print(added(Problem(**{**words, "regions": tuple(words["regions"])}), side))


def measure(p: Problem, seconds: float, toy: bool) -> list[dict[str, Any]]:
    """One row for each side; of a toy, whose memory means nothing, without that."""
    added_bytes = {side: None if toy else peak(p, side) for side in SIDES}
    if not toy and None in added_bytes.values():
        raise SystemExit(f"{p}: not enough memory; choose fewer --images or a smaller --out_dim")
    times = summarise(interleave(calls(p), rounds=15, seconds=seconds), "eager")
    rows = [
        {**asdict(p), "provider": side, **row, "added_bytes": added_bytes[side]}
        for side, row in times.items()
    ]
    for row in rows:
        row["memory_share"] = None if toy else row["added_bytes"] / rows[0]["added_bytes"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'loss':10}{'type':6}{'provider':10}{'median s':>10}{'min-max':>17}{'speed-up':>10}"
        f"{'added MiB':>11}{'share':>8}  target"
    ]
    for row in rows:
        span = f"{row['min_s']:.3f}-{row['max_s']:.3f}"
        line = f"{row['op']:10}{row['dtype']:6}{row['provider']:10}{row['median_s']:>10.3f}{span:>17}"
        line += f"{row['speedup']:>9.2f}x"
        if row["memory_share"] is not None:
            line += f"{row['added_bytes'] / 2**20:>11.1f}{100 * row['memory_share']:>6.1f} %"
            line += f"  {verdict(row)}" if row["provider"] == "fastdino" else ""
        lines.append(line)
    return "\n".join(lines)


def verdict(row: dict[str, Any]) -> str:
    """The targets and whether this row meets them."""
    target = MEMORY_TARGETS[row["op"]]
    met = row["memory_share"] <= target
    said = f"<= {100 * target:.0f} %"
    if row["op"] == "esvit":
        met, said = met and row["speedup"] >= TIME_TARGET, f">= {TIME_TARGET:g}x, {said}"
    return f"{said}: {'met' if met else 'missed'}"


def problems(args: argparse.Namespace) -> list[Problem]:
    dtypes = [NAMES[dtype] for dtype in (torch.float32, half()) if dtype is not None]
    if args.toy:
        base = [Problem("esvit", 2, 96, regions=(4, 4, 1), bottleneck=8, width=12)]
        base += [Problem("info_nce", 3, 64, bottleneck=8)]
    else:
        regions = (49, 49) + args.local * (9,)
        base = [Problem("esvit", args.images, args.out_dim, regions=regions)]
        base += [Problem("info_nce", args.queries, 65536, bottleneck=128)]
    return [replace(p, dtype=dtype) for p in base for dtype in dtypes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--local", type=int, default=8, help="local views")
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=120.0, help="to spend on timing, about, per row")
    parser.add_argument(
        "--toy", action="store_true", help="tiny sizes: checks this file; figures mean nothing"
    )
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    say, rows = Transcript(), []
    sizes = f"EsViT: {args.images} images, 2 + {args.local} views, K = {args.out_dim}"
    say("toy" if args.toy else f"{sizes}; InfoNCE: {args.queries} queries, queue of 65536; {machine()}")
    for p in problems(args):
        if p.dtype == "fp32":
            say(gate(p))
        rows += measure(p, args.seconds, args.toy)
    say(table(rows))
    if args.save:
        print(save("esvit", say, {"rows": rows}))


if __name__ == "__main__":
    main()
