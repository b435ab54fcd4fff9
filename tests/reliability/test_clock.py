"""The clock on the wall and the times of files decide nothing: a mad clock changes no weight."""

from __future__ import annotations

import ast
import itertools
import os
import random
import time
from functools import partial
from pathlib import Path

from fastdino.engine import checkpoint
from reliability import toy
from reliability.promises import NIGHTLY, promise

ROOT = Path(__file__).resolve().parents[2]
YEARS = 365.25 * 86_400
# Seconds by which the clock is off, and whether it goes backwards.
CLOCKS = ((0.0, True), (-10 * YEARS, False), (10 * YEARS, False), (-10 * YEARS, True))

# File and function that may read the wall clock: for people, in logs.
LOGGING = {
    ("evaluation/command.py", "finish"),
    ("engine/trainer.py", "_log"),
    ("engine/trainer.py", "_log_scores"),
}
WALL = {"time", "time_ns", "ctime", "localtime", "gmtime", "now", "utcnow", "today"}


def mad(rank: int, shift: float, backwards: bool) -> None:
    """Another clock, years off or going backwards with each look."""
    real, looks = time.time, itertools.count()

    def now() -> float:
        return real() + shift - (3600.0 * next(looks) if backwards else 0.0)

    time.time = now
    time.time_ns = lambda: int(now() * 1e9)


def test_a_mad_clock_changes_no_weight(images, tmp_path):
    flags = ("--save_every", "5")
    toy.train(images, tmp_path / "whole", *flags)
    expected = toy.state_hash(tmp_path / "whole")
    with promise(25, "wall clock years off or going backwards, file times scrambled") as cases:
        for shift, backwards in CLOCKS if NIGHTLY else CLOCKS[-2:]:
            with cases.case(f"{shift / YEARS:+g} years, backwards {backwards}"):
                out, hook = (
                    tmp_path / f"run{shift}{backwards}",
                    partial(mad, shift=shift, backwards=backwards),
                )
                toy.train(images, out, *flags, "--max_steps", "11", hook=hook)
                toy.train(images, out, *flags, hook=partial(mad, shift=-shift, backwards=backwards))
                assert toy.state_hash(out) == expected
        with cases.case("scrambled file times"):
            out, draw = tmp_path / "scrambled", random.Random(0)
            toy.train(images, out, *flags, "--max_steps", "15")
            for path in out.rglob("*"):
                moment = draw.uniform(0, 4e9)
                os.utime(path, (moment, moment))
            assert checkpoint.step_of(checkpoint.latest(out / "checkpoints")) == 15
            toy.train(images, out, *flags)
            assert toy.state_hash(out) == expected


def wall_clock_reads(source: str) -> set[str]:
    """Innermost functions that read the wall clock or a file's times."""
    found = set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            names = {alias.name for alias in node.names}
            found.update({function} if names & (WALL | {"datetime", "date"}) else ())
        if isinstance(node, ast.Attribute):
            module = getattr(node.value, "id", getattr(node.value, "attr", ""))
            if module in ("time", "datetime", "date") and node.attr in WALL:
                found.add(function)
            if node.attr in ("st_ctime", "getmtime", "getctime"):
                found.add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def test_only_logs_read_the_wall_clock():
    assert wall_clock_reads("def f():\n    return time.time()\nimport time") == {"f"}
    assert wall_clock_reads("from datetime import datetime\ndef f(): datetime.datetime.now()") == {"", "f"}
    with promise(25, "source files: the wall clock is read for logs alone") as cases:
        for path in sorted((ROOT / "fastdino").rglob("*.py")):
            name = str(path.relative_to(ROOT / "fastdino"))
            with cases.case(name):
                reads = {(name, function) for function in wall_clock_reads(path.read_text())}
                assert reads <= LOGGING, sorted(reads - LOGGING)
