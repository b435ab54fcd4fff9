"""Every operation of checkpoints on the disk, one by one, so that a test can record, fail or interrupt each
of them; and how often one that failed is tried again."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

# Errors that may pass: somebody makes room, a server comes back. EIO is one: the file is written anew.
MAY_PASS = frozenset(
    getattr(errno, name)
    for name in """EIO ENOSPC EDQUOT EAGAIN EINTR EBUSY ENOMEM ENFILE EMFILE ESTALE ETIMEDOUT EREMOTEIO
    ENETDOWN ENETUNREACH ENETRESET ECONNRESET EHOSTDOWN EHOSTUNREACH""".split()
    if hasattr(errno, name)
)


class Disk:
    """The methods down to ``remove_directory`` are the operations, the others are made of them."""

    pauses: tuple[float, ...] = (0.2, 0.8, 2.0)  # seconds before the second, third and fourth try

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def opened(self, path: Path) -> BinaryIO:
        """To read a part."""
        return open(path, "rb")

    def names(self, path: Path) -> list[str]:
        """What is in a directory, in no order."""
        return os.listdir(path)

    def make_directory(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def create(self, path: Path) -> BinaryIO:
        return open(path, "xb", buffering=0)

    def fill(self, file: BinaryIO, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]

    def sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        os.rmdir(path)

    def is_directory(self, path: Path) -> bool:
        return path.is_dir()

    def exists(self, path: Path) -> bool:
        return path.exists()

    def write(self, path: Path, data: bytes) -> None:
        """A new file that is on the disk when this returns, and is gone when this raises OSError."""
        try:
            with self.create(path) as file:
                self.fill(file, data)
                self.sync(file)
        except FileExistsError:
            raise
        except OSError as error:
            error.filename = str(path)  # a failed write does not know its file
            ignoring_errors(self.unlink, path)
            raise

    def remove(self, path: Path) -> None:
        """A directory with all that is in it."""
        for name in self.names(path):
            below = path / name
            if self.is_directory(below) and not below.is_symlink():
                self.remove(below)
            else:
                self.unlink(below)
        self.remove_directory(path)


def patiently(
    disk: Disk, operation: Callable[..., Any], path: Path, *arguments: Any, what: str = "", size: int = 0
) -> Any:
    """``operation(path, *arguments)``, tried again after each of ``disk.pauses`` if its error may pass.

    Raises OSError with the error's name, ``what`` was being done with how many bytes, and the path.
    """
    for tries in range(1, len(disk.pauses) + 2):
        try:
            return operation(path, *arguments)
        except OSError as error:
            if tries > 1 and operation == disk.rename and _has_moved(disk, error, path, *arguments):
                return None
            if tries > len(disk.pauses) or error.errno not in MAY_PASS:
                raise _told(error, path, what, size, tries) from error
        time.sleep(disk.pauses[tries - 1])


def make_directories(
    disk: Disk, path: Path, patient: Callable[..., Any] | None = None, *, parents: bool = True
) -> None:
    """``path`` and, with ``parents``, what is missing above it, each flushed in the directory it stands in;
    ``patient`` is ``patiently`` with what it is done for.
    """
    patient = patient or partial(patiently, disk)
    if not disk.is_directory(path):
        if parents:
            make_directories(disk, path.parent, patient)
        patient(disk.make_directory, path)
        patient(disk.sync_directory, path.parent)


def _has_moved(disk: Disk, error: OSError, source: Path, target: Path) -> bool:
    """Whether the try before, whose answer was an error, has moved ``source`` all the same (NFS)."""
    return error.errno == errno.ENOENT and not disk.exists(source) and disk.exists(target)


def _told(error: OSError, path: Path, what: str, size: int, tries: int) -> OSError:
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    facts = [what] * bool(what) + [f"{size:,} bytes"] * bool(size) + [f"tried {tries} times"] * (tries > 1)
    return OSError(
        error.errno,
        f"{name}: {error.strerror}" + (f" ({', '.join(facts)})" if facts else ""),
        str(error.filename or path),
    )


def ignoring_errors(operation: Callable[..., Any], *arguments: Any) -> None:
    """For tidying up after something that failed, which is told instead."""
    try:
        operation(*arguments)
    except OSError:
        pass


def remove_all(disk: Disk, paths: Iterable[Path]) -> None:
    """Remove directories that nobody needs; one that stays is a warning: no run ends for that."""
    for path in paths:
        try:
            patiently(disk, disk.remove, path)
        except OSError as error:
            warnings.warn(f"not removed, it takes up space: {error}", stacklevel=3)
