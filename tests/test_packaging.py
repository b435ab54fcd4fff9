"""Packaging: wheels with and without a compiler, the source archive, rebuilding, the Makefile's choices."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastdino

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what builds, so that no build touches the working tree."""
    target = tmp_path_factory.mktemp("tree")
    for name in ("fastdino", "kernels", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    # One small source compiles in a second; that the real ones compile is shown by every test that runs them.
    for source in (target / "csrc").iterdir():
        source.unlink()
    (target / "csrc" / "abi.cpp").write_text('extern "C" int fdk_abi(void) { return 1; }\n')
    return target


def setup_py(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py as a build backend does: with neither torch nor the packages importable."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def wheel(tree: Path, out: Path, **environment: str) -> tuple[Path, str]:
    result = setup_py(tree, "bdist_wheel", "--dist-dir", str(out), **environment)
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.whl")
    return path, result.stderr


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)


@needs_compiler
def test_wheel_serves_every_python_of_the_platform(tree: Path, tmp_path: Path) -> None:
    path, _ = wheel(tree, tmp_path)
    assert re.fullmatch(rf"fastdino-{re.escape(fastdino.__version__)}-py3-none-(?!any)\w+\.whl", path.name)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "fastdino_kernels/libfastdino_cpu.so" in names
    sources = {str(p.relative_to(tree)) for p in (tree / "fastdino").rglob("*") if p.is_file()}
    package = tree / "kernels" / "fastdino_kernels"
    sources |= {str(p.relative_to(tree / "kernels")) for p in package.rglob("*") if p.is_file()}
    assert sources <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "kernels/"))]
    assert "License-Expression: Apache-2.0" in metadata
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    hard = [line for line in needed if "extra ==" not in line]
    assert "Requires-Dist: torch>=2.10" in hard
    assert not [line for line in hard if "triton" in line or "dali" in line or "torchvision" in line]


def test_wheel_without_a_compiler_says_so_and_installs(tree: Path, tmp_path: Path) -> None:
    path, messages = wheel(tree, tmp_path, CXX="/nonexistent/c++")
    assert path.name.endswith("-py3-none-any.whl")
    lines = [line for line in messages.splitlines() if line.startswith("fastdino_kernels:")]
    assert len(lines) == 1 and "no C++ compiler found (/nonexistent/c++; set CXX)" in lines[0]
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_library_can_be_left_out_or_insisted_on(tree: Path, tmp_path: Path) -> None:
    path, messages = wheel(tree, tmp_path, FASTDINO_BUILD="0")
    assert path.name.endswith("-py3-none-any.whl") and "fastdino_kernels:" not in messages
    refused = setup_py(tree, "build_csrc", FASTDINO_BUILD="1", CXX="/nonexistent/c++")
    assert refused.returncode != 0 and "FASTDINO_BUILD=1 asks for it" in refused.stderr


@needs_compiler
def test_a_failed_compilation_keeps_the_old_library(tree: Path) -> None:
    library = tree / "kernels" / "fastdino_kernels" / "libfastdino_cpu.so"
    assert setup_py(tree, "build_csrc").returncode == 0
    before = library.read_bytes()
    broken = tree / "csrc" / "broken.cpp"
    broken.write_text("not C++\n")
    try:
        failed = setup_py(tree, "build_csrc")
    finally:
        broken.unlink()
    assert failed.returncode == 1 and "failed with exit code" in failed.stderr
    assert library.read_bytes() == before
    assert [path.name for path in library.parent.glob("libfastdino_cpu*")] == [library.name]
    library.unlink()


def test_source_archive_carries_csrc(tree: Path, tmp_path: Path) -> None:
    result = setup_py(tree, "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"csrc/abi.cpp", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert "kernels/fastdino_kernels/__init__.py" in names


def test_both_packages_are_importable_from_anywhere(tmp_path: Path) -> None:
    code = "import fastdino, fastdino_kernels; print(fastdino.__version__)"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    assert output.strip() == fastdino.__version__


def test_changelog_and_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastdino.__version__)
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{fastdino.__version__}]" in text


def test_ci_runs_exactly_make_test() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "make" in line]
    assert commands == ["exec make test </dev/null"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("gpu", "torch", "index", "dali"),
    [
        (["GPU=", "CUDA="], "torch==2.13.0", True, "dali-cu13"),
        (["GPU=9.0", "CUDA=13"], "torch==2.13.0", False, "dali-cu13"),
        (["GPU=8.0", "CUDA=12"], "torch==2.10.0", False, "dali-cu12"),
        (["GPU=7.0", "CUDA=13"], "torch==2.10.0", False, "dali-cu12"),
        (["GPU=", "TORCH=torch==2.12.0", "TORCH_INDEX_URL="], "torch==2.12.0", False, "dali-cu13"),
    ],
)
def test_make_chooses_torch_by_driver(
    gpu: list[str], torch: str, index: bool, dali: str, tmp_path: Path
) -> None:
    for target, command in (("train", "-m fastdino.demo"), ("test", "-m pytest -q")):
        line = ["make", "--dry-run", f"VENV={tmp_path}/venv", *gpu, target]
        text = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f'"{torch}"' in text and f"[{dali}" in text and command in text
        assert ("--extra-index-url" in text) is index
