"""Crash-safe checkpoints: a new directory each time, safetensors and JSON only, verified before a tensor is
used.

A checkpoint ``<root>/step-00000123/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``meta.json``
and, written last, ``manifest.json`` with the size and SHA-256 of the others. Everything is written to a
hidden temporary directory, flushed to the disk and renamed, so a crash at any point leaves either the old set
of checkpoints or the new one. No pickle is written or read.

Where processes hold pieces of tensors, each writes ``model-00001-of-00004.safetensors`` and
``optimizer-...`` with its own rows, and then ``rank-00002.json`` with their sizes and hashes; rank 0 waits
for these files, checks that the pieces fit together and writes the manifest. The processes meet in the file
system only, so all of them may write in the background, and any number of processes can read the result."""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as _tensors_from_bytes

from fastdino.engine.pieces import (
    CheckpointError,
    HostCopies,
    Piece,
    Span,
    State,
    check_files,
    check_tiling,
    is_sharded,
    kind_of,
    own,
    read_spans,
    to_bytes,
)

__all__ = ["CheckpointError", "Disk", "Piece", "Saver", "State", "checkpoints", "latest", "load", "prune"]
__all__ += ["read_meta", "remove_unfinished", "save", "set_aside", "step_of", "verify"]

FORMAT, SHARDED_FORMAT = 1, 2
_META, _MANIFEST = "meta.json", "manifest.json"
_TEMPORARY = ".saving-"
_POLL = 0.02  # seconds between two looks for the files of other processes


class Disk:
    """The operations a save consists of, in one place so that a test can interrupt or fail each of them."""

    def make_directory(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(path)  # a failed write does not know its file
            raise

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


def _digest(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


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
    model: State,
    optimizer: State,
    meta: Mapping[str, Any],
    *,
    rank: int | None = 0,
    world_size: int = 1,
    attempt: str = "",
    timeout: float = 600.0,
    disk: Disk | None = None,
) -> Path:
    """Write checkpoint ``step`` below ``root`` and return its directory.

    ``model`` and ``optimizer`` map flat names to tensors of any device, or to a Piece where this process
    holds only some of the rows; ``meta`` is JSON-serialisable. An existing valid checkpoint of the same step
    is left as it is, a damaged one is set aside under a ``damaged-`` name.

    With pieces, every writer calls this with its ``rank`` of ``world_size`` (None: not a writer, as all but
    one of the processes that hold the same rows) and with the same ``attempt``, a string that no other save
    has, so that nothing that a crashed one left behind gets into this one. Rank 0 returns when the checkpoint
    is in place, the others when their part is written.

    Raises OSError (with the path) when the disk fails, TimeoutError (an OSError) when rank 0 has waited
    ``timeout`` seconds for another writer, CheckpointError when the pieces do not make up whole tensors;
    nothing then stands under a final name. ValueError for a rank or attempt that cannot be."""
    root, disk = Path(root), disk or Disk()
    target = root / f"step-{step:08d}"
    temporary = root / f"{_TEMPORARY}{step:08d}{'-' if attempt else ''}{attempt}"
    sharded = is_sharded(model, optimizer)
    if rank is not None and not 0 <= rank < world_size:
        raise ValueError(f"rank: expected None or 0 to {world_size - 1}, got {rank}")
    if sharded and world_size > 1 and not attempt:
        raise ValueError("attempt: expected a string of its own for a save of several processes, got ''")
    if rank is None or (rank > 0 and not sharded):
        return target
    others = range(1, world_size) if sharded else range(0)
    if rank == 0 and _stands(target, disk):
        if others:  # they write all the same: only rank 0 looks at the checkpoint
            _reports(temporary, others, timeout)
            disk.remove(temporary)
        return target
    if not attempt:
        remove_unfinished(root, disk=disk)
    disk.make_directory(temporary)
    part = f"-{rank + 1:05d}-of-{world_size:05d}" if sharded else ""
    files: dict[str, dict[str, Any]] = {}

    def write(name: str, data: bytes) -> None:
        disk.write(temporary / name, data)
        files[name] = _digest(data)

    write(f"model{part}.safetensors", to_bytes(own(model, rank)))
    write(f"optimizer{part}.safetensors", to_bytes(own(optimizer, rank)))
    if rank > 0:
        write(f".{_report(rank)}", _canonical({"files": files}))
        disk.rename(temporary / f".{_report(rank)}", temporary / _report(rank))
        return target
    version = SHARDED_FORMAT if sharded else FORMAT
    write(_META, _canonical({"format": version, "step": step, **meta}))
    files |= _reports(temporary, others, timeout)
    check_files(temporary / name for name in files)
    disk.write(temporary / _MANIFEST, _seal({"format": version, "files": files}))
    disk.sync_directory(temporary)
    disk.rename(temporary, target)
    disk.sync_directory(root)
    return target


def remove_unfinished(root: Path | str, attempt: str = "", *, disk: Disk | None = None) -> None:
    """Remove what saves left behind that did not finish; ``attempt`` is going on and stays."""
    for left_over in Path(root).glob(f"{_TEMPORARY}*"):
        if not attempt or left_over.name.removeprefix(_TEMPORARY).partition("-")[2] != attempt:
            (disk or Disk()).remove(left_over)


def _stands(target: Path, disk: Disk) -> bool:
    """Whether ``target`` is a valid checkpoint; a damaged one is set aside."""
    if not target.is_dir():
        return False
    try:
        verify(target)
        return True
    except CheckpointError as error:
        warnings.warn(f"{error}; it is set aside and written again", stacklevel=3)
        disk.rename(target, _unused(target.with_name(f"damaged-{target.name}")))
        return False


def _report(rank: int) -> str:
    """Name of the file in which a process lists its files, written when they are on the disk."""
    return f"rank-{rank + 1:05d}.json"


def _reports(directory: Path, ranks: range, timeout: float) -> dict[str, Any]:
    """The files of other processes, their reports among them; waits until all are there."""
    deadline = time.monotonic() + timeout
    while missing := [rank for rank in ranks if not (directory / _report(rank)).exists()]:
        # A process that is about to exit waits for nobody: they may have ended for the same reason.
        if time.monotonic() > deadline or not threading.main_thread().is_alive():
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"rank {', '.join(map(str, missing))} has not written its part of the checkpoint within "
                f"{timeout:g} s (every process must see the same directory)",
                str(directory / _report(missing[0])),
            )
        time.sleep(_POLL)
    files: dict[str, Any] = {}
    for rank in ranks:
        data = (directory / _report(rank)).read_bytes()
        files |= {_report(rank): _digest(data), **json.loads(data)["files"]}
    return files


def _unused(path: Path) -> Path:
    candidate, n = path, 1
    while candidate.exists():
        candidate, n = path.with_name(f"{path.name}-{n}"), n + 1
    return candidate


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of a checkpoint."""
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
    if manifest["format"] not in (FORMAT, SHARDED_FORMAT):
        raise CheckpointError(
            f"{path}: checkpoint format {manifest['format']}, "
            f"this version reads {FORMAT} and {SHARDED_FORMAT}"
        )
    return manifest["files"]


def _verified(path: Path, expected: Mapping[str, Any]) -> bytes:
    """The contents of a file: the bytes that were hashed are the bytes that are used."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if len(data) != expected["size"]:
        raise CheckpointError(f"{path}: damaged ({len(data)} bytes, {expected['size']} expected)")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path}: damaged (SHA-256 differs from the manifest)")
    return data


def _contents(path: Path) -> Iterator[tuple[str, bytes, dict[str, Span]]]:
    """Name, bytes and spans of one verified file of a checkpoint after the other; ends with a CheckpointError
    if the pieces do not make up whole tensors.
    """
    held: dict[Path, dict[str, Span]] = {}
    for name, expected in _manifest(path).items():
        data = _verified(path / name, expected)
        spans = read_spans(path / name, io.BytesIO(data)) if kind_of(name) else {}
        held[path / name] = spans
        yield name, data, spans
    check_tiling(held)


def verify(path: Path | str) -> None:
    """Raise CheckpointError unless every byte is as it was written and the pieces make up whole tensors."""
    for _ in _contents(Path(path)):
        pass


def read_meta(path: Path | str) -> dict[str, Any]:
    """``meta.json`` of a checkpoint, verified against the manifest. Raises CheckpointError."""
    path = Path(path)
    return json.loads(_verified(path / _META, _manifest(path)[_META]))


def load(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """``(model, optimizer, meta)`` of a checkpoint with whole tensors on the CPU, whatever the number of its
    files, which are read one by one. Raises CheckpointError if anything is damaged.
    """
    parts: dict[str, dict[str, list[tuple[Span, torch.Tensor]]]] = {"model": {}, "optimizer": {}}
    meta: dict[str, Any] = {}
    for name, data, spans in _contents(Path(path)):
        if name == _META:
            meta = json.loads(data)
        if kind := kind_of(name):
            for tensor, value in _tensors_from_bytes(data).items():
                parts[kind].setdefault(tensor, []).append((spans[tensor], value))
    model, optimizer = (_joined(parts[kind]) for kind in ("model", "optimizer"))
    return model, optimizer, meta


def _joined(parts: dict[str, list[tuple[Span, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Whole tensors; takes the pieces out of ``parts`` so that no more than one tensor exists twice."""
    whole = {}
    for name in list(parts):
        pieces = [value for _, value in sorted(parts.pop(name), key=lambda part: part[0])]
        whole[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return whole


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
            elif not read_meta(path).get("keep"):
                disk.remove(path)
        except CheckpointError:
            continue  # damaged: evidence, never deleted here


class Saver:
    """Saves in the background: training goes on while a thread serialises, hashes and writes a copy.

    The checkpoints are those of ``save``, byte for byte. The copy stays allocated between saves: host memory
    for what this process writes.
    """

    def __init__(self, root: Path | str, *, timeout: float = 600.0, disk: Disk | None = None):
        self.root, self.timeout, self.disk = Path(root), timeout, disk
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed = False  # the save before the present one

    def start(
        self,
        step: int,
        model: State,
        optimizer: State,
        meta: Mapping[str, Any],
        *,
        rank: int | None = 0,
        world_size: int = 1,
        attempt: str = "",
    ) -> None:
        """Begin to save, with the arguments of ``save``, and prune after it; returns when the tensors are
        copied. Every process must have started a save before any of them starts the next. Waits for the save
        before; warns if that failed, and raises its error if the one before it had failed already.
        """
        error = self._finished()
        if error is not None:
            if self._failed:
                raise error
            warnings.warn(f"NO CHECKPOINT, trying again with the next one: {error}", stacklevel=2)
        self._failed = error is not None
        if rank is None:
            return
        if rank == 0:  # here, where no other process can be in a later save yet
            remove_unfinished(self.root, attempt, disk=self.disk)
        copies = self._copies(model=own(model, rank), optimizer=own(optimizer, rank))
        job = partial(
            save,
            self.root,
            step,
            copies["model"],
            copies["optimizer"],
            copy.deepcopy(meta),
            rank=rank,
            world_size=world_size,
            attempt=attempt,
            timeout=self.timeout,
            disk=self.disk,
        )
        self._thread = threading.Thread(target=self._run, args=(job, rank == 0), name=f"checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Return when the save that was started is over. Raises what ``save`` raises."""
        error = self._finished()
        if error is not None:
            raise error

    def _finished(self) -> BaseException | None:
        """The error of the save that was started, when it is over."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        return error

    def _run(self, job: Callable[[], Path], prunes: bool) -> None:
        try:
            job()
            if prunes:
                prune(self.root, disk=self.disk)
        except BaseException as error:  # the caller gets it from wait
            self._error = error
