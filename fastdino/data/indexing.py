"""The index of shards: where every image's bytes lie, its key and its label.

It is made once and kept per user (``$XDG_CACHE_HOME/fastdino``, else ``~/.cache/fastdino``) by path, size and
modification time; ``index.npz`` beside the shards, which ``python -m fastdino.data.pack`` writes, is taken as
well.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdino.data import npz, remote, samples
from fastdino.data.formats import lmdb_file, recordio, tar, tfrecord
from fastdino.data.formats.window import Entry, Malformed, Window
from fastdino.data.manifest import one_line, printable
from fastdino.data.progress import track
from fastdino.data.samples import Shard
from fastdino.data.threads import threads

INDEX_NAME = "index.npz"
THREADS = 8
"""That look at shards or index them."""
_COLUMNS = ("offsets", "lengths", "key_ends", "label_ends")
_LOCAL_BLOCK, _REMOTE_BLOCK = 1 << 12, 1 << 22  # bytes read at once while indexing

log = logging.getLogger(__name__)


class Index(NamedTuple):
    """The images of one shard."""

    offsets: np.ndarray  # int64 [n]
    lengths: np.ndarray  # int64 [n]
    keys: bytes
    key_ends: np.ndarray  # int64 [n], in `keys`
    labels: bytes
    label_ends: np.ndarray  # int64 [n], in `labels`; an image without a label has an empty one


def index_shard(shard: Shard) -> Index:
    """Find the images of a shard. Raises Malformed naming it, ValueError if it holds none, OSError."""
    try:
        entries = list(_entries(shard))
    except Malformed as error:
        raise Malformed(f"--data_path: {one_line(str(error))}") from error
    except (OSError, ImportError) as error:
        if isinstance(error, OSError) and not remote.is_url(shard.path):
            raise OSError(error.errno, f"--data_path: {printable(shard.path)}: {error.strerror}") from error
        raise
    keys = [entry.key for entry in entries]
    labels = [entry.label or b"" for entry in entries]
    return Index(
        np.array([entry.offset for entry in entries], np.int64),
        np.array([entry.length for entry in entries], np.int64),
        b"".join(keys),
        np.cumsum([len(key) for key in keys], dtype=np.int64),
        b"".join(labels),
        np.cumsum([len(label) for label in labels], dtype=np.int64),
    )


def _entries(shard: Shard) -> Iterator[Entry]:
    if shard.kind == "lmdb":
        yield from lmdb_file.index(shard.path)
        return
    if remote.is_url(shard.path):
        name = remote.without_secrets(shard.path)
        window = Window(name, shard.size, lambda at, n: remote.read(shard.path, at, n), _REMOTE_BLOCK)
        yield from _scan(window, shard)
        return
    with open(shard.path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        window = Window(shard.path, shard.size, lambda at, n: samples.pread(descriptor, n, at), _LOCAL_BLOCK)
        yield from _scan(window, shard)


def _scan(window: Window, shard: Shard) -> Iterator[Entry]:
    if shard.kind == "recordio":
        listing = os.path.splitext(shard.path)[0] + ".idx"
        known = not remote.is_url(listing) and os.path.isfile(listing)
        yield from recordio.index(
            window, recordio.read_idx(listing, samples.read(listing)) if known else None
        )
    else:
        yield from (tar if shard.kind == "tar" else tfrecord).index(window)


def indices(shards: list[Shard], data_path: str, progress: bool) -> list[Index]:
    """The index of each shard, from the caches or made anew."""
    cache = cache_file(data_path)
    kept = _load(cache) if cache.exists() else {}
    known = _beside(shards)
    for shard in shards:
        index = kept.get((_absolute(shard.path), shard.size, shard.stamp))
        if index is not None:
            known[shard] = index
    unknown = [shard for shard in shards if shard not in known]
    if unknown:
        try:
            with threads(THREADS, "index") as pool:
                indices = track(pool.map(index_shard, unknown), len(unknown), progress, "indexing shards")
                for shard, index in zip(unknown, indices, strict=True):
                    known[shard] = index
        finally:  # an interrupted scan goes on where it stopped
            try:
                save({s: known[s] for s in shards if s in known}, cache, _absolute)
            except OSError as error:
                log.warning("cannot keep the index in %s: %s", printable(str(cache)), error.strerror)
    return [known[shard] for shard in shards]


# ------------------------------------------------------------------------------------------------------ cache


def cache_file(data_path: str) -> Path:
    """Where the index of a data set is kept for the user."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(os.fsencode(_absolute(data_path))).hexdigest()[:16]
    return Path(folder) / "fastdino" / f"index-{digest}.npz"


def save(known: dict[Shard, Index], file: Path, name: Callable[[str], str] = os.path.basename) -> None:
    """Write the index of shards, whose paths are kept as `name` makes them, at once or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    indices = list(known.values())
    columns: dict[str, Any] = {
        field: np.concatenate([getattr(index, field) for index in indices] or [np.zeros(0, np.int64)])
        for field in _COLUMNS
    }
    with open(temporary, "wb") as out:
        np.savez(
            out,
            shards=_join(os.fsencode(name(shard.path)) for shard in known),
            stamps=_join(shard.stamp.encode() for shard in known),
            numbers=np.array(
                [(s.size, len(i.offsets), len(i.keys), len(i.labels)) for s, i in known.items()], np.int64
            ).reshape(-1, 4),
            keys=np.frombuffer(b"".join(index.keys for index in indices), np.uint8),
            labels=np.frombuffer(b"".join(index.labels for index in indices), np.uint8),
            **columns,
        )
    os.replace(temporary, file)


def _load(file: Path | io.BytesIO) -> dict[tuple[str, int, str], Index]:
    """The indices of a cache by path, size and stamp of their shards."""
    try:
        cache = npz.load(file, ("shards", "stamps", "numbers", "keys", "labels", *_COLUMNS))
        columns = {name: cache[name] for name in _COLUMNS}
        paths, stamps = (cache[name].tobytes().split(b"\0") for name in ("shards", "stamps"))
        numbers, keys, labels = (cache["numbers"], cache["keys"].tobytes(), cache["labels"].tobytes())
        _check_totals(numbers, columns, keys, labels)
    except (FileNotFoundError, ValueError) as error:
        name = printable(str(file))
        log.warning("cannot read the index %s (%s): all shards are indexed again", name, error)
        return {}
    indices: dict[tuple[str, int, str], Index] = {}
    row = key = label = 0
    for path, stamp, (size, n, n_keys, n_labels) in zip(paths, stamps, numbers.tolist(), strict=False):
        rows = {name: column[row : row + n] for name, column in columns.items()}
        index = Index(
            rows["offsets"],
            rows["lengths"],
            keys[key : key + n_keys],
            rows["key_ends"],
            labels[label : label + n_labels],
            rows["label_ends"],
        )
        if _fits(index, size):
            indices[os.fsdecode(path), size, stamp.decode(errors="replace")] = index
        row, key, label = row + n, key + n_keys, label + n_labels
    return indices


def _check_totals(numbers: np.ndarray, columns: dict[str, np.ndarray], keys: bytes, labels: bytes) -> None:
    """ValueError unless the sizes of all shards add up to those of the columns."""
    kinds = {column.dtype for column in (numbers, *columns.values())}
    if numbers.ndim != 2 or numbers.shape[1] != 4 or kinds != {np.dtype(np.int64)} or (numbers < 0).any():
        raise ValueError("expected int64 columns and four numbers of each shard")
    totals = [int(total) for total in numbers.sum(0)[1:]]
    if any(column.shape != (totals[0],) for column in columns.values()):
        raise ValueError(f"expected columns of {totals[0]} numbers")
    if [len(keys), len(labels)] != totals[1:]:
        raise ValueError(f"expected {totals[1]} bytes of keys and {totals[2]} of labels")


def _fits(index: Index, size: int) -> bool:
    """Whether the index of a shard of `size` bytes points into it, and into its own keys and labels."""
    return bool(
        all(
            (np.diff(ends, prepend=0) >= 0).all() and (ends[-1] if len(ends) else 0) == len(text)
            for ends, text in ((index.key_ends, index.keys), (index.label_ends, index.labels))
        )
        and ((index.offsets >= 0) & (index.offsets <= size)).all()
        and (np.abs(index.lengths) <= size - index.offsets).all()
    )


def _beside(shards: list[Shard]) -> dict[Shard, Index]:
    """What ``index.npz`` in the folder of the shards knows of them; a store's own times are not compared."""
    folder = os.path.dirname(shards[0].path)
    far = remote.is_url(folder)
    try:
        kept = _load(io.BytesIO(remote.read_all(f"{folder}/{INDEX_NAME}")) if far else _existing(folder))
    except (OSError, ImportError):
        return {}
    by_name = {(name, size): (stamp, index) for (name, size, stamp), index in kept.items()}
    known = {}
    for shard in shards:
        stamp, index = by_name.get((os.path.basename(shard.path), shard.size), ("", None))
        if index is not None and (far or stamp == shard.stamp) and os.path.dirname(shard.path) == folder:
            known[shard] = index
    return known


def _existing(folder: str) -> Path:
    file = Path(folder) / INDEX_NAME
    os.stat(file)
    return file


def _join(names: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"\0".join(names), np.uint8)


def _absolute(path: str) -> str:
    return remote.known_as(path) if remote.is_url(path) else os.path.abspath(path)
