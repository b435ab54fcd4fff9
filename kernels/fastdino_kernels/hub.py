"""``python -m fastdino_kernels.hub OUT``: the package as a folder for Hugging Face's library `kernels`.

    OUT/build/torch-cuda/, torch-cpu/                Python alone: Triton for CUDA tensors, else eager PyTorch
    OUT/build/torch-stable-abi210-cpu-x86_64-linux/  (for example) the same and the compiled C++ kernels

``kernels.get_local_kernel(OUT)`` imports the variant that fits the machine; uploaded as it is, OUT is a
repository for ``kernels.get_kernel``. Each variant is the package itself, which imports its parts by relative
names, and a ``metadata.json`` with the SHA-256 of every file. It may live in one process with the installed
package.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .csrc import PATH

NAME = "fastdino-kernels"
SOURCES = Path(__file__).parent
CARD = """---
license: apache-2.0
library_name: kernels
tags:
- kernels
- self-supervised-learning
---

# {name} {version}

Fused losses and updates for self-supervised training: DINO's loss on logits or
fused with the prototype layer, EsViT's region loss, iBOT's patch loss,
InfoNCE, Sinkhorn-Knopp, AdamW, LARS and LAMB with the EMA of the teacher.
Triton on GPUs, C++ on CPUs, eager PyTorch elsewhere.

```python
from kernels import get_local_kernel  # or get_kernel("<owner>/{name}", version={major})

kernels = get_local_kernel("<this folder>")
loss = kernels.dino_loss(student_logits, teacher_logits, center, student_temp=0.1, teacher_temp=0.04).loss
```
"""


def export(out: Path) -> list[Path]:
    """Writes the folder ``out`` and returns its variants.

    Raises:
        FileExistsError: ``out`` is there already.
        RuntimeError: the version is not known, because the package runs uninstalled.
    """
    try:
        release = version("fastdino")
    except PackageNotFoundError as error:
        raise RuntimeError(
            "fastdino_kernels is not installed (pip install -e .): its version is unknown"
        ) from error
    if out.exists():
        raise FileExistsError(f"{out}: expected a folder that does not exist yet")
    machine = f"torch-stable-abi210-cpu-{platform.machine()}-{platform.system().lower()}"
    variants = [_variant(out / "build" / f"torch-{backend}", backend, release) for backend in ("cuda", "cpu")]
    if PATH.exists():
        variants.append(_variant(out / "build" / machine, "cpu", release, library=PATH))
    card = CARD.format(name=NAME, version=release, major=_major(release))
    (out / "README.md").write_text(card, encoding="utf-8")
    return variants


def _variant(folder: Path, backend: str, release: str, library: Path | None = None) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.tmp", "hub.py")
    shutil.copytree(SOURCES, folder, ignore=ignore)
    if library is not None:
        shutil.copyfile(library, folder / library.name)
    digests = {
        str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    everything = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    metadata = {
        "name": NAME,
        # The name of the imported module and of its operators, so it differs from build to build.
        "id": f"{NAME.replace('-', '_')}_{backend}_{everything[:10]}",
        "version": _major(release),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def _digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def _major(release: str) -> int:
    return int(release.split(".")[0])


def main() -> None:
    about = "Write the package as a folder for the `kernels` library of Hugging Face."
    parser = argparse.ArgumentParser(prog="python -m fastdino_kernels.hub", description=about)
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    try:
        variants = export(parser.parse_args().out)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    for folder in variants:
        print(folder)


if __name__ == "__main__":
    main()
