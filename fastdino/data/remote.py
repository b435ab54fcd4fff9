"""Shards in object stores (``s3://``, ``gs://``, ``https://``, ...), through the package fsspec.

Credentials, endpoints and anonymous access are fsspec's: the environment of the store's own client, or
``~/.config/fsspec``. Every store needs its package besides (s3fs, gcsfs, aiohttp, ...); fsspec names it.
"""

from __future__ import annotations

import errno
import re
from typing import Any

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: str) -> bool:
    return _SCHEME.match(path) is not None


def without_secrets(text: str) -> str:
    """`text` with passwords and signatures of URLs taken out."""
    text = re.sub(r"(://)[^/@\s]*@", r"\1***@", text)
    return re.sub(r"(://[^?\s]*\?)[^\s/]*", r"\1***", text)


def read(url: str, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`, fewer if the object ends before. Raises OSError naming the URL."""
    files, path = _open(url)
    try:
        content = files.cat_file(path, start=offset, end=offset + length)
    except Exception as error:  # every store raises its own kinds
        raise _failure(url, error) from error
    if len(content) > length:
        raise OSError(
            errno.EIO,
            f"{without_secrets(url)}: asked for {length} bytes, the server sent {len(content)}: expected one "
            "that answers requests for a range",
        )
    return bytes(content)


def read_all(url: str) -> bytes:
    """A whole object. Raises OSError naming the URL."""
    files, path = _open(url)
    try:
        return bytes(files.cat_file(path))
    except Exception as error:
        raise _failure(url, error) from error


def look_at(url: str) -> tuple[int, str]:
    """Size in bytes, and a text that changes with the object. Raises OSError naming the URL."""
    files, path = _open(url)
    try:
        facts = files.info(path)
    except Exception as error:
        raise _failure(url, error) from error
    if facts.get("size") is None:
        raise OSError(errno.EIO, f"the server does not tell the size of {without_secrets(url)}")
    known = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "last_modified", "mtime", "created")
    return int(facts["size"]), " ".join(str(facts[key]) for key in known if facts.get(key))


def listing(pattern: str) -> list[str]:
    """URLs of the objects that match a pattern with ``*`` or ``?``, or lie directly in a folder, sorted."""
    files, path = _open(pattern)
    try:
        if any(c in path for c in "*?["):
            found = files.glob(path)
        else:
            found = [entry["name"] for entry in files.ls(path, detail=True) if entry["type"] == "file"]
        return sorted(str(files.unstrip_protocol(name)) for name in found)
    except Exception as error:
        raise _failure(pattern, error) from error


def _open(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(
            f"{without_secrets(url)} is in an object store, which the package fsspec reads: "
            "pip install 'fastdino[object-store]', and the store's own package, such as s3fs or gcsfs"
        ) from error
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{without_secrets(url)}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{without_secrets(url)}: {error}") from error
    return files, path


def _failure(url: str, error: Exception) -> OSError:
    text = without_secrets(f"{type(error).__name__}: {error}")
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    return kind(errno.ENOENT if kind is FileNotFoundError else errno.EIO, f"{without_secrets(url)}: {text}")
