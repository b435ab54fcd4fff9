"""The C functions under the sanitizers of the compiler and under valgrind, driven by c_driver.py.

AddressSanitizer with UndefinedBehaviorSanitizer runs in every test run, on the library without its variants
for newer processors (a third of the code, the same accesses); ThreadSanitizer, valgrind and the variants run
nightly. Libraries are built below build/sanitize and kept until csrc/ changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastdino_kernels import csrc

from reliability.c_functions import FUNCTIONS
from reliability.promises import NIGHTLY, cases_of, promise
from reliability.test_c_abi import run_driver

ROOT = Path(__file__).parents[2]
COMMON = ["-g1", "-std=c++17", "-fPIC", "-pthread", "-fno-math-errno", "-Wno-psabi"]
KINDS = {
    "address,undefined": ["-O0", "-DFDK_CLONES=", "-fsanitize=float-cast-overflow"],
    "address": ["-O1"],
    "thread": ["-O1"],
}
OPTIONS = {  # Python itself keeps memory until it ends
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
SUPPRESSED = "".join(  # the interpreter and what loads libraries are not on trial
    f"{{\n{kind}-{where}\nMemcheck:{kind}\nobj:*{where}*\n}}\n"
    for kind in ("Cond", "Value1", "Value4", "Value8", "Addr1", "Addr4", "Addr8")
    for where in ("python", "ld-linux", "_ctypes")
)


@functools.cache
def compiler() -> str:
    chosen = os.environ.get("CXX", "").strip()
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    pytest.skip("no C++ compiler")


def run_time(kind: str) -> str:
    """The sanitizer's own library, and that of C++ which it watches: both must be loaded before Python."""
    found = []
    for name in ("libtsan.so" if kind == "thread" else "libasan.so", "libstdc++.so"):
        command = [*shlex.split(compiler()), f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not os.path.isabs(found[-1]):
            pytest.skip(f"{compiler()} has no shared {name} (gcc with libasan and libtsan has)")
    return " ".join(found)


def built(kind: str) -> Path:
    """The library with the sanitizer ``kind``."""
    sources = sorted((ROOT / "csrc").iterdir())
    flags = [*KINDS[kind], *COMMON, f"-fsanitize={kind}", "-fno-sanitize-recover=all"]
    digest = hashlib.sha256(" ".join([compiler(), *flags]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = ROOT / "build" / "sanitize" / f"{kind.replace(',', '-')}-{digest.hexdigest()[:12]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{kind.replace(',', '-')}-*.so"):
        old.unlink(missing_ok=True)
    objects = target.with_suffix(f".{os.getpid()}")
    objects.mkdir()

    def run(*arguments: object) -> None:
        command = [*shlex.split(compiler()), *flags, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]

    try:
        parts = [(source, objects / f"{source.stem}.o") for source in sources if source.suffix == ".cpp"]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda part: run("-c", part[0], "-o", part[1]), parts))
        run("-shared", *(part[1] for part in parts), "-o", objects / "library.so")
        os.replace(objects / "library.so", target)
    finally:
        shutil.rmtree(objects, ignore_errors=True)
    return target


@pytest.mark.parametrize(
    ("kind", "callers"),
    [("address,undefined", 1), *((kind, n) for kind, n in (("address", 1), ("thread", 3)) if NIGHTLY)],
)
def test_sanitizer_finds_nothing(kind: str, callers: int) -> None:
    env = {**os.environ, **OPTIONS, "LD_PRELOAD": run_time(kind), "PYTHONMALLOC": "malloc"}
    library = str(built(kind))
    trial = subprocess.run([sys.executable, "-S", "-c", ""], env=env, capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"Python does not start under -fsanitize={kind} here: {trial.stderr[-300:]}")
    count = cases_of(ci=15, nightly=100)
    with promise(33, f"C functions under -fsanitize={kind}") as cases:
        arguments = [library, "fuzz", "0", str(count), "--heap", "--callers", str(callers)]
        tried, _ = run_driver(cases, arguments, env=env)
        assert set(tried) == set(FUNCTIONS) or cases.failures
        if kind != "thread":
            run_driver(cases, [library, "invalid"], env=env)


@pytest.mark.skipif(not NIGHTLY, reason="nightly")
def test_valgrind_finds_nothing(tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    suppressions = tmp_path / "python.supp"
    suppressions.write_text(SUPPRESSED)
    before = ["valgrind", "-q", "--error-exitcode=9", f"--suppressions={suppressions}"]
    env = {**os.environ, "PYTHONMALLOC": "malloc"}
    with promise(33, "C functions under valgrind") as cases:
        tried, child = run_driver(cases, [str(csrc.PATH), "fuzz", "0", "20", "--heap"], before, env)
        assert set(tried) == set(FUNCTIONS) or cases.failures
        with cases.case("nothing reported"):
            assert not child.stderr, child.stderr[:3000]
