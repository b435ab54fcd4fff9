"""Random access to a container while it is indexed: nothing is allocated because a header claims it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MAX_HEADER = 1 << 20
"""Bytes; nothing that has to be read to find the images is larger."""


class Entry(NamedTuple):
    """One image of a shard."""

    key: bytes
    offset: int
    length: int
    """Negative for a RecordIO record in several parts: the bytes of all its parts."""
    label: bytes | None
    """A whole number or a class name, as text."""


class Malformed(ValueError):
    """A container that is not what its name says, or cut short."""


class Window:
    """`size` bytes that `read(offset, length)` gets, a block of which is kept.

    `name` stands in the messages: the file, the offset, what was expected there and what was found.
    """

    def __init__(self, name: str, size: int, read: Callable[[int, int], bytes], block: int) -> None:
        self.name, self.size = name, size
        self._read, self._block_size = read, block
        self._start, self._block = 0, b""

    def at(self, offset: int, length: int, what: str = "data") -> bytes:
        """Exactly `length` bytes at `offset`. Raises Malformed if they are too many or not there."""
        if not 0 <= length <= MAX_HEADER:
            raise self.malformed(offset, f"{what} of at most {MAX_HEADER} bytes", f"a length of {length}")
        if offset < 0 or offset + length > self.size:
            left = max(0, self.size - offset) if offset >= 0 else 0
            raise self.malformed(offset, f"{length} bytes of {what}", f"the end of the file after {left}")
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._block):
            wanted = min(max(length, self._block_size), self.size - offset)
            self._start, self._block, begin = offset, self._read(offset, wanted), 0
            if len(self._block) < length:
                raise self.malformed(offset, f"{length} bytes of {what}", f"{len(self._block)}")
        return self._block[begin : begin + length]

    def malformed(self, offset: int, expected: str, got: str) -> Malformed:
        return Malformed(f"{self.name}: offset {offset}: expected {expected}, got {got}")
