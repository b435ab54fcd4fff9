"""Runs a piece of the product on hostile inputs in a child process and tells what it did there.

    outcomes = audit([("read_pth", path), ...], warm=[("read_pth", good)])

A case is a piece and its input: ``pieces.py`` has the pieces, functions of one text, usually a path. One
child takes all cases, one after the other, after the ``warm`` ones, at which what is imported on first use is
imported. Of each case it tells every audit event (``sys.addaudithook``) that reading needs not have: starting
programs, sockets, imports, ``exec``, changes of the file system. A case that ends the child ends the audit
with an error that names it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HARMLESS = (
    "os.listdir",
    "os.scandir",
    "os.stat",
    "glob.glob",
    "pickle.find_class",
    "sys._getframe",
    "object.__getattr__",
    "object.__setattr__",
    "object.__delattr__",
    "builtins.id",
    "array.__new__",
    "mmap.__new__",
    "time.sleep",
)
"""Audit events of reading and of plain Python."""
LONGEST = 120.0
"""Seconds after which a case counts as hanging, on a machine that does other things as well."""
MEMORY = 3 << 30
"""Bytes of address space that all cases together may take, so that a bomb spares the machine."""


@dataclass(frozen=True)
class Outcome:
    case: str
    error: str
    """Type and message of what was raised; empty if the piece returned."""
    result: Any
    """What the piece returned, through JSON."""
    events: list[str]
    """Audit events besides the harmless ones and the allowed writes."""
    seconds: float
    cpu: float
    """Seconds of processor time, which other processes do not lengthen."""
    peak: int
    """Bytes of memory beyond what the child had before the case."""


Case = tuple[str, str]


def audit(
    cases: Sequence[Case],
    *,
    warm: Iterable[Case] = (),
    writable: str = "",
    timeout: float = 600.0,
    **environment: str,
) -> list[Outcome]:
    """Outcomes of ``pieces.<piece>(input)`` in order; files below ``writable`` may be written."""
    request = {"cases": list(cases), "warm": list(warm), "writable": writable}
    child = subprocess.run(
        [sys.executable, "-m", "reliability.audit"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **environment},
    )
    outcomes = [Outcome(**json.loads(line)) for line in child.stdout.splitlines()]
    if len(outcomes) < len(cases):
        begun = cases[len(outcomes)]
        raise AssertionError(f"{begun} ended the process with {child.returncode}:\n{child.stderr[-3000:]}")
    return outcomes


def quickest(same: Sequence[Outcome]) -> Outcome:
    """Of a case that was asked several times: what others do on the machine only adds to its time."""
    told = {(outcome.case, outcome.error, json.dumps(outcome.result)) for outcome in same}
    assert len(told) == 1, f"the same case had several outcomes: {told}"
    events = [event for outcome in same for event in outcome.events]
    return replace(min(same, key=lambda outcome: outcome.cpu), events=events)


def refused(outcome: Outcome, *names: str, seconds: float = 1.0, memory: int = 64 << 20) -> None:
    """AssertionError unless the case ended in an error that holds ``names``, in time, at little cost."""
    quiet(outcome, seconds=seconds, memory=memory)
    assert outcome.error, f"taken: {outcome.result}"
    for name in names:
        assert name in outcome.error, f"expected {name!r} in {outcome.error!r}"


def quiet(outcome: Outcome, *, seconds: float = 1.0, memory: int = 64 << 20) -> None:
    """AssertionError if the case did anything but read, or took too long or too much memory."""
    assert not outcome.events, f"events {outcome.events}"
    assert outcome.cpu <= seconds, f"took {outcome.cpu:.2f} s"
    assert outcome.peak <= memory, f"took {outcome.peak / 2**20:.0f} MiB"


# ------------------------------------------------------------------------------------------------- the child


class _Listener:
    """Audit events while it is active; hooks cannot be removed, so there is one for all cases."""

    def __init__(self, writable: str) -> None:
        self.events: list[str] = []
        self.active = False
        self._writable = writable
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active or event in HARMLESS:
            return
        if (
            event == "compile" and args[1] == "<unknown>"
        ):  # ast.literal_eval of a header of NumPy: runs nothing
            return
        if event == "open" and (not _writes(*args) or self._allowed(args[0])):
            return
        if event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree") and self._allowed(args[0]):
            return
        if len(self.events) < 20:
            self.events.append(f"{event} {str(args)[:200]}")

    def _allowed(self, path: Any) -> bool:
        return bool(self._writable) and os.fsdecode(path).startswith(self._writable)


def _writes(path: Any, mode: Any, flags: Any) -> bool:
    return bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _run(piece: str, case: str, listener: _Listener) -> Outcome:
    function = getattr(importlib.import_module("reliability.pieces"), piece)
    error, result = "", None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    begun, work = time.perf_counter(), time.process_time()
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    listener.events, listener.active = [], True
    try:
        result = function(case)
    except BaseException as caught:  # whatever it is, it is told
        error = f"{type(caught).__name__}: {caught}"
    finally:
        listener.active = False
    faulthandler.cancel_dump_traceback_later()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - work
    return Outcome(case, error, result, listener.events, seconds, cpu, _peak() - before)


def main() -> None:
    request = json.loads(sys.stdin.read())
    listener = _Listener(request["writable"])
    for piece, case in request["warm"]:
        _run(piece, case, listener)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for piece, case in request["cases"]:
        print(json.dumps(asdict(_run(piece, case, listener))), flush=True)


if __name__ == "__main__":
    main()
