"""Packaging: wheels with and without a compiler, the source archive, extras, the Makefile's choices."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastdino
from source_tree import ROOT, copy_sources, needs_compiler, requirements, setup_py, wheel

NIGHTLY = os.environ.get("FASTDINO_NIGHTLY") == "1"
STACKS = ("v100", "cuda13")  # the extras that choose a torch


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("build") / "tree")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return requirements(tmp_path_factory.mktemp("requirements"))


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
def test_a_compiler_that_fails_leaves_a_wheel_for_every_platform(tree: Path, tmp_path: Path) -> None:
    broken = tree / "csrc" / "broken.cpp"
    broken.write_text("not C++\n")
    try:
        path, messages = wheel(tree, tmp_path)
    finally:
        broken.unlink()
    assert path.name.endswith("-py3-none-any.whl") and "failed with exit code" in messages
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        marks = archive.read(next(name for name in archive.namelist() if name.endswith("/WHEEL"))).decode()
    assert "Root-Is-Purelib: true" in marks and "Tag: py3-none-any" in marks


@needs_compiler
def test_what_an_earlier_build_left_does_not_ship(tree: Path, tmp_path: Path) -> None:
    removed = tree / "fastdino" / "removed.py"
    removed.write_text("")
    line = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)]
    try:
        wheel(tree, tmp_path / "first")
    finally:
        removed.unlink()
    subprocess.run(line, cwd=tree, check=True, capture_output=True)  # over the first build
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        assert "fastdino/removed.py" not in archive.namelist()


ISOLATED = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("numpy") is None
from setuptools import build_meta
print(build_meta.build_wheel(sys.argv[2]))
"""


@needs_compiler
def test_the_build_backend_needs_setuptools_alone(tree: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    site = Path(setuptools.__file__).parents[1]
    for folder in (site / "setuptools", site / "_distutils_hack", *site.glob("setuptools-*.dist-info")):
        shutil.copytree(folder, alone / folder.name)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ISOLATED, str(alone), str(tmp_path)],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    name = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"fastdino-[\d.]+-py3-none-(?!any)\w+\.whl", name)
    # The symbols of its library decide how old a system may be.
    if importlib.util.find_spec("auditwheel") and sys.platform == "linux":
        line = [sys.executable, "-m", "auditwheel", "show", "--json", str(tmp_path / name)]
        shown = json.loads(subprocess.check_output(line, text=True))
        assert re.match(r"(manylinux|musllinux)_\d+_\d+_", shown["overall_tag"]), shown


@pytest.mark.skipif(not NIGHTLY, reason="compiles everything and asks the package index: FASTDINO_NIGHTLY=1")
@needs_compiler
def test_isolated_build_with_pip(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree", csrc=tuple(path.name for path in (ROOT / "csrc").glob("*.cpp")))
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(tree)]
    done = subprocess.run(line, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.whl")
    library = tmp_path / "libfastdino_cpu.so"
    with zipfile.ZipFile(path) as archive:
        library.write_bytes(archive.read("fastdino_kernels/libfastdino_cpu.so"))
    for python in interpreters():
        load = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).fdk_abi())"
        assert subprocess.check_output([python, "-c", load, str(library)], text=True).strip().isdigit()


def test_install_without_a_compiler_runs_the_reference(tree: Path, tmp_path: Path) -> None:
    """Installs with pip, prints the report of the backends, computes a loss."""
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    line += ["--no-index", "--disable-pip-version-check", "--target", str(tmp_path / "site"), str(tree)]
    environment = {**os.environ, "CXX": "/nonexistent/c++", "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=300)
    code = """
import sys, warnings
warnings.simplefilter("ignore")
import fastdino_kernels, torch
from fastdino_kernels.__main__ import main
assert fastdino_kernels.__file__.startswith(sys.argv[1]), fastdino_kernels.__file__
main()
x, t = torch.randn(8, 5), torch.randn(4, 5)
loss = fastdino_kernels.dino_loss(x, t, torch.zeros(5), student_temp=0.1, teacher_temp=0.04).loss
x, t = (x / 0.1).log_softmax(1).chunk(4), (t / 0.04).softmax(1).chunk(2)
pairs = [-(p * y).sum(1).mean() for g, p in enumerate(t) for v, y in enumerate(x) if g != v]
torch.testing.assert_close(loss, sum(pairs) / len(pairs))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "is not built" in done.stdout and re.search(r"^dino_loss +reference", done.stdout, re.M)


# ---------------------------------------------------------------------------------------- Python 3.10 to 3.13

SOURCES = [
    path
    for folder in ("fastdino", "kernels", "tests", "bench", "setup.py", "train.py")
    for path in sorted((ROOT / folder).rglob("*.py") if (ROOT / folder).is_dir() else [ROOT / folder])
]


def interpreters() -> list[str]:
    """Other Pythons of this machine, 3.10 and later, that start."""
    found = [shutil.which(f"python3.{minor}") for minor in range(10, 16) if minor != sys.version_info[1]]
    there = [path for path in found if path]
    return [path for path in there if not subprocess.run([path, "-c", ""], capture_output=True).returncode]


def test_sources_are_python_3_10() -> None:
    for path in SOURCES:
        ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, 10))


def test_other_interpreters_compile_the_sources() -> None:
    pythons = interpreters()
    if not pythons:
        pytest.skip("no other Python here")
    code = "import sys\nfor f in sys.stdin.read().split('\\n'): compile(open(f, 'rb').read(), f, 'exec')"
    files = "\n".join(map(str, SOURCES))
    for python in pythons:
        line = [python, "-W", "error", "-c", code]
        done = subprocess.run(line, input=files, capture_output=True, text=True)
        assert done.returncode == 0, f"{python}: {done.stderr}"


# --------------------------------------------------------------------------------------------------- extras


def test_no_extra_but_the_stacks_names_torch(asked: dict[str, list[str]]) -> None:
    wanted = {"dali-cu12", "dali-cu13", "xformers", "export", "eval", "wandb", "trackio", "dev"}
    assert wanted <= asked.keys()
    for extra, lines in asked.items():
        named = {canonicalize_name(Requirement(line).name) for line in lines}
        assert ("torch" in named) is (extra in ("", *STACKS)), extra
        if extra != "dev":
            assert not named & {"triton", "torchvision", "apex"}, extra


def test_what_extras_install_accepts_the_torch_that_is_here(asked: dict[str, list[str]]) -> None:
    """Requirements of requirements, as far as they are installed; the nightly test asks the resolver."""
    todo = [Requirement(line) for extra, lines in asked.items() if extra not in STACKS for line in lines]
    seen: set[str] = set()
    while todo:
        requirement = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        if name == "torch":
            assert requirement.specifier.contains(torch.__version__, prereleases=True), requirement
        if name in seen:
            continue
        seen.add(name)
        try:
            todo += map(Requirement, requires(name) or [])
        except PackageNotFoundError:
            continue
    assert {"torch", "numpy", "pytest"} <= seen


@pytest.mark.skipif(not NIGHTLY, reason="asks the package index: FASTDINO_NIGHTLY=1")
def test_installing_all_extras_leaves_torch_alone(asked: dict[str, list[str]], tmp_path: Path) -> None:
    lines = [line for extra, lines in asked.items() if extra not in STACKS for line in lines]
    report = tmp_path / "report.json"
    line = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report), *lines]
    done = subprocess.run(line, capture_output=True, text=True)
    if "No matching distribution found" in done.stderr or "ConnectionError" in done.stderr:
        pytest.skip(f"the package index cannot be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    items = json.loads(report.read_text())["install"]
    chosen = {canonicalize_name(item["metadata"]["name"]) for item in items}
    assert not chosen & {"torch", "triton"}, f"the extras would replace torch {torch.__version__}"


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


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastdino.__version__)
    code = [path for path in SOURCES if path.parts[len(ROOT.parts)] not in ("tests", "bench")]
    places = [path for path in code if re.search(r"^__version__\b.* = ", path.read_text("utf-8"), re.M)]
    assert places == [ROOT / "fastdino" / "__init__.py"]
    assert not re.search(r"^version\s*=", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)


def test_changelog_is_kept() -> None:
    """Keep a Changelog: dated versions from the newest down, changes under its six headings."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    titles = re.findall(r"^## (.+)$", text, re.M)
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", title) for title in titles[1:]]
    assert titles[0] == "[Unreleased]" and all(released), titles
    versions = [tuple(map(int, found[1].split("."))) for found in released if found]
    assert versions == sorted(set(versions), reverse=True)
    assert not versions or versions[0] == tuple(map(int, fastdino.__version__.split(".")))
    kinds = set(re.findall(r"^### (.+)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


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


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("gpu,profile", [("", "cpu"), ("9.0", "cuda13"), ("7.0", "v100")])
def test_make_installs_what_is_locked(gpu: str, profile: str, tmp_path: Path) -> None:
    line = ["make", "--dry-run", f"VENV={tmp_path}/venv", "LOCK=1", f"GPU={gpu}", "CUDA=13", "test"]
    text = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = [words for words in text.splitlines() if " install " in words]
    assert all("--require-hashes" in words or "--no-deps" in words for words in installs)
    assert any(words.endswith(f"-r .ci/locks/{profile}.txt") for words in installs)
    assert any(words.endswith("-r .ci/locks/torch-cpu.txt") for words in installs) is (profile == "cpu")
