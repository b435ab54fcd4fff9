"""Data sets in containers: WebDataset, TFRecord, RecordIO and LMDB, on disk or in an object store.

Each shard is indexed once (`indexing`). After that an image in a container is a sample like a file
(`samples`), so shuffling, sharding, resuming and replacing are the same for all of them: every epoch is a
permutation of all images, of which each process gets its own, and any step can be gone back to. The readers
that DALI has for these formats shuffle within a buffer only, and know no image by its number.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastdino.data import indexing, remote
from fastdino.data.formats import tar
from fastdino.data.indexing import Index
from fastdino.data.manifest import IMAGE_SUFFIXES, Manifest, printable
from fastdino.data.samples import Members, Shard, read

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

CLASSES_NAME = "classes.txt"
MAX_SHARDS = 1_000_000
MAX_NAMED_CLASS = 1_000_000
"""Whole numbers below it are class numbers themselves; larger ones are numbered in their order."""


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
    return _manifest(shards, indexing.indices(shards, data_path, progress), data_path)


def kind_of(path: str) -> str | None:
    """The kind of container by the end of its name, None for anything else."""
    name = os.path.basename(path)
    if _TFRECORD_PART.search(name):
        return "tfrecord"
    return ENDINGS.get(os.path.splitext(name)[1].lower())


def folder_of(data_path: str) -> str:
    """The folder that all shards of `data_path` lie under, as far as it tells without looking at them."""
    if os.path.isdir(data_path):
        return data_path
    pattern = None if os.path.exists(data_path) else re.search(r"[*?\[{]", data_path)
    if pattern:
        return os.path.dirname(data_path[: pattern.start()])
    return os.path.dirname(data_path) if kind_of(data_path) else data_path


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
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"--data_path: expected a shard, got no regular file: {printable(path)}")
            return Shard(path, kind, status.st_size, str(status.st_mtime_ns))
        if kind == "lmdb":
            raise ValueError(f"--data_path: {printable(path)}: an LMDB is read from a disk, not by URL")
        return Shard(path, kind, *remote.look_at(path))

    with ThreadPoolExecutor(indexing.THREADS) as pool:
        return list(pool.map(look_at, paths))


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
        content = remote.read_all(file) if remote.is_url(file) else read(file)
    except OSError:
        return []
    return [os.fsdecode(line) for line in content.split(b"\n")][:-1]
