"""Files that would run code or fill the memory of who reads them: refused by name, at once, at no cost."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from reliability.audit import Outcome, audit, quiet, refused
from reliability.promises import promise

MARKER = "touched-by-a-hostile-file"


class Hostile(NamedTuple):
    """A file, the piece of the product that gets it, and what its message has to say."""

    piece: str
    name: str
    content: bytes
    words: str = ""


# -------------------------------------------------------------------------------------------- building blocks


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def whole(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def many(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(name: str, *arguments: bytes) -> bytes:
    """A call of "module name"."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n" + many(*arguments) + b"R"


def dictionary(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."


def tensor(numbers: int, shape: list[int], strides: list[int], rebuild: str = "_rebuild_tensor_v2") -> bytes:
    """A float tensor over the storage "0", which is said to hold ``numbers``."""
    storage = many(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), whole(numbers)) + b"Q"
    sizes = many(*map(whole, shape)), many(*map(whole, strides))
    return call(
        f"torch._utils {rebuild}", storage, whole(0), *sizes, b"\x89", b"ccollections\nOrderedDict\n)R"
    )


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def pth(content: bytes, storage: bytes = bytes(16), **more: Any) -> bytes:
    """What torch.save writes since PyTorch 1.6."""
    members = {
        "a/data.pkl": content,
        "a/byteorder": b"little",
        "a/data/0": storage,
        "a/version": b"3\n",
    }
    return archive(members | more.pop("members", {}), **more)


GOOD = dictionary(w=tensor(4, [4], [1]))
SHELL = f"touch {MARKER}"
CALLS = {
    "posix system": [text(SHELL)],
    "builtins exec": [text(f"open({MARKER!r}, 'w')")],
    "builtins eval": [text(f"open({MARKER!r}, 'w')")],
    "io open": [text(MARKER), text("w")],
    "subprocess Popen": [many(text("touch"), text(MARKER))],
    "builtins getattr": [text("os"), text("system")],
    "importlib import_module": [text("antigravity")],
    "runpy run_path": [text(MARKER)],
    "torch load": [text(MARKER)],
    "torch.hub load": [text("a/b"), text("c")],
    "numpy load": [text(MARKER)],
    "shutil rmtree": [text(MARKER)],
    "socket create_connection": [many(text("127.0.0.1"), whole(9))],
}


def swapped_directory() -> bytes:
    """An archive with two tables of contents: zipfile reads the one before the end, torch the one that the
    end points to.
    """
    harmless, evil = pth(GOOD), pth(dictionary(w=call("builtins bytearray", whole(1 << 30))))

    def parts(data: bytes) -> tuple[bytes, bytes]:
        size, start = struct.unpack("<II", data[-10:-2])
        return data[:start], data[start : start + size]

    (files, table), (evil_files, evil_table) = parts(harmless), parts(evil)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 4, 4, len(evil_table), len(evil_files), 0)
    return evil_files + evil_table + files + table[: len(evil_table)].ljust(len(evil_table), b"\0") + end


def overlapping() -> bytes:
    """An archive whose table lists one member of a megabyte two hundred times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in {"a/data.pkl": GOOD, "a/data/0": bytes(1 << 20)}.items():
            file.writestr(name, content)
        again = [file.getinfo("a/data/0") for _ in range(200)]
        file.filelist += again
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------- the files


def weights() -> Iterator[Hostile]:
    """Foreign ``.pth`` files."""
    for name, arguments in CALLS.items():
        words = name.replace(" ", ".")
        yield Hostile("read_pth", f"{words}.pth", pth(dictionary(w=call(name, *arguments))), words)
        yield Hostile(
            "read_pth", f"old-{words}.pth", b"\x80\x02" + call(name, *arguments) + b".", "refused, it wants"
        )
    doubled = [b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(28)]  # each holds the one before twice
    shapes = {
        "zero-strides": tensor(4, [10**9], [0]),
        "bytearray": call("builtins bytearray", whole(1 << 30)),
        "storage": call("torch.storage UntypedStorage", whole(1 << 33)),
        "uninitialised": call("torch FloatTensor", whole(1 << 31)),
        "meta": call(
            "torch._utils _rebuild_meta_tensor_no_storage",
            b"ctorch\nfloat32\n", many(whole(10**12)), many(whole(1)), b"\x89",
        ),
        "sparse": call("torch._utils _rebuild_sparse_tensor", whole(0), many()),
        "subclass": call("torch._tensor _rebuild_from_type_v2", b"cposix\nsystem\n", b"N", many(), b"N"),
        "aliases": many(b"]q\0", *doubled),
        "nested": b"]" * 200 + b"a" * 199,
        "calls": many(b"ccollections\nOrderedDict\n)Rq\5", *[b"ccollections\nCounter\n)R"] * 50_001),
    }  # fmt: skip
    for name, content in shapes.items():
        yield Hostile("read_pth", f"{name}.pth", pth(dictionary(w=content)), "refused")
    yield Hostile("read_pth", "claims.pth", pth(dictionary(w=tensor(10**9, [10**9], [1]))))
    yield Hostile("read_pth", "negative.pth", pth(dictionary(w=tensor(4, [4], [-1]))))
    yield Hostile("read_pth", "outside.pth", pth(dictionary(w=tensor(4, [4, 9], [9, 1]))))
    bomb = pth(
        dictionary(w=tensor(1 << 25, [1 << 25], [1])), bytes(1 << 27), compression=zipfile.ZIP_DEFLATED
    )
    yield Hostile("read_pth", "deflated.pth", bomb, "not compressed")
    yield Hostile("read_features", "deflated-features.pth", bomb, "not compressed")
    yield Hostile(
        "read_features", "system-features.pth", pth(dictionary(w=call("posix system", text(SHELL))))
    )
    script = {"a/constants.pkl": b"\x80\x02}.", "a/code/__torch__.py": b"import os"}
    yield Hostile("read_pth", "torchscript.pth", pth(GOOD, members=script), "one pickle")
    yield Hostile("read_pth", "overlapping.pth", overlapping(), "claim more bytes")
    yield Hostile("read_pth", "two-directories.pth", swapped_directory())
    yield Hostile("read_pth", "seven-zip.pth", b"7z\xbc\xaf\x27\x1c" + pickle.dumps({"w": 1}))
    yield Hostile("read_pth", "memo.pth", b"\x80\x02}r\xff\xff\xff\x3f.")
    yield Hostile(
        "read_pth", "protocol4.pth", b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text(SHELL) + b"\x85R."
    )
    yield Hostile("read_pth", "long-text.pth", b"\x80\x02X\xff\xff\xff\x7fabc.")
    objects = io.BytesIO()
    np.save(objects, np.array([Shell()], object), allow_pickle=True)
    yield Hostile("load_backbone", "objects.pth", objects.getvalue())
    for name in (".metadata", "model.pt", "__0_0.distcp"):  # what PyTorch's sharded checkpoints hold
        yield Hostile("load_directory", f"dcp-{name}/{name}", pickle.dumps(Shell()))
    header = b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    yield Hostile("load_backbone", "claims.safetensors", struct.pack("<Q", len(header)) + header + bytes(64))
    yield Hostile("load_backbone", "header.safetensors", struct.pack("<Q", 1 << 40) + b'{"w":{}}' + bytes(64))


class Shell:
    """Pickles as a call of the shell."""

    def __reduce__(self) -> Any:
        return os.system, (SHELL,)


def truths() -> Iterator[Hostile]:
    """Ground truth of the retrieval benchmarks: pickles, and JSON."""
    for name in ("posix system", "builtins eval", "builtins getattr", "numpy load"):
        content = b"\x80\x02" + call(name, *CALLS[name]) + b"."
        yield Hostile("read_truth", f"{name}.pkl", content, name.replace(" ", "."))
    yield Hostile("read_truth", "inst.pkl", b"(S'" + SHELL.encode() + b"'\niposix\nsystem\n.")
    yield Hostile("read_truth", "extension.pkl", b"\x80\x02\x82\x01)R.")
    yield Hostile("read_truth", "memo.pkl", b"\x80\x02}r\xff\xff\xff\x07.")
    yield Hostile("read_truth", "bytes.pkl", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.")
    yield Hostile("read_truth", "frame.pkl", b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b".")
    yield Hostile("read_truth", "digits.pkl", b"L" + b"9" * 1_000_000 + b"L\n.")
    yield Hostile("read_truth", "nested.pkl", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    array = call("numpy dtype", text("O8")) + b"."
    yield Hostile("read_truth", "objects.pkl", b"\x80\x02" + array)
    state = b"cnumpy\nndarray\n}(" + text("_function") + b"cnumpy\nndarray\nub."
    yield Hostile("read_truth", "changes-function.pkl", b"\x80\x02" + state)
    yield Hostile("read_truth", "nested.json", b"[" * 100_000)
    yield Hostile("read_truth", "digits.json", b'{"gnd": ' + b"9" * 100_000 + b"}")


def configs() -> Iterator[Hostile]:
    """Files for ``--config``."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    files = {
        "aliases": (bomb, "no anchors"),
        "itself": ("lr: &a [*a]\n", "no anchors"),
        "apply": (f"lr: !!python/object/apply:os.system ['{SHELL}']\n", "no tags"),
        "name": ("lr: !!python/name:os.system\n", "no tags"),
        "module": ("!!python/module:antigravity\n", "no tags"),
        "binary": ("lr: !!binary aGVsbG8=\n", "no tags"),
        "twice": ("lr: 1\nepochs: 2\nlr: 3\n", "every name once"),
        "twice-in-sections": ("lr: 1\noptim: {lr: 2}\n", "--lr: expected one value"),
        "deep": ("lr: " + "[" * 30_000, "at most 16"),
        "deep-block": ("\n".join(" " * i + "a:" for i in range(300)), "at most 16"),
        "merge": ("<<: {lr: 1}\n", "--<<"),
        "lists-as-names": ("? [lr]\n: 1\n", "expected a name"),
        "target": ("_target_: os.system\n", "--_target_: unknown flag"),
        "octal": ("epochs: 0x10\n", "--epochs: expected an integer"),
        "minutes": ("epochs: 1:30\n", "--epochs: expected an integer"),
        "digits": ("epochs: " + "9" * 60_000 + "\n", "--epochs: expected"),
        "large": ("lr: 1\n" * 300_000, "at most 65,536"),
        "null": ("lr: \0\n", "not YAML"),
    }
    for name, (content, words) in files.items():
        yield Hostile("read_config", f"{name}.yaml", content.encode(), words)
    yield Hostile("read_config", "bytes.yaml", b"lr: \xff\xfe\n", "not YAML")
    yield Hostile("read_config", "pickle.yaml", pickle.dumps(Shell()), "not YAML")


def npz(columns: dict[str, np.ndarray], save: Any = np.savez) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **columns)
    return buffer.getvalue()


def as_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


VERDICTS = {
    "paths": as_bytes(b"/a.jpg"),
    "stamps": np.array([[1, 1]]),
    "sizes": np.array([[8, 8]], np.int32),
    "reasons": as_bytes(b""),
}
INDEX = {
    "shards": as_bytes(b"a.tar"),
    "stamps": as_bytes(b"0"),
    "numbers": np.array([[1024, 1, 5, 1]]),
    "keys": as_bytes(b"0.jpg"),
    "labels": as_bytes(b"3"),
    "offsets": np.array([512]),
    "lengths": np.array([100]),
    "key_ends": np.array([5]),
    "label_ends": np.array([1]),
}


def claimed(columns: dict[str, np.ndarray]) -> bytes:
    """The columns, of which one has a header of an array of 64 GiB."""
    members = {}
    with zipfile.ZipFile(io.BytesIO(npz(columns))) as file:
        for name in file.namelist():
            members[name] = file.read(name)
    header = io.BytesIO()
    facts = {"descr": "<i8", "fortran_order": False, "shape": (1 << 33,)}
    np.lib.format.write_array_header_1_0(header, facts)
    return archive(members | {"stamps.npy": header.getvalue() + bytes(64)})


def arrays() -> Iterator[Hostile]:
    """``index.npz`` beside shards, which comes with a data set, and ``prescan.npz`` in a run folder."""
    objects = np.empty(1, object)
    objects[0] = Shell()
    zeros = np.zeros(1 << 24)
    for piece, columns, folder in (("read_index", INDEX, True), ("read_verdicts", VERDICTS, False)):
        files = {
            "objects": npz(columns | {"stamps": objects}),
            "deflated": npz(columns | {"stamps": zeros}, np.savez_compressed),
            "pickle": pickle.dumps(Shell()),
            "npy": b"\x93NUMPY\1\0v\0" + b"{'descr': '|O', 'fortran_order': False, 'shape': ()}",
            "missing": npz({"stamps": columns["stamps"]}),
            "claims": claimed(columns),
            "cut": npz(columns)[:-30],
            "garbage": b"PK\3\4" + bytes(range(256)),
        }
        for name, content in files.items():
            yield Hostile(piece, f"{name}-{piece}/index.npz" if folder else f"{name}.npz", content)
    changes: dict[str, dict[str, Any]] = {
        "before": {"offsets": np.array([-512])},
        "beyond": {"offsets": np.array([1 << 60])},
        "long": {"lengths": np.array([1 << 40])},
        "keys": {"key_ends": np.array([1 << 40])},
        "backwards": {"label_ends": np.array([-1])},
        "numbers": {"numbers": np.array([[1024, -1, 5, 1]])},
        "more": {"numbers": np.array([[1024, 1 << 40, 5, 1]])},
        "floats": {"offsets": np.array([np.nan])},
        "flat": {"numbers": np.array([1024, 1, 5, 1])},
    }
    for name, change in changes.items():
        yield Hostile("read_index", f"{name}/index.npz", npz(INDEX | change))


# --------------------------------------------------------------------------------------------------- the test

GROUPS = {
    "weights that run code or claim memory": weights,
    "ground truth that runs code or claims memory": truths,
    "YAML that runs code or claims memory": configs,
    "index and cache files that run code or claim memory": arrays,
}
TRUTH = {"imlist": ["a"], "qimlist": ["b"], "gnd": [{"easy": [0]}]}
WARM = [
    Hostile("read_pth", "good.pth", pth(GOOD)),
    Hostile("read_pth", "damaged.pth", pth(dictionary(w=tensor(9, [9], [1])))),
    Hostile("read_features", "features.pth", pth(b"\x80\x02" + tensor(4, [4], [1]) + b".")),
    Hostile("read_config", "good.yaml", b"lr: 1\n"),
    Hostile("read_truth", "good.pkl", pickle.dumps(TRUTH)),
    Hostile("read_truth", "good.json", json.dumps(TRUTH).encode()),
    Hostile("load_backbone", "not.safetensors", struct.pack("<Q", 2) + b'{"' + bytes(64)),
    Hostile("load_backbone", "not-a-vit.pth", pth(GOOD)),
    Hostile("read_verdicts", "good.npz", npz(VERDICTS)),
    Hostile("read_index", "good/index.npz", npz(INDEX)),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Hostile, Outcome]]]:
    """What one child did with all files."""
    root = tmp_path_factory.mktemp("hostile")
    groups = {what: list(files()) for what, files in GROUPS.items()}
    every = [file for files in groups.values() for file in files]
    for file in (*WARM, *every):
        path = root / file.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file.content)
        if file.piece == "read_index":
            (path.parent / "a.tar").write_bytes(bytes(1024))
            os.utime(path.parent / "a.tar", ns=(0, 0))
    found = audit(
        [(file.piece, str(root / file.name)) for file in every],
        warm=[(file.piece, str(root / file.name)) for file in WARM],
    )
    assert not [path for path in (root, Path()) if (path / MARKER).exists()]
    paired = iter(zip(every, found, strict=True))
    return {what: [next(paired) for _ in files] for what, files in groups.items()}


@pytest.mark.parametrize("what", GROUPS)
def test_hostile_files_are_refused_without_running_them(
    what: str, outcomes: dict[str, list[tuple[Hostile, Outcome]]]
) -> None:
    with promise(28, what) as cases:
        for file, outcome in outcomes[what]:
            with cases.case(file.name):
                limit = 2 * len(file.content) + (64 << 20)
                if file.piece in ("read_verdicts", "read_index"):  # a file that does not fit is passed over
                    quiet(outcome, memory=limit)
                    assert outcome.error == "" and not any(outcome.result)
                else:
                    shown = Path(file.name).parent if file.piece == "load_directory" else Path(file.name)
                    refused(outcome, file.words, shown.name, memory=limit)
