"""Checkpoints that stand on the disk: found, verified before a tensor is used, set aside when damaged,
removed when newer ones are valid. What they consist of is told in :mod:`~.checkpoint`, which writes them."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _tensors_from_bytes

from fastdino.engine.disk import Disk, patiently, remove_all
from fastdino.engine.pieces import CheckpointError, Span, check_tiling, kind_of, read_spans

FORMAT, SHARDED_FORMAT = 1, 2
META, MANIFEST = "meta.json", "manifest.json"
SAVING, _REMOVING = ".saving-", ".removing-"


class UnreadableError(CheckpointError):
    """A checkpoint that may be sound but cannot be read here and now: a disk error, a format of another
    release. It is passed over, never renamed or removed.
    """


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's text, with the SHA-256 of the rest of it inside."""
    return canonical({**manifest, "sha256": hashlib.sha256(canonical(manifest)).hexdigest()})


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint directory's name, -1 if the name is not that of a checkpoint."""
    found = re.fullmatch("step-([0-9]+)", path.name)
    return int(found[1]) if found else -1


def checkpoints(root: Path | str, *, disk: Disk | None = None) -> list[Path]:
    """All finished checkpoint directories below ``root``, newest first, unverified. Raises OSError."""
    root, disk = Path(root), disk or Disk()
    found = (root / name for name in _names(root, disk))
    return sorted((p for p in found if step_of(p) >= 0 and disk.is_directory(p)), key=step_of, reverse=True)


def _names(root: Path, disk: Disk) -> list[str]:
    """What is in ``root``; nothing if there is no such directory."""
    try:
        return sorted(patiently(disk, disk.names, root))
    except (FileNotFoundError, NotADirectoryError):
        return []


# -- reading -------------------------------------------------------------------------------------------------


def _read(path: Path, disk: Disk) -> bytes:
    try:
        return patiently(disk, disk.read, path)
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
        kind = CheckpointError if gone else UnreadableError
        raise kind(f"{path}: cannot be read ({error})") from error


def _manifest(path: Path, disk: Disk) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of a checkpoint."""
    raw = _read(path / MANIFEST, disk)
    try:
        manifest = json.loads(raw)
        del manifest["sha256"]
        intact = seal(manifest) == raw
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path / MANIFEST}: damaged (not the text that was written)")
    if manifest.get("format") not in (FORMAT, SHARDED_FORMAT):
        raise UnreadableError(
            f"{path}: checkpoint format {manifest.get('format')}, "
            f"this version reads {FORMAT} and {SHARDED_FORMAT}"
        )
    files = manifest.get("files")
    if not (isinstance(files, dict) and META in files and all(map(_is_entry, files.items()))):
        raise CheckpointError(f"{path / MANIFEST}: not the list of files of a checkpoint")
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    name, facts = item
    return Path(name).name == name and isinstance(facts, dict) and {"size", "sha256"} <= facts.keys()


def _check_unlisted(path: Path, files: Mapping[str, Any], disk: Disk) -> None:
    """Raise CheckpointError for a file that is not the checkpoint's; hidden ones are the file system's."""
    for name in _names(path, disk):
        ours = Path(name).suffix in (".safetensors", ".json") and not name.startswith(".")
        if ours and name not in files and name != MANIFEST:
            raise CheckpointError(f"{path / name}: does not belong here (not in the manifest)")


def _verified(path: Path, expected: Mapping[str, Any], disk: Disk) -> bytes:
    """The contents of a file: the bytes that were hashed are the bytes that are used."""
    data = _read(path, disk)
    if len(data) != expected["size"]:
        raise CheckpointError(f"{path}: damaged ({len(data)} bytes, {expected['size']} expected)")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path}: damaged (SHA-256 differs from the manifest)")
    return data


def _meta(path: Path, data: bytes) -> dict[str, Any]:
    """``meta.json``; raises CheckpointError if it belongs under another name."""
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / META}: not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path / META}: not a JSON object")
    if step_of(path) not in (-1, meta.get("step", -1)):
        raise CheckpointError(f"{path}: holds step {meta.get('step')}, its directory was renamed")
    return meta


def _contents(path: Path, disk: Disk) -> Iterator[tuple[str, bytes, dict[str, Span]]]:
    """Name, bytes and spans of one verified file of a checkpoint after the other; ends with a CheckpointError
    if the pieces do not make up whole tensors.
    """
    held: dict[Path, dict[str, Span]] = {}
    files = _manifest(path, disk)
    _check_unlisted(path, files, disk)
    for name, expected in files.items():
        data = _verified(path / name, expected, disk)
        spans = read_spans(path / name, io.BytesIO(data)) if kind_of(name) else {}
        held[path / name] = spans
        if name == META:
            _meta(path, data)  # for its step
        yield name, data, spans
    check_tiling(held)


def verify(path: Path | str, *, disk: Disk | None = None) -> None:
    """Raise CheckpointError unless every byte is as it was written and the pieces make up whole tensors."""
    for _ in _contents(Path(path), disk or Disk()):
        pass


def read_meta(path: Path | str, *, disk: Disk | None = None) -> dict[str, Any]:
    """``meta.json`` of a checkpoint, verified against the manifest. Raises CheckpointError."""
    path, disk = Path(path), disk or Disk()
    return _meta(path, _verified(path / META, _manifest(path, disk)[META], disk))


def load(
    path: Path | str, *, disk: Disk | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """``(model, optimizer, meta)`` of a checkpoint with whole tensors on the CPU, whatever the number of its
    files, which are read one by one. Raises CheckpointError if anything is damaged.
    """
    parts: dict[str, dict[str, list[tuple[Span, torch.Tensor]]]] = {"model": {}, "optimizer": {}}
    meta: dict[str, Any] = {}
    for name, data, spans in _contents(Path(path), disk or Disk()):
        if name == META:
            meta = json.loads(data)
        if kind := kind_of(name):
            for tensor, value in _tensors(Path(path) / name, data).items():
                parts[kind].setdefault(tensor, []).append((spans[tensor], value))
    model, optimizer = (_joined(parts[kind]) for kind in ("model", "optimizer"))
    return model, optimizer, meta


def _tensors(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    try:
        return _tensors_from_bytes(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a file of tensors ({error})") from error


def _joined(parts: dict[str, list[tuple[Span, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Whole tensors; takes the pieces out of ``parts`` so that no more than one tensor exists twice."""
    whole = {}
    for name in list(parts):
        pieces = [value for _, value in sorted(parts.pop(name), key=lambda part: part[0])]
        whole[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return whole


def latest(root: Path | str, *, quarantine: bool = False, disk: Disk | None = None) -> Path | None:
    """The newest checkpoint below ``root`` that verifies; damaged newer ones are passed over with a warning,
    and with ``quarantine``, for the run that owns ``root``, kept under a ``damaged-`` name.

    Raises UnreadableError if there are checkpoints but none that could be read: that is not "none".
    """
    disk, unreadable = disk or Disk(), None
    for path in checkpoints(root, disk=disk):
        try:
            verify(path, disk=disk)
            return path
        except CheckpointError as error:
            kept = _kept(path, error, disk) if quarantine else ""
            warnings.warn(
                f"DAMAGED CHECKPOINT passed over, falling back to the one before it. {error}{kept}",
                stacklevel=2,
            )
            if isinstance(error, UnreadableError):
                unreadable = unreadable or error
    if unreadable is not None:
        raise unreadable
    return None


# -- names ---------------------------------------------------------------------------------------------------


def _kept(path: Path, error: CheckpointError, disk: Disk) -> str:
    """Take a damaged checkpoint out of the way without losing it; returns words on where it is."""
    if isinstance(error, UnreadableError):
        return ""
    try:
        return f"; kept as {put_aside(path, 'damaged', disk).name}"
    except OSError as failure:
        return f"; it stays where it is ({failure})"


def put_aside(path: Path, why: str, disk: Disk) -> Path:
    """Rename a checkpoint to ``<why>-step-...`` for good; returns its new path. Raises OSError."""
    target = _unused(path.with_name(f"{why}-{path.name}"), disk)
    patiently(disk, disk.rename, path, target)
    patiently(disk, disk.sync_directory, path.parent)
    return target


def _unused(path: Path, disk: Disk) -> Path:
    candidate, n = path, 1
    while disk.exists(candidate):
        candidate, n = path.with_name(f"{path.name}-{n}"), n + 1
    return candidate


def set_aside(root: Path | str, after: int, *, disk: Disk | None = None) -> list[Path]:
    """Rename the checkpoints of steps beyond ``after`` to ``old-...`` and return their new paths.

    A run that starts before them would otherwise be continued from them after a crash.
    """
    disk = disk or Disk()
    return [put_aside(path, "old", disk) for path in checkpoints(root, disk=disk) if step_of(path) > after]


# -- removing ------------------------------------------------------------------------------------------------


def remove_unfinished(root: Path | str, attempt: str = "", *, disk: Disk | None = None) -> None:
    """Remove what saves and removals left behind that did not finish; ``attempt`` is going on and stays."""
    root, disk = Path(root), disk or Disk()
    remains = [name for name in _names(root, disk) if name.startswith((SAVING, _REMOVING))]
    going_on = [
        name
        for name in remains
        if attempt and name.startswith(SAVING) and name.removeprefix(SAVING).partition("-")[2] == attempt
    ]
    remove_all(disk, (root / name for name in remains if name not in going_on))


def prune(root: Path | str, *, keep_last: int = 2, disk: Disk | None = None) -> None:
    """Remove checkpoints that are neither among the newest ``keep_last`` valid ones nor marked ``keep`` in
    their meta. Nothing is removed before ``keep_last`` newer ones are verified; a damaged one is kept under a
    ``damaged-`` name, with a warning. Raises ValueError for ``keep_last`` < 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: expected at least 1, got {keep_last}")
    root, disk = Path(root), disk or Disk()
    valid, spare = 0, []
    for path in checkpoints(root, disk=disk):
        try:
            if valid < keep_last:
                verify(path, disk=disk)
                valid += 1
            elif not read_meta(path, disk=disk).get("keep"):
                spare.append(path)
        except CheckpointError as error:
            warnings.warn(f"DAMAGED CHECKPOINT: {error}{_kept(path, error, disk)}", stacklevel=2)
    doomed = []
    try:
        for path in spare:
            target = _unused(path.with_name(f"{_REMOVING}{path.name}"), disk)
            patiently(disk, disk.rename, path, target)
            doomed.append(target)
        if doomed:
            patiently(disk, disk.sync_directory, root)  # half of one never stands under a checkpoint's name
    except OSError as error:
        warnings.warn(f"old checkpoints stay, they take up space: {error}", stacklevel=2)
    else:
        remove_all(disk, doomed)
