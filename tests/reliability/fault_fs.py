"""Disks that fail or die at a chosen operation, and the states in which a power cut may leave a disk."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastdino.engine.disk import Disk

CHANGES = (
    "make_directory",
    "create",
    "fill",
    "sync",
    "sync_directory",
    "rename",
    "unlink",
    "remove_directory",
)
READS = ("opened", "read", "names")
PAGE = 4096


class Operation(NamedTuple):
    name: str
    path: Path
    target: Path | None = None  # of a rename
    data: bytes = b""  # of a fill


class Crash(BaseException):
    """The process is no more."""


class FaultDisk(Disk):
    """Keeps a ``log`` of the operations in ``of`` and dies before its ``at``-th (from 1; 0: never), or
    ``after`` it; with ``error``, the operation raises that errno instead.

    ``lasts`` says for how long: the first n times with the same name and path (an int n), always there
    (``"there"``), or for all that changes the disk from then on (``"everywhere"``).
    A fill that fails or dies leaves half its bytes.
    """

    pauses = (0.0, 0.0, 0.0)

    def __init__(
        self,
        at: int = 0,
        *,
        after: bool = False,
        error: int = 0,
        lasts: int | str = 1,
        of: Iterable[str] = CHANGES,
    ):
        self.at, self.after, self.error, self.lasts, self.of = at, after, error, lasts, tuple(of)
        self.log: list[Operation] = []
        self.failed: Operation | None = None
        self.failures = 0

    @property
    def count(self) -> int:
        return len(self.log)

    def die(self) -> None:
        raise Crash

    def _run(self, operation: Operation, *arguments: Any) -> Any:
        real = getattr(super(), operation.name)
        if operation.name not in self.of:
            return real(*arguments)
        self.log.append(operation)
        now = self.count == self.at
        if self.error and (now or self._again(operation)):
            if now:
                self.failed = operation
            self.failures += 1
            self._half(operation, arguments)
            raise OSError(self.error, os.strerror(self.error))
        if now and not self.after and not self.error:
            self._half(operation, arguments)
            self.die()
        result = real(*arguments)
        if now and not self.error:
            self.die()
        return result

    def _again(self, operation: Operation) -> bool:
        if self.failed is None:
            return False
        if self.lasts == "everywhere":
            return operation.name in CHANGES
        same = operation[:2] == self.failed[:2]
        return same and (self.lasts == "there" or self.failures < int(self.lasts))

    def _half(self, operation: Operation, arguments: tuple[Any, ...]) -> None:
        if operation.name == "fill":
            super().fill(arguments[0], operation.data[: len(operation.data) // 2])

    def read(self, path: Path) -> bytes:
        return self._run(Operation("read", path), path)

    def opened(self, path: Path) -> BinaryIO:
        return self._run(Operation("opened", path), path)

    def names(self, path: Path) -> list[str]:
        return self._run(Operation("names", path), path)

    def make_directory(self, path: Path) -> None:
        self._run(Operation("make_directory", path), path)

    def create(self, path: Path) -> BinaryIO:
        return self._run(Operation("create", path), path)

    def fill(self, file: BinaryIO, data: bytes | memoryview) -> None:
        self._run(Operation("fill", Path(file.name), data=bytes(data)), file, data)

    def sync(self, file: BinaryIO) -> None:
        self._run(Operation("sync", Path(file.name)), file)

    def sync_directory(self, path: Path) -> None:
        self._run(Operation("sync_directory", path), path)

    def rename(self, source: Path, target: Path) -> None:
        self._run(Operation("rename", source, target), source, target)

    def unlink(self, path: Path) -> None:
        self._run(Operation("unlink", path), path)

    def remove_directory(self, path: Path) -> None:
        self._run(Operation("remove_directory", path), path)


# -- power cuts ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class File:
    now: bytes = b""  # what a read would give
    kept: bytes = b""  # what was flushed


@dataclass(eq=False)
class Directory:
    now: dict[str, File | Directory] = field(default_factory=dict)
    kept: dict[str, File | Directory] = field(default_factory=dict)


class Change(NamedTuple):
    """An entry that appears, goes, or moves within a directory, not flushed yet."""

    directory: Directory
    name: str
    entry: File | Directory
    gone: bool = False
    moved_to: tuple[Directory, str] | None = None


class PowerCut:
    """What may be on the disk when the power fails after some operations below ``root``.

    POSIX promises no more than this: the bytes of a file are there once it was flushed, else any pages of
    them; an entry of a directory is there, gone or renamed once that directory was flushed, else any of the
    changes may have happened in whatever order, each as a whole. What is below ``root`` at first was flushed.
    """

    def __init__(self, root: Path):
        self.root = root
        self.top = self._scan(root)
        self.changes: list[Change] = []

    def _scan(self, path: Path) -> Directory:
        entries: dict[str, File | Directory] = {}
        for child in sorted(path.iterdir()):
            data = child.read_bytes() if child.is_file() else b""
            entries[child.name] = self._scan(child) if child.is_dir() else File(data, data)
        return Directory(entries, dict(entries))

    def _find(self, path: Path) -> Any:
        entry: Any = self.top
        for name in path.relative_to(self.root).parts:
            entry = entry.now[name]
        return entry

    def apply(self, operation: Operation) -> None:
        name, path, target, data = operation
        if path == self.root:  # a flush: nothing else happens to the root itself
            self._flush(self.top)
            return
        parent: Directory = self._find(path.parent)
        if name in ("make_directory", "create"):
            if path.name not in parent.now:
                entry = Directory() if name == "make_directory" else File()
                parent.now[path.name] = entry
                self.changes.append(Change(parent, path.name, entry))
        elif name == "fill":
            parent.now[path.name].now += data  # type: ignore[operator]
        elif name == "sync":
            file = parent.now[path.name]
            file.kept = file.now  # type: ignore[assignment]
        elif name == "sync_directory":
            self._flush(self._find(path))
        elif name == "rename":
            assert target is not None
            entry, there = parent.now.pop(path.name), self._find(target.parent)
            there.now[target.name] = entry
            self.changes.append(Change(parent, path.name, entry, moved_to=(there, target.name)))
        elif name in ("unlink", "remove_directory"):
            entry = parent.now.pop(path.name)
            self.changes.append(Change(parent, path.name, entry, gone=True))
        else:
            raise ValueError(f"operation: {name} is not modelled")

    def _flush(self, directory: Directory) -> None:
        touches = [
            c.directory is directory or (c.moved_to is not None and c.moved_to[0] is directory)
            for c in self.changes
        ]
        for change in (c for c, mine in zip(self.changes, touches, strict=True) if mine):
            _happen(change, None)
        self.changes = [c for c, mine in zip(self.changes, touches, strict=True) if not mine]

    def write_state(self, at: Path, dice: random.Random) -> None:
        """Make the directory ``at`` one of the states that may be left of ``root``."""
        share = dice.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        happened = [change for change in self.changes if dice.random() < share]
        if dice.random() < 0.5:
            dice.shuffle(happened)
        entries: dict[int, dict[str, File | Directory]] = {}
        for change in happened:
            _happen(change, entries)
        self._write(self.top, at, entries, dice)

    def _write(
        self, directory: Directory, at: Path, entries: dict[int, dict[str, Any]], dice: random.Random
    ) -> None:
        at.mkdir()
        for name, entry in entries.get(id(directory), directory.kept).items():
            if isinstance(entry, Directory):
                self._write(entry, at / name, entries, dice)
            else:
                (at / name).write_bytes(_torn(entry, dice))


def _happen(change: Change, entries: dict[int, dict[str, File | Directory]] | None) -> None:
    """Do ``change`` where it is possible: to ``entries``, copies of what directories keep, or for good."""

    def of(directory: Directory) -> dict[str, Any]:
        return (
            entries.setdefault(id(directory), dict(directory.kept)) if entries is not None else directory.kept
        )

    here = of(change.directory)
    if change.moved_to is None and not change.gone:
        here[change.name] = change.entry
    elif here.get(change.name) is change.entry:
        del here[change.name]
        if change.moved_to is not None:
            of(change.moved_to[0])[change.moved_to[1]] = change.entry


def _torn(file: File, dice: random.Random) -> bytes:
    """The bytes that a power cut leaves of a file."""
    if file.now == file.kept:
        return file.kept
    kind = dice.choice(("kept", "all", "cut", "holes"))
    if kind in ("kept", "all"):
        return file.kept if kind == "kept" else file.now
    if kind == "cut":
        return file.now[: dice.randrange(len(file.now) + 1)]
    pages = [file.now[i : i + PAGE] for i in range(0, len(file.now), PAGE)]
    return b"".join(bytes(len(page)) if dice.random() < 0.5 else page for page in pages)
