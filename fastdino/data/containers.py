"""Data sets in containers: WebDataset, TFRecord, RecordIO and LMDB, on disk or in an object store.

Each shard is indexed once: where every image's bytes lie, its key and its label. After that an image in a
container is a sample like a file (`samples`), so shuffling, sharding, resuming and replacing are the same for
all of them. The index is kept per user (``$XDG_CACHE_HOME/fastdino``, else ``~/.cache/fastdino``) by path,
size and modification time; ``index.npz`` beside the shards, which ``python -m fastdino.data.pack`` writes, is
taken as well.
"""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdino.data import remote, samples
from fastdino.data.formats import lmdb_file, recordio, tar, tfrecord
from fastdino.data.formats.window import Entry, Malformed, Window
from fastdino.data.manifest import IMAGE_SUFFIXES, Manifest, printable
from fastdino.data.progress import track
from fastdino.data.samples import Members, Shard

ENDINGS = {
    ".tar": "tar",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
    ".rec": "recordio",
    ".mdb": "lmdb",
}
_TFRECORD_PART = re.compile(r"-\d{5}-of-\d{5}$")
_SPLITS = ("train", "val", "validation", "test")
_WILDCARDS = "*?["

INDEX_NAME, CLASSES_NAME = "index.npz", "classes.txt"
MAX_SHARDS = 1_000_000
MAX_NAMED_CLASS = 1_000_000
"""Whole numbers below it are class numbers themselves; larger ones are numbered in their order."""
_LOCAL_BLOCK, _REMOTE_BLOCK = 1 << 12, 1 << 22  # bytes read at once while indexing
_THREADS = 8

log = logging.getLogger(__name__)


def build(data_path: str, progress: bool = True) -> Manifest | None:
    """The manifest of the containers that `data_path` names, None if it names something else.

    One shard, a folder of shards, a pattern with ``{000..099}``, ``{a,b}``, ``*`` or ``?``, an LMDB folder,
    and each of them, LMDB aside, as a URL. Raises FileNotFoundError, ValueError (Malformed for a damaged
    container) and OSError, which name ``--data_path`` and the shard.
    """
    found = find(data_path)
    if found is None:
        return None
    kind, paths = found
    shards = _look_at(paths, kind)
    return _manifest(shards, _indices(shards, data_path, progress), data_path)


def kind_of(path: str) -> str | None:
    """The kind of container by the end of its name, None for anything else."""
    name = os.path.basename(path)
    if _TFRECORD_PART.search(name):
        return "tfrecord"
    return ENDINGS.get(os.path.splitext(name)[1].lower())


# --------------------------------------------------------------------------------------------- finding shards


def find(data_path: str) -> tuple[str, list[str]] | None:
    """Kind and paths of the shards that `data_path` names, None if it names no container."""
    if remote.is_url(data_path):
        paths = list(_expand(data_path))
        if paths == [data_path] and (any(c in data_path for c in _WILDCARDS) or not kind_of(data_path)):
            paths = [path for path in remote.listing(data_path) if kind_of(path)]
        return _one_kind(paths, data_path)
    if os.path.isdir(data_path):
        return _in_folder(data_path)
    if os.path.exists(data_path):
        kind = kind_of(data_path)
        return (kind, [data_path]) if kind else None
    paths = list(_expand(data_path))
    if any(c in data_path for c in _WILDCARDS):
        paths = sorted(found for path in paths for found in glob.glob(path))
    elif paths == [data_path]:
        return None
    missing = [path for path in paths if not os.path.exists(path)]
    if missing or not paths:
        example = printable(missing[0] if missing else data_path)
        raise FileNotFoundError(
            f"--data_path: {len(missing)} of the {len(paths)} shards of {printable(data_path)} are missing; "
            f"the first one was looked for at {example}"
        )
    return _one_kind(paths, data_path)


def _in_folder(folder: str) -> tuple[str, list[str]] | None:
    """Shards that lie directly in a folder, which then holds neither images nor folders."""
    if os.path.isfile(os.path.join(folder, "data.mdb")):
        return "lmdb", [os.path.join(folder, "data.mdb")]
    paths = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir() or entry.name.lower().endswith(IMAGE_SUFFIXES):
                return None
            if kind_of(entry.name):
                paths.append(entry.path)
    return _one_kind(sorted(paths), folder) if paths else None


def _one_kind(paths: list[str], data_path: str) -> tuple[str, list[str]]:
    kinds = {kind_of(path) for path in paths}
    shown = printable(data_path)
    if len(kinds) != 1 or None in kinds:
        found = ", ".join(sorted(str(kind or "other files") for kind in kinds)) or "nothing"
        raise ValueError(
            f"--data_path: {shown}: expected shards of one kind ({' '.join(ENDINGS)} or -00000-of-00100), "
            f"found {found}"
        )
    splits = {split for path in paths for split in [_split(path)] if split}
    if len(splits) > 1:
        raise ValueError(
            f"--data_path: {shown} holds shards of {', '.join(sorted(splits))}: expected one of them, as a "
            "pattern such as train-*"
        )
    return str(kinds.pop()), paths


def _split(path: str) -> str | None:
    words = re.split(r"[^a-z]+", os.path.basename(path).lower())
    return next((split for split in _SPLITS if split in words), None)


def _expand(pattern: str) -> Iterator[str]:
    """``a{0..2}b`` and ``a{x,y}b`` written out; at most `MAX_SHARDS`."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    numbers = match and re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if match is None or not (numbers or "," in match[1]):
        yield pattern
        return
    if numbers:
        first, last = numbers[1], numbers[2]
        count = int(last) - int(first) + 1
        if not 0 < count <= MAX_SHARDS:
            raise ValueError(
                f"--data_path: expected 1 to {MAX_SHARDS} shards, got {count} from {{{match[1]}}}"
            )
        words: Iterable[str] = (f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
    else:
        words = match[1].split(",")
    total = 0
    for word in words:
        for path in _expand(pattern[: match.start()] + word + pattern[match.end() :]):
            total += 1
            if total > MAX_SHARDS:
                raise ValueError(f"--data_path: expected at most {MAX_SHARDS} shards in {printable(pattern)}")
            yield path


def _look_at(paths: list[str], kind: str) -> list[Shard]:
    def look_at(path: str) -> Shard:
        if not remote.is_url(path):
            status = os.stat(path)
            return Shard(path, kind, status.st_size, str(status.st_mtime_ns))
        if kind == "lmdb":
            raise ValueError(f"--data_path: {printable(path)}: an LMDB is read from a disk, not by URL")
        return Shard(path, kind, *remote.look_at(path))

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(look_at, paths))


# --------------------------------------------------------------------------------------------------- indexing


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
        raise Malformed(f"--data_path: {printable(str(error))}") from error
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
            window, recordio.read_idx(listing, Path(listing).read_bytes()) if known else None
        )
    else:
        yield from (tar if shard.kind == "tar" else tfrecord).index(window)


def _indices(shards: list[Shard], data_path: str, progress: bool) -> list[Index]:
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
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="index") as pool:
                try:
                    indices = track(pool.map(index_shard, unknown), len(unknown), progress, "indexing shards")
                    for shard, index in zip(unknown, indices, strict=True):
                        known[shard] = index
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
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
        for field in ("offsets", "lengths", "key_ends", "label_ends")
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
        with np.load(file, allow_pickle=False) as cache:
            columns = {name: cache[name] for name in ("offsets", "lengths", "key_ends", "label_ends")}
            paths, stamps = (cache[name].tobytes().split(b"\0") for name in ("shards", "stamps"))
            numbers, keys, labels = (cache["numbers"], cache["keys"].tobytes(), cache["labels"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("cannot read the index %s (%s): all shards are indexed again", file, error)
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
        indices[os.fsdecode(path), size, stamp.decode()] = index
        row, key, label = row + n, key + n_keys, label + n_labels
    return indices


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
    return path if remote.is_url(path) else os.path.abspath(path)


# --------------------------------------------------------------------------------------------------- manifest


def _manifest(shards: list[Shard], indices: list[Index], data_path: str) -> Manifest:
    counts = [len(index.offsets) for index in indices]
    if not sum(counts):
        expected = {"tar": "members ending in " + " ".join(tar.ENDINGS), "lmdb": "encoded images as values"}
        raise ValueError(
            f"--data_path: no images in the {len(shards)} shards of {printable(data_path)}; expected "
            f"{expected.get(shards[0].kind, 'records with images')}"
        )
    members = Members(
        shards,
        np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        np.concatenate([index.offsets for index in indices]),
        np.concatenate([index.lengths for index in indices]),
        b"".join(index.keys for index in indices),
        _spans([index.key_ends for index in indices]),
    )
    labels, names = _labels(members, indices, _class_names(shards[0].path))
    return Manifest(members, labels, names, data_path)


def _spans(ends: list[np.ndarray]) -> np.ndarray:
    """Where each of the joined strings begins and ends: int64 [n, 2]."""
    moved, base = [], 0
    for of_shard in ends:
        moved.append(of_shard + base)
        base += int(of_shard[-1]) if len(of_shard) else 0
    all_ends = np.concatenate(moved)
    return np.stack([np.concatenate([[0], all_ends[:-1]]), all_ends], 1)


def _labels(members: Members, indices: list[Index], known: list[str]) -> tuple[np.ndarray | None, list[str]]:
    """int64 [n] and the class names; None without labels. Raises ValueError if only some images have one."""
    blob = b"".join(index.labels for index in indices)
    spans = _spans([index.label_ends for index in indices])
    without = np.flatnonzero(spans[:, 0] == spans[:, 1])
    if len(without) == len(spans):
        return None, []
    if len(without):
        raise ValueError(
            f"--data_path: expected a label for every image or for none, got none for "
            f"{printable(members[int(without[0])])} and {len(without) - 1} others of {len(spans)}"
        )
    texts = [blob[begin:end] for begin, end in spans.tolist()]
    classes = set(texts)
    if all(re.fullmatch(rb"\d{1,18}", text) for text in classes):
        values = np.array([int(text) for text in texts], np.int64)
        if values.max() < max(MAX_NAMED_CLASS, len(known)):
            # Numbers keep their values, so that two sets of shards agree; unused ones name empty classes.
            n = max(int(values.max()) + 1, len(known))
            return values, known + [str(i) for i in range(len(known), n)]
    numeric = all(re.fullmatch(rb"-?\d{1,18}", text) for text in classes)
    ordered = sorted(classes, key=int if numeric else None)
    index = {text: i for i, text in enumerate(ordered)}
    return np.array([index[text] for text in texts], np.int64), [os.fsdecode(text) for text in ordered]


def _class_names(shard: str) -> list[str]:
    """The lines of ``classes.txt`` beside the shards, names of class 0, 1, ...; empty without it."""
    file = f"{os.path.dirname(shard)}/{CLASSES_NAME}" if os.path.dirname(shard) else CLASSES_NAME
    try:
        content = remote.read_all(file) if remote.is_url(file) else Path(file).read_bytes()
    except OSError:
        return []
    return [os.fsdecode(line) for line in content.split(b"\n")][:-1]
