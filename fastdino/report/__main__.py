"""``python -m fastdino.report RUN [RUN ...]``: the page of a run anew, or several runs on one page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; prints the path of the page."""
    parser = argparse.ArgumentParser(prog="python -m fastdino.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, at most five")
    parser.add_argument("--output", metavar="FILE", help="page of several runs (default: runs.html)")
    parser.add_argument("--device", default="cpu", help="where a single run's network draws its pictures")
    flags = parser.parse_args(argv)
    try:
        if len(flags.runs) > 1:
            from fastdino.report.runs import write_runs

            print(write_runs(flags.runs, flags.output or "runs.html"))
            return 0
        if flags.output:
            raise ValueError("--output: a single run's page is its report.html")
        print(_one(Path(flags.runs[0]), flags.device))
    except (OSError, ValueError) as error:
        print(f"python -m fastdino.report: error: {error}", file=sys.stderr)
        return 2
    return 0


def _one(root: Path, device: str) -> Path:
    """With pictures, if there are a checkpoint and the images of the run."""
    from fastdino.report.page import write_report

    if not root.is_dir():
        raise NotADirectoryError(f"no such run directory: {root}")
    if not any((root / "checkpoints").glob("step-*")):
        return write_report(root)
    from fastdino.interop.weights import load_backbone
    from fastdino.report.neighbours import images_of
    from fastdino.report.run import Run

    backbone = load_backbone(root).to(device)
    queries, bank = images_of(Run.read(root).config)
    return write_report(root, backbone=backbone, image_paths=queries, bank_paths=bank)


if __name__ == "__main__":
    sys.exit(main())
