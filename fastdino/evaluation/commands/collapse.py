"""``python -m fastdino.evaluation collapse``: entropy and KL of runs, and the study of figure 7."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Draw the teacher's entropy and the KL divergence of runs, or run the collapse study (figure 7)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--runs", metavar="DIR", nargs="+", type=Path, help="run directories, of running runs too"
    )
    what.add_argument(
        "--study",
        action="store_true",
        help="train four toy runs, with and without centering and sharpening: minutes on a CPU",
    )
    parser.add_argument(
        "--steps", type=command.positive, default=400, help="of each run of the study (default: 400)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the study (default: 0)")
    command.device_argument(parser)
    command.output_argument(parser, ".")


def run(flags: argparse.Namespace) -> Result:
    from fastdino.evaluation import sheets
    from fastdino.evaluation.collapse import STUDY, draw, line, read_curve, study

    output = Path(flags.output_dir)
    if flags.study:
        title = f"Collapse study: what centering and sharpening prevent, {flags.steps} steps each"
        curves = study(output / "study", steps=flags.steps, seed=flags.seed, device=flags.device)
        lines, keys = [], list(STUDY)
    else:
        title = "Does training collapse? Teacher entropy and KL divergence"
        names = [path.resolve().name for path in flags.runs]
        if len(set(names)) < len(names):
            names = [str(path) for path in flags.runs]
        curves = [read_curve(path, name) for path, name in zip(flags.runs, names, strict=True)]
        if len({curve.unit for curve in curves}) > 1:
            raise ValueError(
                "--runs: expected runs that all have metrics.jsonl, or none; log.txt counts epochs"
            )
        lines, keys = [line(curve) for curve in curves], names
    path = sheets.save(draw(curves, title), output / "collapse.png")
    figures = {}
    for key, curve in zip(keys, curves, strict=True):
        suffix = f"_{key}" if len(curves) > 1 else ""
        figures["entropy" + suffix], figures["kl" + suffix] = curve.last()
    return Result(
        figures=figures,
        lines=[*lines, str(path)],
        settings={"steps": flags.steps, "seed": flags.seed} if flags.study else {},
        pictures={"collapse.png": "Teacher entropy and KL divergence, in nats"},
        details={"verdict": {curve.name: curve.verdict() for curve in curves}},
    )
