"""Ground truth of the revisited Oxford and Paris benchmarks, from their pickle without running any of it.

The file holds ``imlist`` (names of the database images), ``qimlist`` (names of the queries) and ``gnd``: per
query the database indices that are ``easy`` and ``hard`` to find and those that count neither way (``junk``),
and the query's box ``bbx`` in pixels (left, top, right, bottom). A JSON file with the same fields will do.

Unpickling may call any function that a file names. Here the only names a file can reach are stand-ins that
rebuild arrays of numbers; every other name is refused.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdino.data.manifest import printable

_NUMBER = re.compile(r"[iuf][1248]|b1")
MAX_BYTES = 64 << 20
"""Largest file; those of the benchmarks take less than 1 MB."""


@dataclass(frozen=True)
class Query:
    """What belongs to one query: indices of database images, int64 [any]."""

    name: str
    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray
    box: tuple[float, float, float, float] | None
    """Left, top, right, bottom in pixels; None if the file has none."""


@dataclass(frozen=True)
class GroundTruth:
    images: list[str]
    """Names of the database images."""
    queries: list[Query]


def read_ground_truth(path: Path) -> GroundTruth:
    """Ground truth of a ``.json`` or a pickle file.

    Raises FileNotFoundError, or ValueError naming the file and the field if the content is not as above, or
    the name that a pickle tried to use.
    """
    try:
        data = _bytes(path)
        if path.suffix.lower() == ".json":
            content = json.loads(data.decode("utf-8"))
        else:
            content = _Numbers(io.BytesIO(data), encoding="latin1").load()
    except FileNotFoundError:
        raise FileNotFoundError(f"no such ground truth: {path}") from None
    except OSError as error:
        raise OSError(f"cannot read ground truth {path}: {error}") from error
    except Exception as error:  # a damaged pickle raises anything: EOFError, IndexError, KeyError, ...
        raise ValueError(f"cannot read ground truth {path}: {error}") from error
    try:
        return _checked(content)
    except ValueError as error:
        raise ValueError(f"ground truth {path}: {error}") from error


def _bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES:,} bytes")
    return data


# ---------------------------------------------------------------------------------------------------- content


def _checked(content: Any) -> GroundTruth:
    fields = ("imlist", "qimlist", "gnd")
    if not isinstance(content, dict) or any(field not in content for field in fields):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected a dictionary with {', '.join(fields)}, got {found}")
    images, names = _names("imlist", content["imlist"]), _names("qimlist", content["qimlist"])
    entries = content["gnd"]
    if not isinstance(entries, list) or len(entries) != len(names):
        got = f"{len(entries)} entries" if isinstance(entries, list) else type(entries).__name__
        raise ValueError(f"gnd: expected a list of {len(names)} entries, one per query, got {got}")
    return GroundTruth(
        images,
        [_query(f"gnd[{i}]", *pair, len(images)) for i, pair in enumerate(zip(names, entries, strict=True))],
    )


def _names(field: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{field}: expected a list of image names")
    return value


def _query(field: str, name: str, entry: Any, images: int) -> Query:
    if not isinstance(entry, dict) or not {"easy", "hard"} & set(entry):
        raise ValueError(f"{field}: expected a dictionary with easy, hard, junk (and bbx)")
    lists = {}
    for kind in ("easy", "hard", "junk"):
        values = _numbers(f"{field}[{kind!r}]", entry.get(kind, []))
        if (values != np.round(values)).any() or (values < 0).any() or (values >= images).any():
            raise ValueError(f"{field}[{kind!r}]: expected indices from 0 to {images - 1}")
        lists[kind] = values.astype(np.int64)
    box = _numbers(f"{field}['bbx']", entry.get("bbx", []))
    if len(box) and (len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]):
        raise ValueError(f"{field}['bbx']: expected left, top, right, bottom, got {box.tolist()}")
    left_top_right_bottom = (float(box[0]), float(box[1]), float(box[2]), float(box[3])) if len(box) else None
    return Query(name, **lists, box=left_top_right_bottom)


def _numbers(field: str, value: Any) -> np.ndarray:
    """float64 [any] of an array or a list."""
    try:
        array = np.asarray(value.array if isinstance(value, _Array) else value, np.float64).ravel()
    except (TypeError, ValueError):
        raise ValueError(f"{field}: expected a list or an array of numbers") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{field}: expected finite numbers")
    return array


# ----------------------------------------------------------------------------------------------------- pickle


class _Numbers(pickle._Unpickler):
    """Built-in values and numpy arrays of numbers, nothing else.

    The unpickler in Python: the one in C takes 16 GB for a file of nine bytes that numbers a value 2**30.
    """

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if allowed is None:
            raise pickle.UnpicklingError(
                f"expected numbers, text, lists and dictionaries, got {printable(f'{module}.{name}')}"
            )
        return allowed


class _Allowed:
    """A function that a pickle may call; the pickle can neither change nor replace it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("expected the state of an array, got that of a function")


class _Type:
    """Stands for a numpy.dtype of numbers."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            raise pickle.UnpicklingError(f"expected an array of numbers, got one of dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        """(version, byte order, subarray, names, fields, size, alignment, flags), as numpy pickles it."""
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("expected an array of plain numbers, got a structured dtype")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a numpy.ndarray of numbers; ``array`` [any] is the real one, flat."""

    def __init__(self) -> None:
        self.array: np.ndarray = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        """(version, shape, dtype, column order, bytes), as numpy pickles it."""
        _, shape, kind, _, data = state
        self.array = _array(data, kind, shape).array


def _array(data: Any, kind: Any, shape: Any, *order: Any) -> _Array:
    """The numbers one after another, as they lie in memory."""
    if isinstance(data, str):  # Python 2 had one type for text and bytes
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray) or not isinstance(kind, _Type) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("expected an array of numbers")
    if math.prod(shape) * kind.dtype.itemsize != len(data):
        raise pickle.UnpicklingError(f"expected {math.prod(shape)} numbers, got {len(data)} bytes")
    made = _Array()
    made.array = np.frombuffer(data, kind.dtype)
    return made


def _scalar(kind: Any, data: Any) -> Any:
    return _array(data, kind, ()).array.item()


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("expected bytes")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy", "ndarray"): _Allowed(_Array),
    ("numpy", "dtype"): _Allowed(lambda code, *_: _Type(code)),
    ("numpy.core.multiarray", "_reconstruct"): _Allowed(lambda *_: _Array()),
    ("numpy.core.multiarray", "scalar"): _Allowed(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Allowed(_array),
    ("_codecs", "encode"): _Allowed(_encode),
    ("__builtin__", "bytes"): _Allowed(lambda: b""),  # how protocols before 3 write no bytes
}
