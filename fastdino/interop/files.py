"""Foreign pickles opened without running anything in them, safetensors files, our own checkpoints by path."""

from __future__ import annotations

import argparse
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fastdino.engine import checkpoint
from fastdino.interop.screening import Refused, screen, weigh


class WeightsError(ValueError):
    """A weights file is incomplete, damaged or of another kind; the message names it and what is wrong."""


class _NumpyDtype:
    """Stands in for ``numpy.dtype`` while a pickle is read: its constructor's arguments and state."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> Any:
    """Stands in for NumPy's scalar constructor; gives a plain Python number."""
    formats = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "b1": "?"}
    return struct.unpack(dtype.order + formats[dtype.code], data)[0]


# What official training files hold besides tensors and plain containers: the flags, and the learning rate and
# weight decay of the optimizer's groups as NumPy scalars, under the names of NumPy 1 and 2.
_SAFE: list[Any] = [
    argparse.Namespace,
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """The contents of a file written by ``torch.save``, on the CPU.

    Only dense tensors, plain containers and numbers, ``argparse.Namespace`` and NumPy scalars can come out:
    anything else in the file is refused, never called. Nothing takes more memory than the file has bytes.
    Raises OSError if the file cannot be opened and WeightsError, naming it, if it is damaged (the archive's
    checksums are verified, which ``torch.load`` does not do), foreign or refused.
    """
    with open(path, "rb") as file:
        try:
            if screen(file):
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
                if damaged is not None:
                    raise Refused(f"damaged ({damaged} does not match its checksum)")
            file.seek(0)
            with torch.serialization.safe_globals(_SAFE):
                contents = torch.load(file, map_location="cpu", weights_only=True)
            weigh(contents)
            return contents
        except Refused as error:
            raise WeightsError(f"{path}: {error}") from error
        except Exception as error:  # arbitrary bytes can fail in any operation of the readers
            refused = re.search(r"(?i:unsupported global:?) (?:GLOBAL )?(\S+)", str(error))
            if refused:
                raise WeightsError(f"{path}: refused, it wants to call {refused[1]}") from error
            reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())
            raise WeightsError(f"{path}: not a file of tensors, or damaged ({reason[:200]})") from error


def write_pickle(path: str | os.PathLike[str], contents: Any) -> None:
    """``torch.save`` that leaves either the old file or the whole new one at ``path``."""
    with _replacing(Path(path)) as file:
        torch.save(contents, file)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as those of safetensors do: the length of a JSON header, then the header."""
    with open(path, "rb") as file:
        return file.read(10)[8:] == b'{"'


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a safetensors file.

    Raises OSError if the file cannot be opened and WeightsError, naming it, if it is damaged.
    """
    with open(path, "rb"):
        pass
    try:
        with safe_open(os.fspath(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except Exception as error:  # arbitrary bytes can fail in any operation of the readers
        raise WeightsError(f"{path}: not a safetensors file, or damaged ({error})") from error


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Leaves either the old file or the whole new one at ``path``; ``format``, which readers require, is
    added to ``metadata``.
    """
    data = save({k: v.detach().contiguous() for k, v in tensors.items()}, {"format": "pt", **metadata})
    with _replacing(Path(path)) as file:
        file.write(data)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` when all is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    checkpoint.Disk().sync_directory(path.parent)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint directory ``path``, or the newest valid one of the run directory ``path``."""
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    found = checkpoint.latest(path / "checkpoints") or checkpoint.latest(path)
    if found is None:
        raise WeightsError(f"{path}: neither a checkpoint nor a run directory with a valid one")
    return found
