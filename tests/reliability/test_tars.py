"""Tar files made to write elsewhere, to run code or to fill memory: indexed and read, they do none of it."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reliability.audit import audit, quiet
from reliability.promises import promise


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
        buffer, "JPEG"
    )
    return buffer.getvalue()


JPEG = jpeg()
END = bytes(1024)


def tar(*members: tuple[Any, ...], format: int = tarfile.PAX_FORMAT) -> bytes:
    """Members of (name, content), or (name, content, attributes of TarInfo)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as file:
        for name, content, *more in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for attribute, value in (more[0] if more else {}).items():
                setattr(info, attribute, value)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(name: bytes, kind: bytes, size: int | bytes, rest: bytes = b"") -> bytes:
    """A block with a checksum that holds; ``rest`` goes where a name's prefix or a sparse map stands."""
    block = bytearray(512)
    block[:100] = name[:100].ljust(100, b"\0")
    block[100:108] = b"0000644\0"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000" if not rest else b"ustar  \0"
    block[345 : 345 + len(rest)] = rest
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(body) + len(str(len(body) + 1))
        lines += str(length).encode() + body if len(str(length)) + len(body) == length else b""
        if not lines.endswith(body):
            lines += str(length + 1).encode() + body
    return header(b"pax", b"x", len(lines)) + padded(lines)


def sparse(**records: str) -> bytes:
    return pax(**{f"GNU__sparse__{key}": value for key, value in records.items()})


def member(name: bytes = b"0.jpg", content: bytes = JPEG) -> bytes:
    return header(name, b"0", len(content)) + padded(content)


LINK, HARD, DEVICE, FIFO = (
    {"type": kind} for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
)


def link(kind: dict[str, Any], target: str) -> dict[str, Any]:
    return kind | {"linkname": target}


class Shell:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch touched-by-a-hostile-file",)


PICKLE = pickle.dumps(Shell())
GOOD = ("0.jpg", JPEG)
# Content, and the number of images that are found; None where the shard is damaged.
TARS: dict[str, tuple[bytes, int | None]] = {
    "up": (tar(("../../../../up.jpg", JPEG), GOOD), 2),
    "absolute": (tar(("/tmp/absolute.jpg", JPEG), GOOD), 2),
    "home": (tar(("~/.ssh/authorized_keys.jpg", JPEG), GOOD), 2),
    "many-ups": (tar(("a/" * 50 + "../" * 80 + "x.jpg", JPEG), GOOD), 2),
    "backslashes": (tar(("..\\..\\x.jpg", JPEG), ("C:\\x.jpg", JPEG)), 1),
    "link": (tar(("a.jpg", b"", link(LINK, "/etc/passwd")), GOOD), 1),
    "link-folder-then-file": (tar(("d", b"", link(LINK, "/tmp")), ("d/x.jpg", JPEG), GOOD), 2),
    "hard-link": (tar(("a.jpg", b"", link(HARD, "/etc/shadow")), GOOD), 1),
    "hard-link-with-data": (header(b"a.jpg", b"1", len(JPEG)) + padded(JPEG) + member() + END, None),
    "chain-2025-4517": (
        tar(
            ("d" * 200, b"", {"type": tarfile.DIRTYPE}),
            ("a", b"", link(LINK, "d" * 200)),
            ("a/b", b"", link(LINK, "../" * 60)),
            ("a/b/etc/x.jpg", b"", link(HARD, "a/b/../../etc/passwd")),
            ("a/b/x.jpg", JPEG),
        ),
        1,
    ),
    "chain-of-links": (tar(*[(f"{i}.jpg", b"", link(LINK, f"{i + 1}.jpg")) for i in range(200)], GOOD), 1),
    "itself": (tar(("a.jpg", b"", link(LINK, "a.jpg")), ("b.jpg", b"", link(HARD, "b.jpg")), GOOD), 1),
    "device": (tar(("zero.jpg", b"", DEVICE | {"devmajor": 1, "devminor": 5}), GOOD), 1),
    "fifo": (tar(("pipe.jpg", b"", FIFO), GOOD), 1),
    "setuid": (tar(("a.jpg", JPEG, {"mode": 0o6777, "uid": 0})), 1),
    "pickle": (tar(("0.pkl", PICKLE), ("0.pyd", PICKLE), ("0.pth", PICKLE), ("0.pickle", PICKLE), GOOD), 1),
    "pickle-as-image": (tar(("0.jpg", PICKLE), ("1.jpg", JPEG)), 2),
    "pickle-as-label": (tar(GOOD, ("0.cls", PICKLE)), 1),
    "code-as-json": (tar(GOOD, ("0.json", b'{"__class__": "os.system", "label": [1]}')), 1),
    "nested-json": (tar(GOOD, ("0.json", b"[" * 100_000)), None),
    "twice": (tar(GOOD, GOOD, GOOD), 3),
    "gzip-bomb": (gzip.compress(tar(GOOD) + bytes(64 << 20)), None),
    "cut": (tar(("0.jpg", JPEG * 9))[:2000], None),
    "name-of-1-MB": (tar(("x" * 1_000_000 + ".jpg", JPEG), GOOD), 2),
    "name-of-2-MB": (tar(("x" * 2_000_000 + ".jpg", JPEG), GOOD), None),
    "long-name-claims": (header(b"L", b"L", 1 << 30) + END, None),
    "chained-pax": (pax(comment="x") * 5_000 + member() + END, None),
    "chained-long-names": ((header(b"L", b"L", 8) + padded(b"a.jpg\0")) * 5_000 + member() + END, None),
    "pax-size": (pax(size="9" * 18) + member() + END, None),
    "pax-digits": (pax(size="9" * 10_000) + member() + END, None),
    "pax-negative": (pax(size="-512") + member() + END, None),
    "pax-garbage": (header(b"x", b"x", 600) + padded(b"\xff" * 600) + member() + END, 1),
    "sparse-1.0-without-end": (
        sparse(major="1", minor="0", name="a.jpg", realsize="9")
        + header(b"a", b"0", 1024) + padded(b"999999999\n" * 100),
        None,
    ),
    "sparse-1.0-of-many": (
        sparse(major="1", minor="0", name="a.jpg", realsize="9")
        + header(b"a", b"0", 8 << 20) + b"9999999\n" + b"0\n" * (4 << 20) + END,
        None,
    ),
    "sparse-0.1": (sparse(map="x,y,z", size="9") + member() + END, None),
    "sparse-0.0": (sparse(offset="-", numbytes="y", size="9") + member() + END, 0),
    "sparse-old": (
        header(b"a.jpg", b"S", 512, bytes(41) + b"00000001000\0" * 8 + b"\1" * 14) + bytes(512),
        None,
    ),
    "sparse-old-endless": (header(b"a.jpg", b"S", 0, b"\0" * 137 + b"\1" + b"0" * 12) + b"\1" * 3000, None),
    "negative": (header(b"a.jpg", b"0", b"\xff" * 12) + END, None),
    "base-256": (header(b"a.jpg", b"0", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7) + END, None),
    "bad-utf-8": (member(b"\xff\xfe\n\x1b[31m.jpg") + END, 1),
    "checksum": (bytes(512 - 1) + b"x" + END, None),
    "polyglot": (b"PK\3\4" + tar(GOOD), None),
}  # fmt: skip


def test_tars_write_nothing_and_run_nothing(tmp_path: Path) -> None:
    cache, shards = tmp_path / "cache", tmp_path / "shards"
    shards.mkdir()
    for name, (content, _) in {"warm": (tar(GOOD), 1), **TARS}.items():
        (shards / f"{name}.tar").write_bytes(content)
    before = everything(tmp_path)
    outcomes = audit(
        [("read_shards", str(shards / f"{name}.tar")) for name in TARS],
        warm=[("read_shards", str(shards / f"{name}.tar")) for name in ("warm", "warm", "cut")],
        writable=f"{cache}/",
        XDG_CACHE_HOME=str(cache),
    )
    with promise(29, "hostile tar indexed and read: nothing run, nothing written but the index") as cases:
        for (name, (content, images)), outcome in zip(TARS.items(), outcomes, strict=True):
            with cases.case(name):
                quiet(outcome, memory=2 * len(content) + (64 << 20))
                if images == 0:
                    assert outcome.error.startswith("ValueError: --data_path: no images in the 1 shards")
                elif images is None:
                    assert outcome.error.startswith("Malformed: --data_path: "), (
                        outcome.error or outcome.result
                    )
                    assert f"{name}.tar: offset" in outcome.error and "expected" in outcome.error
                else:
                    assert not outcome.error and len(outcome.result) == images, outcome
    assert {path for path in everything(tmp_path) - before if cache not in path.parents} <= {cache}
    assert not Path("touched-by-a-hostile-file").exists()


def everything(root: Path, is_there: Callable[[Path], bool] = Path.exists) -> set[Path]:
    return {path for path in root.rglob("*") if is_there(path)}
