"""A million paths in the memory of their bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class Files(Sequence[str]):
    """Paths, made when they are asked for, from text that holds them all: as many `str` take three times that
    memory.
    """

    def __init__(self, text: bytes, spans: np.ndarray, folder: str = "") -> None:
        self._text = text
        self._spans = spans  # int64 [n, 2]: where a path begins and ends in `text`
        self._folder = folder  # that relative ones are relative to

    @classmethod
    def of(cls, paths: Iterable[str]) -> Files:
        parts = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(b"".join(parts), np.stack([np.concatenate([[0], ends[:-1]]), ends], 1))

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self._spans[index]
        path = os.fsdecode(self._text[begin:end])
        return os.path.join(self._folder, path) if self._folder else path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    def __repr__(self) -> str:
        return repr(list(self))

    def select(self, indices: np.ndarray) -> Files:
        """Those at `indices` (int [m]), in that order."""
        return Files(self._text, self._spans[indices], self._folder)
