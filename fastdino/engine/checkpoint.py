"""Crash-safe checkpoints: a new directory each time, safetensors and JSON only, verified before a tensor is
used.

A checkpoint ``<root>/step-00000123/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``meta.json``
and, written last, ``manifest.json`` with the size and SHA-256 of the others. Everything is written to a
hidden temporary directory, flushed to the disk and renamed, so a crash at any point leaves either the old set
of checkpoints or the new one. No pickle is written or read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as _tensors_from_bytes
from safetensors.torch import save as _tensors_to_bytes

FORMAT = 1
_MODEL, _OPTIMIZER, _META, _MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "meta.json",
    "manifest.json",
)
_TEMPORARY = ".saving-"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another format; the message names the file and what is wrong."""


class Disk:
    """The operations a save consists of, in one place so that a test can interrupt or fail each of them."""

    def make_directory(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        shutil.rmtree(path)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def _seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's text, with the SHA-256 of the rest of it inside."""
    return _canonical({**manifest, "sha256": hashlib.sha256(_canonical(manifest)).hexdigest()})


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint directory's name, -1 if the name is not that of a checkpoint."""
    prefix, _, digits = path.name.partition("-")
    return int(digits) if prefix == "step" and digits.isdigit() else -1


def checkpoints(root: Path | str) -> list[Path]:
    """All finished checkpoint directories below ``root``, newest first, unverified."""
    root = Path(root)
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if step_of(p) >= 0 and p.is_dir()), key=step_of, reverse=True)


def save(
    root: Path | str,
    step: int,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    *,
    disk: Disk | None = None,
) -> Path:
    """Write checkpoint ``step`` below ``root`` and return its directory.

    ``model`` and ``optimizer`` map flat names to tensors of any device; ``meta`` is JSON-serialisable. An
    existing valid checkpoint of the same step is left as it is, a damaged one is set aside under a
    ``damaged-`` name. Raises OSError (with the path) when the disk fails; nothing then stands under a final
    name."""
    root, disk = Path(root), disk or Disk()
    target, temporary = root / f"step-{step:08d}", root / f"{_TEMPORARY}{step:08d}"
    if target.is_dir():
        try:
            verify(target)
            return target
        except CheckpointError as error:
            warnings.warn(f"{error}; it is set aside and written again", stacklevel=2)
            disk.rename(target, _unused(root / f"damaged-{target.name}"))
    disk.make_directory(root)
    for left_over in root.glob(f"{_TEMPORARY}*"):
        disk.remove(left_over)
    disk.make_directory(temporary)
    contents = {
        _MODEL: _serialise(model),
        _OPTIMIZER: _serialise(optimizer),
        _META: _canonical({"format": FORMAT, "step": step, **meta}),
    }
    files = {}
    for name, data in contents.items():
        disk.write(temporary / name, data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    disk.write(temporary / _MANIFEST, _seal({"format": FORMAT, "files": files}))
    disk.sync_directory(temporary)
    disk.rename(temporary, target)
    disk.sync_directory(root)
    return target


def _serialise(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return _tensors_to_bytes({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def _unused(path: Path) -> Path:
    candidate, n = path, 1
    while candidate.exists():
        candidate, n = path.with_name(f"{path.name}-{n}"), n + 1
    return candidate


def _read(path: Path) -> dict[str, bytes]:
    """The verified contents of a checkpoint: the bytes that were hashed are the bytes that are used."""
    try:
        raw = (path / _MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path / _MANIFEST}: cannot be read ({error})") from error
    try:
        manifest = json.loads(raw)
        del manifest["sha256"]
        intact = _seal(manifest) == raw
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path / _MANIFEST}: damaged (not the text that was written)")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
    contents = {}
    for name, expected in manifest["files"].items():
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read ({error})") from error
        if len(data) != expected["size"]:
            raise CheckpointError(f"{path / name}: damaged ({len(data)} bytes, {expected['size']} expected)")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{path / name}: damaged (SHA-256 differs from the manifest)")
        contents[name] = data
    return contents


def verify(path: Path | str) -> None:
    """Raise CheckpointError unless every byte of the checkpoint is as it was written."""
    _read(Path(path))


def read_meta(path: Path | str) -> dict[str, Any]:
    """``meta.json`` of a checkpoint, verified against the manifest."""
    return json.loads(_read(Path(path))[_META])


def load(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """``(model, optimizer, meta)`` of a checkpoint, on the CPU. Raises CheckpointError if anything is
    damaged.
    """
    contents = _read(Path(path))
    return (
        _tensors_from_bytes(contents[_MODEL]),
        _tensors_from_bytes(contents[_OPTIMIZER]),
        json.loads(contents[_META]),
    )


def latest(root: Path | str) -> Path | None:
    """The newest checkpoint below ``root`` that verifies; damaged newer ones are passed over with a
    warning.
    """
    for path in checkpoints(root):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            warnings.warn(
                f"DAMAGED CHECKPOINT passed over, falling back to the one before it. {error}", stacklevel=2
            )
    return None


def set_aside(root: Path | str, after: int) -> list[Path]:
    """Rename the checkpoints of steps beyond ``after`` to ``old-...`` and return their new paths.

    A run that starts before them would otherwise be continued from them after a crash.
    """
    moved = []
    for path in checkpoints(root):
        if step_of(path) > after:
            moved.append(path.rename(_unused(path.with_name(f"old-{path.name}"))))
    return moved


def prune(root: Path | str, *, keep_last: int = 2, disk: Disk | None = None) -> None:
    """Remove checkpoints that are neither among the newest ``keep_last`` valid ones nor marked ``keep`` in
    their meta.
    """
    disk = disk or Disk()
    valid = 0
    for path in checkpoints(root):
        try:
            if valid < keep_last:
                verify(path)
                valid += 1
            elif not json.loads((path / _META).read_bytes()).get("keep"):
                disk.remove(path)
        except (CheckpointError, ValueError):
            continue  # damaged: evidence, never deleted here
