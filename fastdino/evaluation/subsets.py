"""Parts of a labelled training set: 1 % or 10 % of it, as in low-shot protocols, or a list of names.

SimCLR's lists (``1percent.txt``, ``10percent.txt``: 12,811 and 128,116 names such as n01440764_10026.JPEG, 12
or 13 and 128 or 129 of a class) are what published figures use, and come as a file. Without one, ``1%`` and
``10%`` make a choice of the same sizes that is ours, not SimCLR's: figures will differ a little from theirs.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from fastdino.data.manifest import Manifest, printable


def subset(manifest: Manifest, choice: str) -> Manifest:
    """The images of ``choice``, a percentage such as ``1%`` or a list file, in the order of the manifest.

    A percentage takes as many images of each class, within one, as ``floor(share * images)`` allows, or all
    of a class that has fewer; at least one each. In a class they are those whose names have the smallest
    SHA-256: a function of the names alone, and every choice contains the smaller ones.

    A list names each image by its file name, or by ``class/name`` where several classes have that file name;
    blank lines do not count. Raises ValueError naming ``--subset`` when the choice is not understood, when
    names are not in the set or not clear, and when the set has no labels; OSError if the file cannot be read.
    """
    if choice.endswith("%"):
        return manifest.subset(_share(manifest, _percentage(choice)))
    return manifest.subset(_listed(manifest, Path(choice)))


def _percentage(choice: str) -> float:
    try:
        percent = float(choice[:-1])
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise ValueError(f"--subset {choice}: expected a percentage above 0 and up to 100, or a file")
    return percent / 100


def _share(manifest: Manifest, share: float) -> np.ndarray:
    """Indices of the images of a percentage."""
    if manifest.labels is None:
        raise ValueError(f"--subset: needs labels, one folder per class, but {manifest.root} has none")
    of_class: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(manifest.labels.tolist()):
        of_class[label].append(i)
    left = max(int(len(manifest) * share + 1e-9), len(of_class))
    chosen: list[int] = []
    # Small classes first: what they cannot give, larger ones do.
    for done, images in enumerate(sorted(of_class.values(), key=len)):
        number = min(len(images), left // (len(of_class) - done))
        left -= number
        chosen += sorted(images, key=lambda i: _rank(manifest, i))[:number]
    return np.sort(np.array(chosen, np.int64))


def _rank(manifest: Manifest, i: int) -> bytes:
    return hashlib.sha256(os.fsencode("/".join(_names(manifest, i)))).digest()


def _names(manifest: Manifest, i: int) -> tuple[str, str]:
    """Class and file name of an image."""
    assert manifest.labels is not None
    return manifest.class_names[manifest.labels[i]], os.path.basename(manifest.paths[i])


def _listed(manifest: Manifest, path: Path) -> np.ndarray:
    """Indices of the images that a file names."""
    if manifest.labels is None:
        raise ValueError(f"--subset: needs labels, one folder per class, but {manifest.root} has none")
    try:
        lines = [line.strip() for line in path.read_bytes().split(b"\n")]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--subset: expected 1%, 10% or a file of names; no such file: {path}"
        ) from None
    wanted = [os.fsdecode(line) for line in lines if line]
    if not wanted:
        raise ValueError(f"--subset: {path} names no image; expected one name per line")
    found: dict[str, list[int]] = defaultdict(list)
    for i in range(len(manifest)):
        label, name = _names(manifest, i)
        found[name].append(i)
        found[f"{label}/{name}"].append(i)
    missing = [name for name in wanted if name not in found]
    if missing:
        some = ", ".join(printable(name) for name in missing[:3])
        raise ValueError(
            f"--subset: {len(missing)} of {len(wanted)} names in {path} are not in {manifest.root}: {some}"
        )
    unclear = [name for name in wanted if len(found[name]) > 1]
    if unclear:
        raise ValueError(
            f"--subset: {path}: {printable(unclear[0])} is the name of {len(found[unclear[0]])} images; "
            "expected class/name"
        )
    return np.unique(np.array([found[name][0] for name in wanted], np.int64))
