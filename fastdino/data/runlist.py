"""The list of images a run began with, kept in its output directory.

A sample is its place in that list. When a file breaks or vanishes during a run, the loader replaces it; when
the run is then resumed, the list must still be the one it began with, or every sample after the missing one
would be another."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np

from fastdino.data.containers import folder_of
from fastdino.data.manifest import Manifest, printable
from fastdino.data.samples import Member, Members, Missing

log = logging.getLogger(__name__)


def names(manifest: Manifest) -> list[str]:
    """Paths relative to the folder of the images or shards: the same wherever the data set is mounted, and
    however its shards are spelled, as a folder or as a pattern."""
    if isinstance(manifest.paths, Members):
        return list(manifest.paths.names(folder_of(manifest.root)))
    folders: dict[str, str] = {}
    return [_name(path, manifest.root, folders) for path in manifest.paths]


def _name(path: str, root: str, folders: dict[str, str]) -> str:
    """``folders`` keeps those of folders relative to ``root``, which cost most."""
    if isinstance(path, Missing):
        return str(path)
    if isinstance(path, Member):
        return f"{os.path.relpath(path.shard.path, folder_of(root))}/{os.fsdecode(path.key)}"
    folder, _, name = path.rpartition("/")
    if not folder or name in ("", ".", ".."):
        return os.path.relpath(path, root)
    if folder not in folders:
        below = os.path.relpath(folder, root)
        folders[folder] = "" if below == "." else f"{below}/"
    return folders[folder] + name


def write(manifest: Manifest) -> str:
    """The list as JSON text."""
    labels = None if manifest.labels is None else manifest.labels.tolist()
    return json.dumps({"names": names(manifest), "labels": labels, "classes": manifest.class_names})


def reconcile(found: Manifest, file: Path) -> Manifest:
    """The manifest of the list in ``file`` if ``found`` is that list with some images missing, else ``found``
    itself.

    Missing images keep their place, with size 0; the loader replaces them by readable ones. New images make
    it another data set: it is returned as found, and resuming tells the difference."""
    saved = json.loads(file.read_text())
    now = names(found)
    if now == saved["names"]:
        return found
    index = {name: i for i, name in enumerate(now)}
    gone = [name for name in saved["names"] if name not in index]
    if not gone or [name for name in saved["names"] if name in index] != now:
        return found
    shown = ", ".join(printable(name) for name in gone[:10])
    log.warning(
        "%d images of this run are missing or unreadable now and will be replaced: %s", len(gone), shown
    )
    sizes = None
    if found.sizes is not None:
        sizes = np.array([found.sizes[index[n]] if n in index else (0, 0) for n in saved["names"]], np.int32)
    paths: list[str]
    if isinstance(found.paths, Members):
        paths = [found.paths[index[name]] if name in index else Missing(name) for name in saved["names"]]
    else:
        paths = [os.path.normpath(os.path.join(found.root, name)) for name in saved["names"]]
    return Manifest(
        paths=paths,
        labels=None if saved["labels"] is None else np.array(saved["labels"], np.int64),
        class_names=saved["classes"],
        root=found.root,
        sizes=sizes,
    )
