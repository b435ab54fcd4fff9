"""Arguments of the C functions of csrc/, and random sizes and contents for them.

Nothing but the standard library is imported: under valgrind and the sanitizers the library is alone.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

SPECIALS = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 3.4e38, -3.4e38]


@dataclass
class Buffer:
    """Memory of exactly these values; ``fresh``: what it holds before the call must not matter."""

    values: array
    written: bool = False
    fresh: bool = False


@dataclass
class Buffers:
    """An array of addresses."""

    items: list[Buffer | None]


@dataclass
class Size:
    """An int64 (or int, ``c_type`` "i") that says how much memory there is or where to begin in it."""

    value: int
    c_type: str = "q"


@dataclass
class Choice:
    """An int of which few values have a meaning."""

    value: int


@dataclass
class Number:
    """A double; ``positive``: others are refused."""

    value: float
    positive: bool = True


Argument = Buffer | Buffers | Size | Choice | Number
Arguments = dict[str, Argument]  # in the order of the C function, without the number of threads


class Draw(random.Random):
    """Random sizes and contents; sizes keep near the widths at which the kernels change course."""

    def size(self, least: int = 0, most: int = 40) -> int:
        edges = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, most]
        found = self.choice(edges) if self.random() < 0.6 else self.randint(0, most)
        return min(max(found, least), most)

    def columns(self, block: int, least: int = 0) -> int:
        """A length beside multiples of 16, now and then of ``block``."""
        if self.random() < 0.1:
            return self.choice((1, 1, 2)) * block + self.choice((-1, 0, 1, 17))
        return self.size(least, 150)

    def floats(self, count: int) -> array:
        kind = self.choice(("normal", "normal", "integer", "special", "tiny"))
        of = {
            "normal": lambda: self.gauss(0, 2),
            "integer": lambda: float(self.randint(-4, 4)),
            "special": lambda: self.choice(SPECIALS) if self.random() < 0.1 else self.gauss(0, 2),
            "tiny": lambda: self.gauss(0, 1e-40),
        }[kind]
        return self._repeated(array("f", (of() for _ in range(min(count, 251)))), count)

    def positives(self, count: int, code: str = "f") -> array:
        return self._repeated(array(code, (self.uniform(0.1, 2) for _ in range(min(count, 251)))), count)

    def halves(self, count: int) -> array:
        """bfloat16."""
        return array("H", array("H", self.floats(count).tobytes())[1::2])

    def integers(self, count: int, low: int, high: int, code: str = "q") -> array:
        return array(code, (self.randint(low, high) for _ in range(count)))

    def data(self, count: int, bf16: int) -> Buffer:
        return Buffer(self.halves(count) if bf16 else self.floats(count))

    def doubles(self, count: int) -> array:
        return array("d", self.floats(count))

    def temp(self) -> Number:
        return Number(self.choice((0.04, 0.1, 1.0, 1e-3, 1e30)))

    @staticmethod
    def _repeated(values: array, count: int) -> array:
        return (values * (count // max(1, len(values)) + 1))[:count]


def out(code: str, count: int) -> Buffer:
    return Buffer(array(code, bytes(array(code).itemsize * count)), written=True, fresh=True)


def out_like(count: int, bf16: int) -> Buffer:
    return out("H" if bf16 else "f", count)


def strided(rows: int, columns: int, stride: int) -> int:
    """Elements of rows that begin ``stride`` apart; behind the last one there is nothing."""
    return (rows - 1) * stride + columns if rows else 0


def changed(values: array) -> Buffer:
    return Buffer(values, written=True)


def shape_of(arguments: Arguments) -> dict[str, float]:
    """What a line about the case shows: the arguments that are numbers."""
    return {name: x.value for name, x in arguments.items() if isinstance(x, Size | Choice | Number)}
