"""Goal 32: all that gets installed is locked by hash, builds repeat to the byte, nothing needs a network."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, requires
from importlib.metadata import version as installed
from pathlib import Path

import pytest
import torch
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from reliability.promises import NIGHTLY, promise
from runs import command, environment
from source_tree import ROOT, copy_sources, needs_compiler, requirements

LOCKS = ROOT / ".ci" / "locks"
PROFILES = {"cpu": ("dali-cu13", "dev"), "cuda13": ("cuda13", "dev"), "v100": ("v100", "dev")}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

Lock = dict[str, list[tuple[str, Marker | None]]]  # name -> versions, each with where it applies


def read_lock(name: str) -> Lock:
    """The packages of a lock; AssertionError for anything but ``name==version [; marker]`` with hashes."""
    found: Lock = defaultdict(list)
    for entry in re.split(r"\n(?=\S)", (LOCKS / f"{name}.txt").read_text("utf-8").strip()):
        line, *hashes = (part.strip() for part in entry.split("\\\n"))
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "*" not in pin.version and requirement.url is None, line
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", text) for text in hashes), line
        found[canonicalize_name(requirement.name)].append((pin.version, requirement.marker))
    return found


def places(python: str) -> dict[str, str]:
    """The environment of markers on a Linux machine."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def locked(lock: Lock, requirement: Requirement, python: str) -> None:
    """AssertionError unless the lock has exactly one version for the requirement, and it satisfies it."""
    place = places(python)
    if requirement.marker and not requirement.marker.evaluate(place):
        return
    entries = lock[canonicalize_name(requirement.name)]
    versions = [version for version, marker in entries if marker is None or marker.evaluate(place)]
    assert len(versions) == 1, f"{requirement}: {versions or 'not locked: make lock'}"
    assert requirement.specifier.contains(versions[0], prereleases=True), (
        f"{requirement}: {versions[0]} is locked"
    )


def test_every_package_is_locked_by_hash(tmp_path: Path) -> None:
    asked = requirements(tmp_path)
    with promise(32, "packages locked with hashes, one version for each Python") as cases:
        for profile, extras in PROFILES.items():
            lock = read_lock(profile)
            if profile == "cpu":
                lock |= read_lock("torch-cpu")
            lines = {line for extra in ("", *extras) for line in asked[extra]}
            for python in PYTHONS:
                for name, entries in lock.items():
                    with cases.case(f"{profile}, Python {python}: {name}"):
                        valid = [v for v, marker in entries if not marker or marker.evaluate(places(python))]
                        assert len(set(valid)) <= 1, valid
                for line in sorted(lines):
                    with cases.case(f"{profile}, Python {python}: {line}"):
                        locked(lock, Requirement(line), python)


def test_what_locked_packages_require_is_locked() -> None:
    """As far as the locked versions are the installed ones, which is where requirements can be read."""
    lock = read_lock("cpu") | read_lock("torch-cpu")
    python = ".".join(map(str, sys.version_info[:2]))
    with promise(32, "requirements of locked packages are locked") as cases:
        for name, entries in lock.items():
            try:
                if installed(name) not in {version for version, _ in entries}:
                    continue
            except PackageNotFoundError:
                continue
            for line in requires(name) or []:
                with cases.case(f"{name} requires {line}"):
                    locked(lock, Requirement(line), python)


def test_requirements_of_the_cpu_build_of_torch() -> None:
    lines = (LOCKS / "torch-cpu.in").read_text("utf-8").splitlines()
    listed = {str(Requirement(line)) for line in lines if not line.startswith("#")}
    ((version, _),) = read_lock("torch-cpu")["torch"]
    if installed("torch") != version:
        pytest.skip(f"torch {torch.__version__} is installed, not {version}")
    assert listed == {line for line in requires("torch") or [] if "extra ==" not in line}


def test_locks_name_no_machine() -> None:
    for path in LOCKS.iterdir():
        text = path.read_text("utf-8")
        assert not re.search(r"://|file:|@ |^-|/(opt|root|home|tmp|Users)/", text, re.M), path


# ----------------------------------------------------------------------------------------------------- builds


@functools.cache
def without_network() -> tuple[str, ...]:
    """Words before a command that take its network away; the test is skipped where the system refuses."""
    for words in (("unshare", "-n"), ("unshare", "-rn")):
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    pytest.skip("this system lets no process leave its network (unshare -n)")


@needs_compiler
def test_a_wheel_repeats_to_the_byte(tmp_path: Path) -> None:
    """In another folder, from files of other dates in another order, with another time zone and locale."""
    every = tuple(path.name for path in (ROOT / "csrc").glob("*.cpp"))
    sources = every if NIGHTLY else ("abi.cpp", "parallel.cpp", "memory.cpp", "top_k.cpp")
    wheels = []
    for i, folder in enumerate(("a", "other/place")):
        tree = copy_sources(tmp_path / folder, csrc=sources)
        for path in tree.rglob("*"):
            os.utime(path, (1e9 + 1e7 * i, 1e9 + 1e7 * i))
        line = [
            sys.executable,
            "setup.py",
            "--quiet",
            "bdist_wheel",
            "--dist-dir",
            str(tmp_path / f"dist{i}"),
        ]
        here = {"SOURCE_DATE_EPOCH": "1700000000", "TZ": ("UTC", "Asia/Tokyo")[i], "PYTHONHASHSEED": str(i)}
        subprocess.run(line, cwd=tree, env={**os.environ, **here}, check=True, capture_output=True)
        wheels += (tmp_path / f"dist{i}").glob("*.whl")
    with promise(32, "a wheel built twice, compared byte by byte") as cases:
        with cases.case("two folders, dates, time zones"):
            first, second = wheels
            assert first.name == second.name and "-any" not in first.name
            assert first.read_bytes() == second.read_bytes()


def test_a_build_without_a_network(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    line = [*without_network(), sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    line += ["--no-build-isolation", "--disable-pip-version-check", "-w", str(tmp_path), str(tree)]
    with promise(32, "builds and runs in a process without a network") as cases, cases.case("pip wheel"):
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(list(tmp_path.glob("*.whl"))) == 1


# ------------------------------------------------------------------------------------------------------- runs


def test_a_training_without_a_network(images: Path, tmp_path: Path) -> None:
    words = [*without_network(), *command(images, tmp_path / "run", "--epochs", "1")]
    with promise(32, "builds and runs in a process without a network") as cases, cases.case("training"):
        shown = subprocess.run([*without_network(), "cat", "/proc/net/dev"], capture_output=True, text=True)
        assert re.findall(r"^ *(\w+):", shown.stdout, re.M) in ([], ["lo"])
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=300, env=environment(), cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "log.txt").exists()


@pytest.mark.skipif(not NIGHTLY, reason="many tests once more: FASTDINO_NIGHTLY=1")
def test_the_tests_without_a_network(tmp_path: Path) -> None:
    """Those that need no second process; the others talk over the loopback that is down here."""
    folders = ["tests/data", "tests/models", "tests/report", "tests/test_config.py", "tests/test_cli.py"]
    line = [
        *without_network(),
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "not processes and not torchrun",
        *folders,
    ]
    with promise(32, "builds and runs in a process without a network") as cases, cases.case("tests"):
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stdout[-3000:]


HELP = """
import contextlib, importlib, io, pkgutil, runpy, sys

def hear(event, args):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise SystemExit(f"{event} {args}")

sys.addaudithook(hear)
what, *words = sys.argv[1:]
if what == "imports":
    package = importlib.import_module(words[0])
    for module in pkgutil.walk_packages(package.__path__, f"{words[0]}."):
        if not module.name.endswith(("__main__", "libfastdino_cpu")) and ".gpu." not in module.name:
            importlib.import_module(module.name)
else:
    for protocol in words:
        sys.argv = [what, *protocol.split(), "--help"]
        run = runpy.run_path if what.endswith(".py") else runpy.run_module
        try:
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                run(what, run_name="__main__")
        except SystemExit as end:
            assert end.code in (0, None), end
        assert "--" in shown.getvalue(), protocol
print("quiet")
"""


def test_imports_and_help_open_no_socket() -> None:
    from fastdino.evaluation.__main__ import PROTOCOLS

    tried = {
        "import of fastdino": ("imports", "fastdino"),
        "import of fastdino_kernels": ("imports", "fastdino_kernels"),
        "help of the evaluation": ("fastdino.evaluation", "", *PROTOCOLS),
        "help of the training": (str(ROOT / "train.py"), ""),
    }
    with promise(32, "imports and help texts that open no socket") as cases:
        for name, words in tried.items():
            with cases.case(name):
                line = [sys.executable, "-W", "ignore", "-c", HELP, *words]
                done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment())
                assert done.stdout.endswith("quiet\n"), done.stdout[-500:] + done.stderr[-1500:]
