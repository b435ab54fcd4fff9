"""What the tests of this folder tried and what held, counted for the table of README.md.

    with promise(4, "one bit of a checkpoint flipped") as cases:
        for bit in range(cases_of(ci=500, nightly=10_000)):
            with cases.case(f"bit {bit}"):
                ...assertions...

A case that fails does not end the others; leaving ``promise`` raises one AssertionError that names them.
Where FASTDINO_PROMISES names a file, every promise appends its counts to it as a JSON line, and ``table.py``
makes the table of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

IN_MEMORY = "fastdino-test-"  # begins the names of the directories that the fixture ``memory`` makes
NIGHTLY = os.environ.get("FASTDINO_NIGHTLY") == "1"


def cases_of(ci: int, nightly: int) -> int:
    """How many cases this run tries: few in every test run, many in ``make test-nightly``."""
    return nightly if NIGHTLY else ci


class Cases:
    def __init__(self) -> None:
        self.tried = 0
        self.failures: list[str] = []

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One case; an exception counts it as failed."""
        self.tried += 1
        try:
            yield
        except Exception as error:  # told, with all others, when the promise ends
            self.failures.append(f"{name}: {type(error).__name__}: {error}")


@contextmanager
def promise(goal: int, what: str) -> Iterator[Cases]:
    """Counts the cases of ``goal``, a row of README.md; AssertionError if any failed or none ran."""
    cases = Cases()
    yield cases
    passed = cases.tried - len(cases.failures)
    if file := os.environ.get("FASTDINO_PROMISES"):
        record = {"goal": goal, "what": what, "tried": cases.tried, "passed": passed}
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
    assert cases.tried, f"{what}: no case was tried"
    shown = "\n".join(cases.failures[:20])
    assert not cases.failures, f"{what}: {len(cases.failures)} of {cases.tried} cases failed:\n{shown}"
