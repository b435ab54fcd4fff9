"""Shards in object stores (``s3://``, ``gs://``, ``https://``, ...), through the package fsspec.

Credentials, endpoints and anonymous access are fsspec's: the environment of the store's own client, or
``~/.config/fsspec``. Every store needs its package besides (s3fs, gcsfs, aiohttp, ...); fsspec names it.
"""

from __future__ import annotations

import errno
import hashlib
import re
from typing import Any

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_USER = re.compile(r"(://|\b\w+:/(?=[^/@\s:]+:))[^/\s]*@")
_QUERY = re.compile(r"((?:://|\bhttps?:/)[^?\s]*\?)[^\s/]*")


def is_url(path: str) -> bool:
    return _SCHEME.match(path) is not None


def without_secrets(text: str) -> str:
    """`text` with passwords and signatures of URLs taken out, also of those that went through `Path`."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))


def scrubbed(value: Any) -> Any:
    """Plain containers with `without_secrets` of every text in them."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: scrubbed(item) for key, item in value.items()}
    return type(value)(map(scrubbed, value)) if isinstance(value, (list, tuple)) else value


def known_as(url: str) -> str:
    """What caches call an object: its URL without secrets, with a digest of its query in their place."""
    query = url.partition("?")[2]
    return without_secrets(url) + (hashlib.sha256(query.encode()).hexdigest()[:16] if query else "")


def read(url: str, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`, fewer if the object ends before. Raises OSError naming the URL."""
    files, path = _open(url)
    try:
        content = files.cat_file(path, start=offset, end=offset + length)
    except Exception as error:  # every store raises its own kinds
        raise _failure(url, error) from None
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
        raise _failure(url, error) from None


def look_at(url: str) -> tuple[int, str]:
    """Size in bytes, and a text that changes with the object. Raises OSError naming the URL."""
    files, path = _open(url)
    try:
        facts = files.info(path)
    except Exception as error:
        raise _failure(url, error) from None
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
        raise _failure(pattern, error) from None


def _open(url: str) -> tuple[Any, str]:
    if "***" in url:
        raise ValueError(f"--data_path: {url}: config.yaml keeps no passwords; give the whole URL again")
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
        raise ImportError(f"{without_secrets(url)}: {_told(url, str(error))}") from None
    except ValueError as error:
        raise ValueError(f"{without_secrets(url)}: {_told(url, str(error))}") from None
    return files, path


def _failure(url: str, error: Exception) -> OSError:
    text = _told(url, f"{type(error).__name__}: {error}")
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    return kind(errno.ENOENT if kind is FileNotFoundError else errno.EIO, f"{without_secrets(url)}: {text}")


def _told(url: str, text: str) -> str:
    """What a store says of an object, without the secrets in its URL, which it may spell in other ways."""
    login, query = re.search(r"://([^/\s]*)@", url), url.partition("?")[2]
    secrets = [query, *([login[1], *login[1].split(":", 1)[1:]] if login else [])]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return without_secrets(text)
