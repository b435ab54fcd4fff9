"""Building the packages from a copy of their sources, so that no build touches the working tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)


def copy_sources(target: Path, csrc: tuple[str, ...] = ()) -> Path:
    """``target`` with all that builds; of csrc/ the named sources, or one that compiles in no time.

    That the real ones compile is shown by every test that runs them.
    """
    for name in ("fastdino", "kernels", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.tmp")
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for source in (target / "csrc").glob("*.cpp"):
        if source.name not in csrc:
            source.unlink()
    if not csrc:
        (target / "csrc" / "abi.cpp").write_text('extern "C" int fdk_abi(void) { return 1; }\n')
    return target


def setup_py(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py from a clean start."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def wheel(tree: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """The wheel in ``out`` and what building it said on stderr."""
    result = setup_py(tree, "bdist_wheel", "--dist-dir", str(out), **environment)
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.whl")
    return path, result.stderr


def requirements(tmp_path: Path) -> dict[str, list[str]]:
    """What setup.py asks for: "" for always, else by extra. As written there, without the extra's marker."""
    line = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    found: dict[str, list[str]] = {"": []}
    section, marker = "", ""
    for text in (tmp_path / "fastdino.egg-info" / "requires.txt").read_text().splitlines():
        if text.startswith("["):
            section, _, marker = text.strip("[]").partition(":")
            found.setdefault(section, [])
        elif text:
            found[section].append(f"{text}; {marker}" if marker else text)
    return found
