"""The C functions of csrc/ called directly: inside unreadable memory, and with arguments that cannot be."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fastdino_kernels import csrc

from reliability.c_arguments import Draw, shape_of
from reliability.c_functions import FUNCTIONS, arguments_of
from reliability.promises import Cases, cases_of, promise

ROOT = Path(__file__).parents[2]
DEFINITION = re.compile(r"^(?:extern \"C\" )?int(?:64_t)? (fdk_\w+)\(([^)]*)\)", re.M)


def definitions() -> dict[str, list[str]]:
    """Names of the arguments of every C function, but for the number of threads."""
    found = {}
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        for name, arguments in DEFINITION.findall(source.read_text()):
            names = [re.split(r"[\s*]+", argument.strip())[-1] for argument in arguments.split(",")]
            found[name] = [x for x in names if x not in ("num_threads", "int", "void")]
    return found


def shown(case: str, valid: bool) -> dict[str, float]:
    """The numbers among the arguments of a valid case."""
    name, _, seed = case.partition(" ")
    return shape_of(arguments_of(name, int(seed))) if valid and case else {}


def run_driver(
    cases: Cases, arguments: list[str], before: list[str] | None = None, env: dict[str, str] | None = None
) -> tuple[Counter[str], subprocess.CompletedProcess[str]]:
    """Counts each case that the child tells of; a child that dies fails the case it had begun."""
    command = [*(before or []), sys.executable, "-S", "-m", "reliability.c_driver", *arguments]
    child = subprocess.run(
        command, cwd=ROOT / "tests", capture_output=True, text=True, errors="replace", timeout=3000, env=env
    )
    valid = arguments[1] == "fuzz"
    tried: Counter[str] = Counter()
    begun = ""
    for line in child.stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word == "begin":
            begun = rest
            continue
        if word not in ("pass", "fail"):
            continue
        tried[begun.split()[0]] += 1
        with cases.case(begun):
            assert word == "pass", f"{rest} {shown(begun, valid)}"
        begun = ""
    if begun or child.returncode:
        with cases.case(begun or "end of the process"):
            reason = f"child ended with {child.returncode} {shown(begun, valid)}"
            raise AssertionError(f"{reason} {child.stderr[-1500:]}")
    return tried, child


@pytest.fixture
def path() -> str:
    if not csrc.PATH.exists() or csrc.library() is None:
        pytest.skip("the C++ kernels are not built (make build)")
    return str(csrc.PATH)


def test_every_c_function_is_known_with_its_arguments() -> None:
    found = definitions()
    assert found.pop("fdk_abi") == []
    assert set(found) == set(FUNCTIONS)
    for name, make in FUNCTIONS.items():
        assert list(make(Draw(0))) == found[name], name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_stay_inside_their_buffers(name: str, path: str) -> None:
    """Also: the same bytes for any address, any number of threads and whatever was in the results before."""
    count = cases_of(ci=300, nightly=10_000)
    with promise(33, f"{name}: seeded arguments between unreadable pages") as cases:
        tried, _ = run_driver(cases, [path, "fuzz", "0", str(count), "--only", name])
        assert tried[name] == count or cases.failures


@pytest.mark.parametrize("name", FUNCTIONS)
def test_impossible_arguments_are_refused(name: str, path: str) -> None:
    """Null addresses, negative and overflowing sizes, unknown choices, contents that point elsewhere."""
    with promise(33, f"{name}: invalid calls") as cases:
        run_driver(cases, [path, "invalid", "--only", name])
