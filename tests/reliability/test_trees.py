"""Folders with loops, pipes and devices in them: listed once, in time, and never waited for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reliability.audit import ROOT, audit, quiet
from reliability.promises import promise

MANY = 10_000


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path, "PNG")
    return path


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(path.parent)  # the address of a socket has little room
        sock.bind(path.name)
        os.chdir(here)


def loops(root: Path) -> None:
    image(root / "a" / "1.jpg")
    image(root / "b" / "c" / "2.jpg")
    link(root / "a" / "itself", ".")
    link(root / "a" / "parent", "..")
    link(root / "a" / "root", root)
    link(root / "b" / "c" / "up", "../..")
    link(root / "a" / "to-b", "../b")
    link(root / "b" / "to-a", "../a")


def ring(root: Path) -> None:
    image(root / "a" / "1.jpg")
    for i in range(50):
        link(root / "a" / f"{i}", f"{(i + 1) % 50}")
        link(root / "a" / f"ring-{i}.jpg", f"ring-{(i + 1) % 50}.jpg")


def special(root: Path) -> None:
    image(root / "a" / "1.jpg")
    pipe(root / "a" / "pipe.jpg")
    pipe(root / "a" / "pipe")
    listening(root / "a" / "socket.jpg")
    for name, target in (
        ("zero", "/dev/zero"),
        ("null", "/dev/null"),
        ("tty", "/dev/tty"),
        ("mem", "/proc/self/mem"),
    ):
        link(root / "a" / f"{name}.jpg", target)
    link(root / "a" / "broken.jpg", "nowhere")
    link(root / "a" / "folder.jpg", ".")
    link(root / "a" / "to-pipe.jpg", "pipe.jpg")


def listed(root: Path) -> None:
    """A list may name anything."""
    special(root / "files")
    names = sorted(path.name for path in (root / "files" / "a").iterdir())
    (root / "list.txt").write_text("".join(f"files/a/{name}\n" for name in names))


def deep(root: Path) -> None:
    image(Path(root, *["d"] * 300, "1.jpg"))


def deeper_than_paths(root: Path) -> None:
    """Whose full name is longer than the kernel takes."""
    image(root / "a" / "1.jpg")
    at = os.open(root / "a", os.O_RDONLY)
    for _ in range(300):
        os.mkdir("a-name-of-twenty-one", dir_fd=at)
        below = os.open("a-name-of-twenty-one", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)


def wide(root: Path) -> None:
    for i in range(MANY // 100):
        (root / f"{i:03}").mkdir(parents=True)
        for j in range(100):
            (root / f"{i:03}" / f"{j:03}.jpg").touch()
        link(root / f"{i:03}" / "next", f"../{(i + 1) % (MANY // 100):03}")


def shards(root: Path, name: str) -> None:
    """A shard beside whose files something waits for ever."""
    root.mkdir(parents=True, exist_ok=True)
    png = image(root.parent / "1.png").read_bytes()
    import io
    import tarfile

    with tarfile.open(root / "a.tar", "w") as file:
        info = tarfile.TarInfo("1.png")
        info.size = len(png)
        file.addfile(info, io.BytesIO(png))
    (pipe if not name.startswith("zero:") else lambda path: link(path, "/dev/zero"))(
        root / name.removeprefix("zero:")
    )


# Where to begin below the tree, and what comes out: names of images, or a part of the error.
Expected = list[str] | str
TREES: dict[str, tuple[Callable[[Path], None], str, Expected]] = {
    "loops": (loops, "", ["a/1.jpg", "b/c/2.jpg"]),
    "ring": (ring, "", ["a/1.jpg"]),
    "special": (special, "", ["a/1.jpg"]),
    "special, flat": (special, "a", ["1.jpg"]),
    "list": (listed, "list.txt", ["files/a/1.jpg"]),
    "deep": (deep, "", ["/".join(["d"] * 300 + ["1.jpg"])]),
    "deeper than paths": (deeper_than_paths, "", "--data_path: cannot list the folder"),
    "only special": (lambda root: pipe(root / "a" / "1.jpg"), "", "--data_path: no images in"),
    "pipe": (lambda root: pipe(root / "pipe"), "pipe", "got a special file"),
    "pipe as a list": (lambda root: pipe(root / "list.txt"), "list.txt", "got a special file"),
    "pipe as a shard": (lambda root: pipe(root / "a.tar"), "a.tar", "got no regular file"),
    "pipe among shards": (lambda root: shards(root, "b.tar"), "", "got no regular file"),
    "zero as a shard": (lambda root: shards(root, "zero:b.tar"), "", "got no regular file"),
    "pipe as a database": (lambda root: pipe(root / "data.mdb"), "data.mdb", "got no regular file"),
    "pipe as names of classes": (lambda root: shards(root, "classes.txt"), "a.tar", ["1.png"]),
    "zero as names of classes": (lambda root: shards(root, "zero:classes.txt"), "a.tar", ["1.png"]),
    "pipe as an index": (lambda root: shards(root, "index.npz"), "a.tar", ["1.png"]),
    "zero as an index": (lambda root: shards(root, "zero:index.npz"), "a.tar", ["1.png"]),
    "itself": (lambda root: link(root / "x", "x"), "x", "--data_path: "),
    "itself as a shard": (lambda root: link(root / "x.tar", "x.tar"), "x.tar", "--data_path: "),
    "name too long": (lambda root: root.mkdir(), "x" * 300, "--data_path: "),
}


def test_every_image_is_listed_once_and_nothing_is_waited_for(tmp_path: Path) -> None:
    image(tmp_path / "warm" / "a" / "1.jpg")
    for name, (make, _, _) in TREES.items():
        make(tmp_path / name)
    wide(tmp_path / "wide")
    outcomes = audit(
        [("list_tree", str(tmp_path / name / below)) for name, (_, below, _) in TREES.items()]
        + [("count_tree", str(tmp_path / "wide"))],
        warm=[
            ("list_tree", str(tmp_path / name))
            for name in ("warm", *["pipe as an index/a.tar"] * 2, "zero as an index/a.tar")
        ],
        writable=f"{tmp_path}/cache/",
        XDG_CACHE_HOME=f"{tmp_path}/cache",
    )
    with promise(21, "folder with loops, pipes, sockets, devices or depths") as cases:
        for (name, (_, _, expected)), outcome in zip(TREES.items(), outcomes, strict=False):
            with cases.case(name):
                quiet(outcome)
                if isinstance(expected, str):
                    assert expected in outcome.error, outcome.error or outcome.result
                else:
                    assert not outcome.error, outcome.error
                    used = [Path(path) for path, reason in outcome.result if not reason]
                    ends = [Path(path) for path in expected]
                    assert [path.parts[-len(end.parts) :] for path, end in zip(used, ends, strict=True)] == [
                        end.parts for end in ends
                    ]
                    reasons = {reason for _, reason in outcome.result} - {"", "empty file"}
                    assert all(reason.startswith("cannot be read: ") for reason in reasons)
        with cases.case(f"{MANY} files and a loop over all folders"):
            wide_one = outcomes[-1]
            quiet(wide_one, seconds=5.0)
            assert wide_one.result == [MANY, MANY]


def test_a_folder_that_may_not_be_listed_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As another user: for root nothing is forbidden."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    root = Path("/tmp") / f"fastdino-unreadable-{os.getpid()}"
    try:
        image(root / "a" / "1.jpg")
        image(root / "b" / "2.jpg")
        (root / "b").chmod(0)
        program = """
import sys
sys.path.insert(0, sys.argv[1])
from fastdino.data import containers
from fastdino.data.manifest import build_manifest
import os
os.setuid(65534)
build_manifest(sys.argv[2])
"""
        done = subprocess.run(
            [sys.executable, "-c", program, str(ROOT), str(root)], capture_output=True, text=True
        )
        with promise(21, "folder that may not be listed is named") as cases, cases.case(str(root)):
            assert f"PermissionError: [Errno 13] --data_path: cannot list the folder {root}/b" in done.stderr
    finally:
        (root / "b").chmod(0o700)
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        root.rmdir()
