"""Crash-safe checkpoints: a new directory each time, safetensors and JSON only, verified before a tensor is
used.

A checkpoint ``<root>/step-00000123/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``meta.json``
and, written last, ``manifest.json`` with the size and SHA-256 of the others. Everything is written to a
hidden temporary directory, flushed to the disk and renamed, so a crash at any point leaves either the old set
of checkpoints or the new one. No pickle is written or read. State with NaN or infinity in it is never saved.

Where processes hold pieces of tensors, each writes ``model-00001-of-00004.safetensors`` and
``optimizer-...`` with its own rows, and then ``rank-00002.json`` with their sizes and hashes; rank 0 waits
for these files, checks that the pieces fit together and writes the manifest. The processes meet in the file
system only, so all of them may write in the background, and any number of processes can read the result."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastdino.engine.disk import MAY_PASS, Disk, ignoring_errors, make_directories, patiently, remove_all
from fastdino.engine.pieces import (
    CheckpointError,
    HostCopies,
    NotFiniteError,
    Piece,
    State,
    check_files,
    check_finite,
    is_sharded,
    nbytes,
    own,
    to_bytes,
)
from fastdino.engine.stored import (
    FORMAT,
    MANIFEST,
    META,
    SAVING,
    SHARDED_FORMAT,
    UnreadableError,
    canonical,
    checkpoints,
    latest,
    load,
    prune,
    put_aside,
    read_meta,
    remove_unfinished,
    seal,
    set_aside,
    step_of,
    verify,
)

__all__ = ["CheckpointError", "Disk", "NotFiniteError", "Piece", "Saver", "State", "UnreadableError"]
__all__ += ["FORMAT", "SHARDED_FORMAT", "checkpoints", "latest", "load", "prune", "read_meta"]
__all__ += ["remove_unfinished", "save", "set_aside", "step_of", "verify"]

_POLL = 0.02  # seconds between two looks for the files of other processes


def _digest(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


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
    parents: bool = True,
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

    Without ``parents`` the directory that ``root`` is in must be there: that of a run is never made anew.

    Raises OSError with path, name of the error and bytes when the disk fails, after ``disk.pauses`` where
    that may pass; TimeoutError (an OSError) when rank 0 has waited ``timeout`` seconds for another writer;
    NotFiniteError when there is NaN or infinity in a tensor; CheckpointError when the pieces do not make up
    whole tensors. Nothing then stands under a final name, unless only the last flush of the directory
    failed: then the new checkpoint does, complete. ValueError for a rank or attempt that cannot be."""
    root, disk = Path(root), disk or Disk()
    target = root / f"step-{step:08d}"
    temporary = root / f"{SAVING}{step:08d}{'-' if attempt else ''}{attempt}"
    sharded = is_sharded(model, optimizer)
    if rank is not None and not 0 <= rank < world_size:
        raise ValueError(f"rank: expected None or 0 to {world_size - 1}, got {rank}")
    if sharded and world_size > 1 and not attempt:
        raise ValueError("attempt: expected a string of its own for a save of several processes, got ''")
    if rank is None or (rank > 0 and not sharded):
        return target
    others = range(1, world_size) if sharded else range(0)
    mine = {"model": own(model, rank), "optimizer": own(optimizer, rank)}
    patient = partial(patiently, disk, what=f"checkpoint of step {step}", size=nbytes(*mine.values()))
    try:
        try:
            check_finite(**mine)
        except NotFiniteError as error:
            raise NotFiniteError(f"checkpoint of step {step} refused: {error}") from None
        if rank == 0 and _stands(target, disk):
            if others:  # they write all the same: only rank 0 looks at the checkpoint
                _reports(temporary, others, timeout, disk)
                remove_all(disk, [temporary])
            patient(disk.sync_directory, root)  # the save that wrote it may have failed in this
            return target
        if not attempt:
            remove_unfinished(root, disk=disk)
        make_directories(disk, root, patient, parents=parents)
        patient(disk.make_directory, temporary)
        part = f"-{rank + 1:05d}-of-{world_size:05d}" if sharded else ""
        files: dict[str, dict[str, Any]] = {}
        for kind, state in mine.items():
            name, data = f"{kind}{part}.safetensors", to_bytes(state)
            patient(disk.write, temporary / name, data)
            files[name] = _digest(data)
            del data
        if rank > 0:
            _leave_report(temporary, rank, {"files": files}, patient, disk)
            return target
        version = SHARDED_FORMAT if sharded else FORMAT
        data = canonical({**meta, "format": version, "step": step})
        patient(disk.write, temporary / META, data)
        files |= {META: _digest(data), **_reports(temporary, others, timeout, disk)}
        check_files((temporary / name for name in files), partial(patient, disk.opened))
        patient(disk.write, temporary / MANIFEST, seal({"format": version, "files": files}))
        patient(disk.sync_directory, temporary)
        patient(disk.rename, temporary, target)
        patient(disk.sync_directory, root)
        return target
    except (OSError, NotFiniteError) as error:
        if rank > 0:  # rank 0 would wait for it
            failed = {"failed": getattr(error, "strerror", str(error)), "errno": getattr(error, "errno", 0)}
            ignoring_errors(disk.make_directory, temporary)
            ignoring_errors(_leave_report, temporary, rank, failed, patient, disk)
        elif not others and disk.exists(temporary):
            ignoring_errors(disk.remove, temporary)
        raise


def _stands(target: Path, disk: Disk) -> bool:
    """Whether ``target`` is a valid checkpoint; a damaged one is set aside."""
    if not disk.is_directory(target):
        return False
    try:
        verify(target, disk=disk)
        return True
    except CheckpointError as error:
        warnings.warn(f"{error}; it is set aside and written again", stacklevel=3)
        put_aside(target, "damaged", disk)
        return False


def _report(rank: int) -> str:
    """Name of the file in which a process lists its files when they are on the disk, or tells why not."""
    return f"rank-{rank + 1:05d}.json"


def _leave_report(
    directory: Path, rank: int, report: Mapping[str, Any], patient: Callable[..., Any], disk: Disk
) -> None:
    hidden = directory / f".{_report(rank)}"
    patient(disk.write, hidden, canonical(report))
    patient(disk.rename, hidden, directory / _report(rank))


def _reports(directory: Path, ranks: range, timeout: float, disk: Disk) -> dict[str, Any]:
    """The files of other processes, their reports among them; waits until all are there. Raises what made
    one of them fail.
    """
    deadline = time.monotonic() + timeout
    missing, files = list(ranks), dict[str, Any]()
    while missing:
        for rank in [rank for rank in missing if disk.exists(directory / _report(rank))]:
            data = patiently(disk, disk.read, directory / _report(rank))
            report = json.loads(data)
            if "failed" in report:
                message = f"rank {rank}: {report['failed']}"
                if report["errno"]:
                    raise OSError(report["errno"], message, str(directory))
                raise NotFiniteError(message)
            files |= {_report(rank): _digest(data), **report["files"]}
            missing.remove(rank)
        # A process that is about to exit waits for nobody: they may have ended for the same reason.
        if missing and (time.monotonic() > deadline or not threading.main_thread().is_alive()):
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"rank {', '.join(map(str, missing))} has not written its part of the checkpoint within "
                f"{timeout:g} s (every process must see the same directory)",
                str(directory / _report(missing[0])),
            )
        if missing:
            time.sleep(_POLL)
    return files


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
        before; warns if that failed for a reason that may pass, and raises its error if the one before it had
        failed already or the reason stays.
        """
        error = self._finished()
        if error is not None:
            if self._failed or not _may_pass(error):
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
            parents=False,
            disk=self.disk,
        )
        self._thread = threading.Thread(target=self._run, args=(job, rank == 0), name=f"checkpoint {step}")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that is over if there is no use in trying again with the next one."""
        if self._error is not None and (self._failed or not _may_pass(self._error)):
            self.wait()

    def wait(self) -> None:
        """Return when the save that was started is over. Raises what ``save`` raises."""
        error = self._finished()
        if error is not None:
            raise error

    def end(self) -> None:
        """Return when the save that was started is over, whatever came of it."""
        if self._thread is not None:
            self._thread.join()

    def _finished(self) -> BaseException | None:
        """The error of the save that was started, when it is over."""
        self.end()
        error, self._thread, self._error = self._error, None, None
        return error

    def _run(self, job: Callable[[], Path], prunes: bool) -> None:
        try:
            job()
            if prunes:
                prune(self.root, disk=self.disk)
        except BaseException as error:  # the caller gets it from wait
            self._error = error


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in MAY_PASS
