"""The package as a folder for Hugging Face's `kernels`: complete, relative, and right where it is loaded."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import fastdino_kernels
import pytest
from fastdino_kernels import hub

LOAD = """
import sys
sockets = []
import torch
import kernels
sys.addaudithook(lambda event, _: sockets.append(event) if event.startswith("socket.") else None)
import fastdino_kernels  # in the same process, with operators of its own
from pathlib import Path

torch.manual_seed(0)
student, teacher = torch.randn(15, 37), torch.randn(6, 37)
center = torch.randn(37)
temps = dict(student_temp=0.1, teacher_temp=0.04)
exact = student.double(), teacher.double(), center.double()
oracle = fastdino_kernels.reference.dino_loss(*exact, **temps)
for folder in map(Path, sys.argv[1:]):
    package = kernels.get_local_kernel(folder)
    assert package is not fastdino_kernels and str(folder) in package.__file__, package.__file__
    x = student.clone().requires_grad_()
    out = package.dino_loss(x, teacher, center, **temps)
    torch.testing.assert_close(out.loss.double(), oracle.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.batch_center.double(), oracle.batch_center)
    out.loss.backward()
    y = student.clone().requires_grad_()
    fastdino_kernels.dino_loss(y, teacher, center, **temps).loss.backward()
    torch.testing.assert_close(x.grad, y.grad)
    print(Path(package.__file__).parent.name, package.backend.__module__)
assert not sockets, sockets
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "out"
    line = [sys.executable, "-m", "fastdino_kernels.hub", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (out / "README.md").exists(), done.stderr
    return out


def test_every_variant_is_whole_and_imports_itself_relatively(folder: Path) -> None:
    variants = sorted((folder / "build").iterdir())
    assert {"torch-cuda", "torch-cpu"} <= {variant.name for variant in variants}
    sources = {path.name for path in Path(fastdino_kernels.__file__).parent.glob("*.py")}
    for variant in variants:
        assert {path.name for path in variant.glob("*.py")} == sources - {"hub.py"}
        for path in variant.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                roots = {name.partition(".")[0] for name in names}
                assert roots <= {*sys.stdlib_module_names, "torch", "numpy", "triton"}, f"{path}: {roots}"


def test_metadata_lists_what_is_there(folder: Path) -> None:
    ids = set()
    for variant in (folder / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        files = {str(path.relative_to(variant)) for path in variant.rglob("*") if path.is_file()}
        assert metadata["digest"]["files"].keys() == files - {"metadata.json"}
        assert metadata["backend"]["type"] == ("cuda" if variant.name == "torch-cuda" else "cpu")
        assert metadata["id"].isidentifier()
        ids.add(metadata["id"])
    assert len(ids) == len(list((folder / "build").iterdir()))


def test_the_kernels_library_loads_and_runs_it(folder: Path, library: object) -> None:
    """On the CPU against the float64 oracle: the variant with the C++ kernels, then the one without."""
    rust = pytest.importorskip("kernels._rust", reason="kernels is not installed")
    for variant in (folder / "build").iterdir():
        listed = rust.Metadata.read_from_file(variant / "metadata.json").digest
        listed.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-W", "ignore", "-c", LOAD, str(folder), str(folder / "build" / "torch-cpu")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (text.split() for text in done.stdout.splitlines())
    assert first[0].startswith("torch-stable-abi") and second[0] == "torch-cpu"
    assert first[1] != second[1]  # two packages


def test_a_folder_that_is_there_is_refused(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="expected a folder that does not exist yet"):
        hub.export(folder)
