"""Installs the packages fastdino and fastdino_kernels and compiles csrc/ into one plain C-ABI library.

The library needs neither Python nor torch headers: a C++17 compiler ($CXX, else c++) builds it, and one wheel
serves every Python and every torch. Without a compiler the install still works and the kernels take a slower
fallback. FASTDINO_BUILD=0 leaves the library out on purpose, FASTDINO_BUILD=1 makes its absence an error.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
LIBRARY = Path("fastdino_kernels", "libfastdino_cpu.so")
# Errno keeps loops with square roots from being vectorised; psabi notes concern calls that are inlined.
CXXFLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fno-math-errno", "-Wno-psabi"]
REPRODUCIBLE = [f"-ffile-prefix-map={ROOT}=."]  # the same bytes in every folder


def version() -> str:
    """Version string, read from fastdino/__init__.py without importing it."""
    text = (ROOT / "fastdino" / "__init__.py").read_text("utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.M)
    if found is None:
        raise RuntimeError('fastdino/__init__.py: expected a line __version__ = "..."')
    return found.group(1)


def compiler() -> list[str] | None:
    """Command of the C++ compiler ($CXX, else c++, g++, clang++), or None when there is none."""
    chosen = os.environ.get("CXX", "").strip()
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if shutil.which(words[0]):
            return words
    return None


def wanted() -> bool:
    return os.environ.get("FASTDINO_BUILD", "") != "0"


def compile_library(target: Path) -> bool:
    """Compiles csrc/*.cpp to ``target``; False (after one line on stderr) when that is not possible."""
    if not wanted():
        return False
    command = compiler()
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").glob("*.cpp"))
    if not sources:
        problem = "it holds no .cpp file"
    elif command is None:
        name = os.environ.get("CXX", "").strip() or "c++, g++ or clang++"
        problem = f"no C++ compiler found ({name}; set CXX)"
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Compiled beside its place and renamed: a process that has the old library mapped keeps it intact.
        fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        code = compile_sources([*command, *CXXFLAGS, *REPRODUCIBLE], sources, fresh)
        if code == 0:
            os.replace(fresh, target)
            return True
        fresh.unlink(missing_ok=True)
        problem = f"{command[0]} failed with exit code {code}"
    message = f"fastdino_kernels: csrc/ was not compiled: {problem}. "
    if os.environ.get("FASTDINO_BUILD") == "1":
        raise SystemExit(message + "FASTDINO_BUILD=1 asks for it.")
    print(message + "The CPU kernels will use their slower eager fallback.", file=sys.stderr)
    return False


def compile_sources(command: list[str], sources: list[Path], target: Path) -> int:
    """Compiles the sources side by side and links ``target``; the first exit code that is not 0, else 0."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as cores:
        objects = [Path(folder, source.name).with_suffix(".o") for source in sources]

        def compile_one(source: Path, compiled: Path) -> int:
            return subprocess.run([*command, "-c", str(source), "-o", str(compiled)], cwd=ROOT).returncode

        if code := next(filter(None, cores.map(compile_one, sources, objects)), 0):
            return code
        link = [*command, "-shared", *map(str, objects), "-o", str(target)]
        return subprocess.run(link, cwd=ROOT).returncode


class BuildCsrc(Command):
    """``python setup.py build_csrc``: recompiles the library in place, as an editable install uses it."""

    description = "compile csrc/ in place"
    user_options: list[tuple[str, str | None, str]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if not compile_library(ROOT / "kernels" / LIBRARY):
            raise SystemExit(1)


class BuildPy(build_py):
    """Copies the Python files and compiles the library next to them."""

    def run(self) -> None:
        # What an earlier build left, a removed module or an old library, must not ship.
        if not self.editable_mode:
            for package in ("fastdino", "fastdino_kernels"):
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()
        base = ROOT / "kernels" if self.editable_mode else Path(self.build_lib).resolve()
        compile_library(base / LIBRARY)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        library = Path(self.build_lib) / LIBRARY
        return [*outputs, str(library)] if library.exists() else outputs


class BinaryDistribution(Distribution):
    """Platform-specific as far as can be known before anything is compiled."""

    def has_ext_modules(self) -> bool:
        return wanted() and compiler() is not None


class BdistWheel(bdist_wheel):
    """py3-none-<platform>: the library depends on the platform alone, not on the Python version.

    py3-none-any when nothing was compiled.
    """

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not Path(self.get_finalized_command("build_py").build_lib, LIBRARY).exists()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class Sdist(sdist):
    """The source archive carries csrc/."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        csrc = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir())
        super().make_release_tree(base_dir, [*files, *csrc])


setup(
    name="fastdino",
    version=version(),
    description="Fast DINO self-supervised pretraining of vision transformers, with drop-in kernels",
    long_description=(ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["fastdino", "fastdino.*"]),
        "fastdino_kernels",
        *find_packages("kernels", include=["fastdino_kernels.*"]),
    ],
    package_dir={"fastdino": "fastdino", "fastdino_kernels": "kernels/fastdino_kernels"},
    package_data={"": ["py.typed", "*.html", "*.css", "*.md"]},
    # The kernels need the first two. Triton is left to the CUDA builds of torch, which pin their own.
    install_requires=[
        "torch>=2.10",
        "numpy>=1.26",
        "tyro>=1.0",
        "rich>=13.0",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "pillow>=10.0",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "scikit-learn>=1.5",
    ],
    extras_require={
        "dali-cu12": ["nvidia-dali-cuda120>=1.50; platform_system == 'Linux'"],
        "dali-cu13": ["nvidia-dali-cuda130>=1.52; platform_system == 'Linux'"],
        "xformers": ["xformers>=0.0.35"],
        # Whole stacks: the only extras that choose a torch. CUDA builds of torch bring their own triton.
        "v100": [
            "torch==2.10.0",
            "xformers==0.0.35; platform_system == 'Linux'",
            "nvidia-dali-cuda120>=1.50; platform_system == 'Linux'",
        ],
        "cuda13": ["torch==2.13.0", "nvidia-dali-cuda130>=1.52; platform_system == 'Linux'"],
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.18"],
        "trackio": ["trackio>=0.5"],
        "export": ["onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.18"],
        "eval": ["av>=12.0"],  # what the evaluation reads beyond images
        "video": ["av>=12.0"],
        "lmdb": ["lmdb>=1.4"],
        "object-store": ["fsspec>=2023.5"],
        "dev": [
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "scipy>=1.12",
            "triton>=3.6,<3.8; platform_system == 'Linux'",
            "types-PyYAML",
            "kernels>=0.17",
            "auditwheel>=6.0; platform_system == 'Linux'",
            "av>=12.0",
            "lmdb>=1.4",
            "fsspec>=2023.5",
            "onnx>=1.16",
            "onnxscript>=0.3",
            "onnxruntime>=1.18",
            "tensorboard>=2.16",
            "transformers>=4.50",
            "huggingface-hub>=0.26",
        ],
    },
    distclass=BinaryDistribution,
    cmdclass={
        "build_csrc": BuildCsrc,
        "build_py": BuildPy,
        "bdist_wheel": BdistWheel,
        "sdist": Sdist,
    },
)
