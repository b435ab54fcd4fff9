"""``python -m fastdino.evaluation report``: every protocol that the data allow, on one page."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Run all protocols that the data allow on one or several networks and write one HTML page."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastdino.evaluation.plan import LAYOUTS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"known layouts of --data_path:\n{LAYOUTS}"
    command.backbone_arguments(parser, several=True)
    parser.add_argument(
        "--data_path", metavar="DIR", nargs="+", required=True, help="folders of the layouts below"
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the networks, in the same order")
    parser.add_argument(
        "--protocols", nargs="+", metavar="PROTOCOL", help="these only (default: all but finetune)"
    )
    parser.add_argument(
        "--image_size", type=command.positive, help="side in pixels (default: each protocol's)"
    )
    parser.add_argument("--again", action="store_true", help="also what the output folder already holds")
    command.output_argument(parser, "evaluation")


def run(flags: argparse.Namespace) -> Result:
    """Results that are there already, of the same command and weights, are kept: an interrupted report goes
    on.
    """
    from fastdino.evaluation.plan import BY_REQUEST, curves, plan
    from fastdino.report.comparison import read_results, write_comparison

    if not flags.weights:
        raise ValueError("--weights is required (one or several)")
    names = flags.names or _names(flags.weights)
    if len(names) != len(flags.weights) or len(set(names)) != len(names):
        raise ValueError(f"--names: expected {len(flags.weights)} different names, got {' '.join(names)}")
    if any("/" in name or name.startswith(".") for name in names):
        raise ValueError(f"--names: expected names of folders, got {' '.join(names)}")
    tasks = plan([Path(path) for path in flags.data_path], flags.image_size)
    if flags.protocols:
        missing = set(flags.protocols) - {task.protocol for task in tasks} - {"collapse"}
        if missing:
            raise ValueError(f"--protocols: the data do not allow {', '.join(sorted(missing))}")
        tasks = [task for task in tasks if task.protocol in flags.protocols]
    else:
        tasks = [task for task in tasks if task.protocol not in BY_REQUEST]
    plans = [
        tasks + [task for task in curves(weights) if task.protocol in (flags.protocols or ["collapse"])]
        for weights in flags.weights
    ]
    if not any(plans):
        raise ValueError("--protocols: collapse needs run directories with metrics.jsonl as --weights")
    output = Path(flags.output_dir)
    networks = []
    for name, weights, mine in zip(names, flags.weights, plans, strict=True):
        failures = {}
        for task in mine:
            network = [] if task.protocol == "collapse" else _network(flags, weights)
            words = [task.protocol, *network, *task.words, "--output_dir", str(output / name)]
            if not flags.again and _done(output / name / f"{task.key}.json", words, weights):
                continue
            if command.first():
                if flags.again and task.protocol in ("linear", "finetune"):  # which go on from what is there
                    shutil.rmtree(output / name / task.protocol, ignore_errors=True)
                print(f"-- {name}: {shlex.join(words)}", file=sys.stderr)
            reason = _run(words)
            if reason:
                failures[task.key] = reason
        found = read_results(name, output / name)
        wanted = {task.key for task in mine} - failures.keys()
        found.results = {key: record for key, record in found.results.items() if key in wanted}
        found.failures |= failures
        networks.append(found)
    if not command.first():
        return Result({}, [])
    page = write_comparison(networks, output / "report.html")
    measured = sum(len(network.results) for network in networks)
    failed = sum(len(network.failures) for network in networks)
    ending = f", {failed} failed (the page says why)" if failed else ""
    return Result(figures={}, lines=[f"{measured} results of {len(networks)} networks{ending}: {page}"])


def _names(weights: list[str]) -> list[str]:
    """Short names of the networks: the last part of the path, numbered where that is not unique."""
    names: list[str] = []
    for path in weights:
        name = Path(path).resolve().name if path != "random" else path
        name = name.removesuffix(".pth") or "network"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _network(flags: argparse.Namespace, weights: str) -> list[str]:
    """The flags of the network, as they were given."""
    words = ["--weights", weights]
    for name, default in (
        ("arch", None),
        ("patch_size", None),
        ("checkpoint_key", "auto"),
        ("device", "auto"),
    ):
        value = getattr(flags, name)
        if value != default:
            words += [f"--{name}", str(value)]
    return words


def _done(path: Path, words: list[str], weights: str) -> bool:
    """Whether there is a result of the same command, and none of the weights is newer."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        written = path.stat().st_mtime
    except (OSError, ValueError):
        return False
    source = Path(weights)
    parts = [part for name in ("checkpoints", "metrics.jsonl") if (part := source / name).exists()]
    newest = max((part.stat().st_mtime for part in parts or [source] if part.exists()), default=0.0)
    same = isinstance(record, dict) and record.get("command") == command.written_as(words)
    return same and newest <= written


def _run(words: list[str]) -> str:
    """Run one protocol; what went wrong, empty if nothing did."""
    from fastdino.evaluation import __main__

    flags = __main__.parser().parse_args(words)
    try:
        __main__.run(flags, words)
    except (OSError, ValueError, ImportError) as error:
        if command.first():
            print(f"{words[0]}: {error}", file=sys.stderr)
        return str(error)
    return ""
