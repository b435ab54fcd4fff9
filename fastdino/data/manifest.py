"""Which images are the data set: a list of paths, with labels where the layout has them.

Three layouts of files are understood: a folder of class folders, each searched recursively (the rule of
torchvision's ImageFolder), a flat folder without labels (images lie directly in it; its subfolders are
searched too), and a text file with one path per line. Nothing is opened here except that text file; `prescan`
looks inside the images. Images in containers (WebDataset, TFRecord, RecordIO, LMDB) come from `containers`.

Paths are `str` with undecodable bytes as surrogates (`os.fsencode(path)` gives the bytes back); `printable`
makes them safe to show.
"""

from __future__ import annotations

import logging
import os
import stat
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastdino.data.paths import Files
from fastdino.data.remote import without_secrets
from fastdino.data.samples import Members

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""File name endings taken as images, in any letter case: those of torchvision's ImageFolder."""
_OTHER_PICTURES = frozenset(
    ".heic .heif .avif .gif .jxl .jp2 .psd .dng .cr2 .cr3 .nef .arw .raw .svg".split()
)
log = logging.getLogger(__name__)


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
                if isinstance(self.paths, Members | Files)
                else [self.paths[i] for i in indices]
            ),
            labels=None if self.labels is None else self.labels[indices],
            class_names=self.class_names,
            root=self.root,
            sizes=None if self.sizes is None else self.sizes[indices],
        )


def build_manifest(
    data_path: str | os.PathLike[str], progress: bool = True, without: str | os.PathLike[str] | None = None
) -> Manifest:
    """List the images under `data_path`: class folders, flat folder, text file with one path per line, or
    containers (`containers.build`), whose indexing shows a bar on a terminal if `progress`.

    Class folders: the sorted top-level folders are the classes (an empty one keeps its number, so that a
    training and a validation folder agree). Flat folder: one that holds images directly. Text file: paths
    absolute or relative to the file, optionally followed by a tab and a label. Hidden files, devices, pipes
    and loops of symbolic links are passed over, and so is the folder `without`.

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
    except OSError as error:  # a link to itself, a name too long, a disk that has gone
        raise OSError(error.errno, f"--data_path: {printable(root)}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        return _from_folder(root, without)
    if stat.S_ISREG(mode):
        return _from_list(root)
    raise ValueError(f"--data_path: expected a folder or a file, got a special file: {printable(root)}")


def printable(path: str) -> str:
    """`path` as one line that any terminal or UTF-8 file takes and that tells its bytes: backslashes doubled,
    undecodable bytes ``\\xff``, control characters ``\\n`` or ``\\u202e``. Secrets in URLs are left out.
    """
    return one_line(path.replace("\\", "\\\\"))


def one_line(text: str) -> str:
    """The same of a message, with backslashes as they are."""
    return "".join(c if c.isprintable() else _escaped(c) for c in without_secrets(text))


def _escaped(c: str) -> str:
    if 0xDC80 <= ord(c) <= 0xDCFF:  # how Python holds a byte that is no UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    return f"\\u{ord(c):04x}" if 0x80 <= ord(c) <= 0xFF else c.encode("unicode_escape").decode()


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


# ---------------------------------------------------------------------------------------------------- folders


def _from_folder(root: str, without: str | os.PathLike[str] | None) -> Manifest:
    passed_over: Counter[str] = Counter()
    names, folders, links = _scan(root, passed_over)
    barred = {_identity(root)}
    if without is not None and os.path.isdir(without):
        barred.add(_identity(os.fspath(without)))
    if names:
        passed_over.clear()  # the root is looked at once more
        paths = _walk([root], barred, passed_over)[0]
        _tell_of_pictures(root, passed_over)
        return Manifest(Files.of(paths), None, [], root)

    # A link back to the root is no class, and one deeper down is not entered: it would put every image there.
    folders = sorted(folder for folder in folders + links if _identity(folder) not in barred)
    images = _walk(folders, barred, passed_over)
    paths = [path for of_class in images for path in of_class]
    if not paths:
        raise ValueError(
            f"--data_path: no images in {printable(root)}: found {_describe(len(folders), passed_over)}; "
            f"expected files ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    _tell_of_pictures(root, passed_over)
    _tell_of_splits(root, {os.path.basename(folder) for folder in folders})
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), [len(of_class) for of_class in images])
    return Manifest(Files.of(paths), labels, [os.path.basename(folder) for folder in folders], root)


def _tell_of_pictures(root: str, passed_over: Counter[str]) -> None:
    """Whoever has them expects to train on them; other files are nobody's loss."""
    pictures = {ending: count for ending, count in passed_over.items() if ending in _OTHER_PICTURES}
    if pictures:
        shown = ", ".join(f"{count} x {ending}" for ending, count in sorted(pictures.items()))
        log.warning("%s: passed over %s, which are not read; convert them", printable(root), shown)


def _tell_of_splits(root: str, classes: set[str]) -> None:
    held_out = " and ".join(sorted(classes & {"val", "test"}))
    if held_out and "train" in classes:
        meant = printable(os.path.join(root, "train"))
        log.warning("%s: takes train and %s for classes; was %s meant?", printable(root), held_out, meant)


def _walk(tops: list[str], visited: set[tuple[int, int]], passed_over: Counter[str]) -> list[list[str]]:
    """Image paths under each of `tops`, sorted by folder, then by name. No folder below them is entered
    twice; links to folders are followed when all others are known. `visited` holds (device, inode) of those
    not to enter.
    """
    found: list[dict[str, list[str]]] = [{} for _ in tops]
    visited = visited | set(map(_identity, tops))

    def enters(folder: str) -> bool:
        identity = _identity(folder)
        if identity in visited:
            passed_over["folder reached twice through a symbolic link"] += 1
            return False
        visited.add(identity)
        return True

    pending, links = deque(enumerate(tops)), deque[tuple[int, str]]()
    while pending or links:
        if pending:
            top, folder = pending.popleft()
        else:
            top, folder = links.popleft()
            if not enters(folder):
                continue
        found[top][folder], subfolders, linked = _scan(folder, passed_over)
        pending.extend((top, subfolder) for subfolder in subfolders if enters(subfolder))
        links.extend((top, link) for link in linked)
    return [
        [os.path.join(folder, name) for folder in sorted(of_top) for name in of_top[folder]]
        for of_top in found
    ]


def _scan(folder: str, passed_over: Counter[str]) -> tuple[list[str], list[str], list[str]]:
    """Of one folder: sorted image file names, sorted paths of its subfolders and of its links to folders."""
    # os.path for links because DirEntry raises on one that points at itself; DirEntry for the rest because it
    # needs no stat.
    names: list[str] = []
    subfolders: list[str] = []
    links: list[str] = []
    with _naming(folder), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                passed_over["hidden"] += 1
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else subfolders).append(entry.path)
            elif not _is_image_name(entry.name):
                passed_over[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
            elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                names.append(entry.name)
            else:
                passed_over["broken link" if entry.is_symlink() else "not a regular file"] += 1
    return sorted(names), sorted(subfolders), sorted(links)


def _identity(folder: str) -> tuple[int, int]:
    with _naming(folder):
        status = os.stat(folder)
    return status.st_dev, status.st_ino


@contextmanager
def _naming(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"--data_path: cannot list the folder {printable(folder)}: {error.strerror}"
        raise type(error)(error.errno, reason) from None


def _describe(n_folders: int, passed_over: Counter[str]) -> str:
    seen = ", ".join(f"{count} x {one_line(reason)}" for reason, count in passed_over.most_common(5))
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
    spans = array("q")
    of_name: dict[bytes, int] = {}  # label -> number, as they come
    numbers = array("q")
    for number, (begin, end) in enumerate(_lines(content), start=1):
        if not content[begin:end].strip():
            continue
        tab = content.find(b"\t", begin, end)
        if (tab >= 0) != bool(numbers) and spans:
            raise ValueError(
                f"--data_path: {printable(root)} line {number}: expected a tab and a label on every line "
                f"or on none, got {printable(os.fsdecode(content[begin:end]))}"
            )
        spans.extend((begin, end if tab < 0 else tab))
        if tab >= 0:
            numbers.append(of_name.setdefault(content[tab + 1 : end].strip(), len(of_name)))
    if not spans:
        raise ValueError(
            f"--data_path: expected one image path per line, got an empty list: {printable(root)}"
        )
    paths = Files(content, np.array(spans, np.int64).reshape(-1, 2), os.path.dirname(root))
    if not any(map(os.path.isfile, paths)):
        raise FileNotFoundError(
            f"--data_path: none of the {len(paths)} files in the list {printable(root)} exists; "
            f"the first one was looked for at {printable(os.path.abspath(paths[0]))}"
        )
    if not of_name:
        return Manifest(paths, None, [], root)
    # Numbers sort as numbers, so that "10" follows "9" and labels written as 0..n-1 keep their values.
    names = [os.fsdecode(name) for name in of_name]
    numeric = all(name.isascii() and name.isdigit() for name in names)
    class_names = sorted(names, key=int if numeric else None)
    place = {name: i for i, name in enumerate(class_names)}
    labels = np.array([place[name] for name in names], np.int64)[np.array(numbers, np.int64)]
    return Manifest(paths, labels, class_names, root)


def _lines(content: bytes) -> Iterator[tuple[int, int]]:
    """Where each line begins and ends, without the carriage returns of other systems."""
    begin = 0
    while begin <= len(content):
        end = following = content.find(b"\n", begin)
        if end < 0:
            end = following = len(content)
        while end > begin and content[end - 1] == 13:
            end -= 1
        yield begin, end
        begin = following + 1
