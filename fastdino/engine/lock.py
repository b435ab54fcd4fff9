"""One training run at a time in an output directory. Imports no torch: the second run is told at once.

The lock is ``flock`` on ``<output>/.lock``, which the kernel gives up when the process ends in whatever way;
the file itself stays and names the last holder."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdino.engine.disk import Disk, make_directories

try:
    import fcntl
except ImportError:  # no lock where there is no flock
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_PATIENCE = 1.0  # seconds a new holder may take to write its name
_PROBE = 65536  # bytes that must fit

_held: dict[Path, int] = {}  # directory: descriptor of its locked file


class OutputError(Exception):
    """The output directory cannot be used; the message is one line and names it."""


def take(output: Path) -> None:
    """Make ``output`` and hold it until ``release`` or the end of this process, which may call this again.

    Raises ValueError if a file is in the way; OutputError if nothing can be written there, or with process,
    host and start of the run that holds it.
    """
    try:
        make_directories(Disk(), output)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--output_dir {output}: {error.filename} is not a directory") from error
    except OSError as error:
        raise _unusable(output, error) from error
    if _key(output) in _held:
        return
    try:
        descriptor = os.open(output / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unusable(output, error) from error
    try:
        if not _lock(descriptor):
            raise OutputError(f"--output_dir {output}: in use by another run: {_holder(descriptor)}")
        _sign(descriptor)
        _probe(output)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise _unusable(output, error) from error
        raise
    _held[_key(output)] = descriptor


def release(output: Path) -> None:
    """Let another run have ``output``, if this process holds it."""
    descriptor = _held.pop(_key(output), None)
    if descriptor is not None:
        os.close(descriptor)


def check(output: Path) -> None:
    """Raise FileNotFoundError if ``output`` is no longer the directory that ``take`` locked."""
    descriptor = _held.get(_key(output))
    if descriptor is None:
        return
    try:
        same = os.path.samestat(os.stat(output / NAME), os.fstat(descriptor))
    except FileNotFoundError:
        same = False
    if not same:
        what = "the output directory was removed or replaced while the run was going on"
        raise FileNotFoundError(errno.ENOENT, what, str(output))


@contextmanager
def explaining(output: Path) -> Iterator[None]:
    """Where ``output`` is lost, an OSError inside came of it, whatever file it names: ``check`` says so."""
    try:
        yield
    except OSError:
        check(output)
        raise


def _key(output: Path) -> Path:
    """One name per directory; links are not followed, so that ``check`` sees where they lead now."""
    return Path(os.path.abspath(output))


def _lock(descriptor: int) -> bool:
    """Whether the file is ours now; also where the file system knows no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            return True
        raise


def _sign(descriptor: int) -> None:
    """Write who holds the file."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    os.fsync(descriptor)


def _holder(descriptor: int) -> str:
    """Who holds the file. It may name the run before for a moment, or nobody: then it is read again."""
    deadline, holder = time.monotonic() + _PATIENCE, None
    while holder is None or (_is_gone(holder) and time.monotonic() < deadline):
        try:
            holder = json.loads(os.pread(descriptor, 4096, 0))
        except ValueError:
            if time.monotonic() > deadline:
                return "it has not given its name"
        time.sleep(0.01)
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"


def _is_gone(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _probe(output: Path) -> None:
    """Raise OSError unless a small file can be written: a full disk still opens files."""
    path = output / f".probe-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def _unusable(output: Path, error: OSError) -> OutputError:
    name = errno.errorcode.get(error.errno or 0, "OSError")
    what = f"{name}: {os.strerror(error.errno or 0)}"
    return OutputError(f"--output_dir {output}: cannot be written ({what})")


def _forget() -> None:
    """In a child process: the lock is its parent's, and must end with it."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
