"""Which images are the data set: a list of paths, with labels where the layout has them.

Three layouts of files are understood: a folder of class folders, each searched recursively (the rule of
torchvision's ImageFolder), a flat folder without labels (images lie directly in it; its subfolders are
searched too), and a text file with one path per line. Nothing is opened here except that text file; `prescan`
looks inside the images. Images in containers (WebDataset, TFRecord, RecordIO, LMDB) come from `containers`.

Paths are `str` with undecodable bytes as surrogates (`os.fsencode(path)` gives the bytes back); `printable`
makes them safe to show.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastdino.data.remote import without_secrets
from fastdino.data.samples import Members

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""File name endings taken as images, in any letter case: those of torchvision's ImageFolder."""


@dataclass(frozen=True)
class Manifest:
    """The images of a data set, in a fixed order; a sample's index in it is its identity everywhere else."""

    paths: Sequence[str]
    """One path per image; relative ones are relative to the current directory. `samples.read` reads them:
    those of images in containers are no files."""
    labels: np.ndarray | None
    """int64 [n], indices into `class_names`; None for a data set without labels."""
    class_names: list[str]
    """Sorted class names; empty without labels."""
    root: str
    """The folder, list file, pattern or URL it was built from."""
    sizes: np.ndarray | None = field(default=None, compare=False)
    """int32 [n, 2], height and width in pixels, known after `prescan`."""

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: np.ndarray) -> Manifest:
        """The manifest of the images at `indices` (int [m]), in that order, with the same classes."""
        return Manifest(
            paths=(
                self.paths.select(indices)
                if isinstance(self.paths, Members)
                else [self.paths[i] for i in indices]
            ),
            labels=None if self.labels is None else self.labels[indices],
            class_names=self.class_names,
            root=self.root,
            sizes=None if self.sizes is None else self.sizes[indices],
        )


def build_manifest(data_path: str | os.PathLike[str], progress: bool = True) -> Manifest:
    """List the images under `data_path`: class folders, flat folder, text file with one path per line, or
    containers (`containers.build`), whose indexing shows a bar on a terminal if `progress`.

    Class folders: the sorted top-level folders are the classes (an empty one keeps its number, so that a
    training and a validation folder agree). Flat folder: one that holds images directly. Text file: paths
    absolute or relative to the file, optionally followed by a tab and a label. Hidden files, devices, pipes
    and loops of symbolic links are passed over.

    Raises FileNotFoundError if the path is missing or none of the listed files exists, and ValueError if
    there is no image, both naming ``--data_path`` and what was found there.
    """
    from fastdino.data import containers  # which gives back a Manifest

    root = os.fspath(data_path)
    found = containers.build(root, progress)
    if found is not None:
        return found
    try:
        mode = os.stat(root).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"--data_path: no such file or folder: {printable(root)}") from None
    if stat.S_ISDIR(mode):
        return _from_folder(root)
    if stat.S_ISREG(mode):
        return _from_list(root)
    raise ValueError(f"--data_path: expected a folder or a file, got a special file: {printable(root)}")


def printable(path: str) -> str:
    """`path` as text that any terminal or UTF-8 file takes: undecodable bytes and control characters
    escaped, secrets in URLs left out."""
    text = without_secrets(os.fsencode(path).decode("utf-8", "backslashreplace"))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


# ---------------------------------------------------------------------------------------------------- folders


def _from_folder(root: str) -> Manifest:
    passed_over: Counter[str] = Counter()
    names, folders = _scan(root, passed_over)
    identity = _identity(root)
    if names:
        return Manifest(_walk(root, {identity}, passed_over), None, [], root)

    # A link back to the root is no class, and one deeper down is not entered: it would put every image there.
    folders = [folder for folder in folders if _identity(folder) != identity]
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = _walk(folder, {identity, _identity(folder)}, passed_over)
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise ValueError(
            f"--data_path: no images in {printable(root)}: found {_describe(len(folders), passed_over)}; "
            f"expected files ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    class_names = [os.path.basename(folder) for folder in folders]
    return Manifest(paths, np.asarray(labels, np.int64), class_names, root)


def _walk(top: str, visited: set[tuple[int, int]], passed_over: Counter[str]) -> list[str]:
    """Image paths under `top`, sorted by folder, then by name. `visited` holds (device, inode) of folders not
    to enter."""
    found: dict[str, list[str]] = {}
    pending = [top]
    while pending:
        folder = pending.pop()
        found[folder], subfolders = _scan(folder, passed_over)
        for subfolder in reversed(subfolders):
            identity = _identity(subfolder)
            if identity in visited:
                passed_over["folder reached twice through a symbolic link"] += 1
            else:
                visited.add(identity)
                pending.append(subfolder)
    return [os.path.join(folder, name) for folder in sorted(found) for name in found[folder]]


def _scan(folder: str, passed_over: Counter[str]) -> tuple[list[str], list[str]]:
    """Sorted image file names and sorted paths of the subfolders of one folder."""
    # os.path for links because DirEntry raises on one that points at itself; DirEntry for the rest because it
    # needs no stat.
    names: list[str] = []
    subfolders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                passed_over["hidden"] += 1
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                subfolders.append(entry.path)
            elif not _is_image_name(entry.name):
                passed_over[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
            elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                names.append(entry.name)
            else:
                passed_over["broken link" if entry.is_symlink() else "not a regular file"] += 1
    return sorted(names), sorted(subfolders)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _describe(n_folders: int, passed_over: Counter[str]) -> str:
    seen = ", ".join(f"{count} x {printable(reason)}" for reason, count in passed_over.most_common(5))
    return f"{n_folders} folders and {f'passed over {seen}' if seen else 'no files'}"


# -------------------------------------------------------------------------------------------------- text file


def _from_list(root: str) -> Manifest:
    content = Path(root).read_bytes()
    if _is_image_name(root) or b"\0" in content:
        kind = "an image" if _is_image_name(root) else "a binary file"
        raise ValueError(
            f"--data_path: expected a folder, a text file with one path per line or an uncompressed shard "
            f"(.tar .tfrecord .rec .mdb), got {kind}: {printable(root)}"
        )
    lines = [(number, line.rstrip(b"\r")) for number, line in enumerate(content.split(b"\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ValueError(
            f"--data_path: expected one image path per line, got an empty list: {printable(root)}"
        )

    base = os.path.dirname(root)
    paths: list[str] = []
    names: list[str] = []
    for number, line in lines:
        path, tab, label = line.partition(b"\t")
        if bool(tab) != bool(names) and paths:
            raise ValueError(
                f"--data_path: {printable(root)} line {number}: expected a tab and a label on every line "
                f"or on none, got {printable(os.fsdecode(line))}"
            )
        paths.append(os.path.join(base, os.fsdecode(path)))
        if tab:
            names.append(os.fsdecode(label.strip()))
    if not any(map(os.path.isfile, paths)):
        raise FileNotFoundError(
            f"--data_path: none of the {len(paths)} files in the list {printable(root)} exists; "
            f"the first one was looked for at {printable(os.path.abspath(paths[0]))}"
        )
    if not names:
        return Manifest(paths, None, [], root)
    # Numbers sort as numbers, so that "10" follows "9" and labels written as 0..n-1 keep their values.
    numeric = all(name.isascii() and name.isdigit() for name in names)
    class_names = sorted(set(names), key=int if numeric else None)
    index = {name: i for i, name in enumerate(class_names)}
    return Manifest(paths, np.array([index[name] for name in names], np.int64), class_names, root)
