"""Calls the C functions of a library with arguments of c_functions.py; run as a child, since a fault ends it.

    python -S -m reliability.c_driver LIBRARY fuzz FIRST COUNT [--heap] [--callers N] [--only NAME]
    python -S -m reliability.c_driver LIBRARY invalid [--only NAME]

For each case it prints ``begin NAME SEED``, then ``pass`` or ``fail REASON``. A function gets its valid
arguments twice and must give the same bytes: in buffers that end where unreadable memory begins, on one
thread, then in buffers that begin where it ends, with other rubbish in what is to be written, and on more
threads. ``--heap`` takes buffers of exact size from malloc instead, where sanitizers and valgrind watch them;
``invalid`` spoils one argument at a time, which must be refused and change nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import sys
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from reliability.c_arguments import Arguments, Buffer, Buffers, Choice, Draw, Number, Size
from reliability.c_functions import FUNCTIONS, arguments_of

PAGE = mmap.PAGESIZE
HUGE = (1 << 62, (1 << 63) - 1, -1, -(1 << 63))
SPOILED = {  # what the first element of an array must not be
    "sizes": (-1, 1 << 62), "dtypes": (-1, 3), "counts": (-1, 1 << 30), "ks": (-1, 1 << 40),
    "classes": (-1, 1 << 40), "truth": (1 << 40,), "match": (1 << 40,), "out_sizes": (-1, 0),
    "size": (-1, 0, 1 << 30), "window": (-1, 1 << 20, (1 << 31) - 1),
    "params": (-1.0, 1e9, float("nan"), float("inf")),
}  # fmt: skip
LISTS = "grads exp_avgs exp_avg_sqs buffers students images outs".split()  # of addresses, none null
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.malloc.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *3 * (ctypes.c_int,), ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Memory:
    """Buffers of a call. ``where``: "end" or "begin" of pages with unreadable ones beside them, or "heap"."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.regions: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        if self.where == "heap":
            address = libc.malloc(size)
            self.regions.append((address, size))
            return address
        pages = -(-size // PAGE) * PAGE
        region = libc.mmap(None, pages + 2 * PAGE, 0, ANONYMOUS, -1, 0)
        if region in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("mmap")
        self.regions.append((region, pages + 2 * PAGE))
        if pages and libc.mprotect(region + PAGE, pages, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
        return region + PAGE + (pages - size if self.where == "end" else 0)

    def release(self) -> None:
        for address, size in self.regions:
            libc.free(address) if self.where == "heap" else libc.munmap(address, size)


class Call:
    """Arguments in memory, as ctypes takes them."""

    def __init__(self, arguments: Arguments, memory: Memory, rubbish: int) -> None:
        self.memory, self.rubbish = memory, rubbish
        self.written: list[tuple[str, int, int]] = []  # name, address, bytes
        self.kept: list[str] = []  # of those, the ones that were not rubbish before
        self.values: dict[str, object] = {name: self._value(name, x) for name, x in arguments.items()}

    def _value(self, name: str, x: object) -> object:
        if isinstance(x, Buffer):
            return ctypes.c_void_p(self._buffer(name, x))
        if isinstance(x, Buffers):
            items = [0 if b is None else self._buffer(f"{name}[{i}]", b) for i, b in enumerate(x.items)]
            return ctypes.c_void_p(self._buffer(name, Buffer(array("Q", items))))
        if isinstance(x, Number):
            return ctypes.c_double(x.value)
        wide = isinstance(x, Size) and x.c_type == "q"
        assert isinstance(x, Size | Choice)
        return (ctypes.c_int64 if wide else ctypes.c_int)(x.value)

    def _buffer(self, name: str, b: Buffer) -> int:
        data = b.values.tobytes()
        address = self.memory.take(len(data))
        if b.fresh:
            ctypes.memset(address, self.rubbish, len(data))
        elif data:
            ctypes.memmove(address, data, len(data))
        if b.written:
            self.written.append((name, address, len(data)))
            self.kept += [] if b.fresh else [name]
        return address

    def results(self) -> dict[str, bytes]:
        return {name: ctypes.string_at(address, size) for name, address, size in self.written}


def code_of(library: ctypes.CDLL, name: str, values: dict[str, object], threads: int) -> int:
    function = getattr(library, name)
    takes_threads = name not in ("fdk_dino_state_size", "fdk_multicrop_limit_simd")
    function.restype = ctypes.c_int if takes_threads or "limit" in name else ctypes.c_int64
    return function(*values.values(), *([ctypes.c_int(threads)] if takes_threads else []))


@contextmanager
def prepared(arguments: Arguments, where: str, rubbish: int) -> Iterator[Call]:
    memory = Memory(where)
    try:
        yield Call(arguments, memory, rubbish)
    finally:
        memory.release()


def check_valid(library: ctypes.CDLL, name: str, seed: int, heap: bool) -> str:
    """Empty, or what is wrong."""
    arguments = arguments_of(name, seed)
    found = []
    for where, rubbish, threads in (("end", 0xA5, 1), ("begin", 0x5A, 2 + seed % 3)):
        with prepared(arguments, "heap" if heap else where, rubbish) as call:
            code = code_of(library, name, call.values, threads)
            if code and name != "fdk_dino_state_size":
                return f"returned {code}"
            found.append(call.results())
    wrong = [key for key in found[0] if found[0][key] != found[1][key]]
    return f"differing bytes in {', '.join(wrong)}" if wrong else ""


def worst(name: str, x: object) -> list[object]:
    """What this argument must not be."""
    if isinstance(x, Buffer | Buffers):
        return [ctypes.c_void_p(None)]
    if isinstance(x, Size) and x.c_type == "q":
        return [ctypes.c_int64(v) for v in HUGE]
    if isinstance(x, Size):
        return [ctypes.c_int(v) for v in (-1, -(1 << 31))]
    if isinstance(x, Choice):
        return [ctypes.c_int(v) for v in (-1, 7, (1 << 31) - 1)]
    assert isinstance(x, Number)
    return [ctypes.c_double(v) for v in (0.0, -1.0, float("nan"))] if x.positive else []


def full_sized(name: str) -> Arguments:
    """Arguments of which no extent is 0, so that every address is needed."""
    for seed in range(1000):
        arguments = FUNCTIONS[name](Draw(seed))
        everything = [x for x in arguments.values() if isinstance(x, Buffer)]
        for x in arguments.values():
            everything += [b for b in x.items if b is not None] if isinstance(x, Buffers) else []
        lists = [x for x in arguments.values() if isinstance(x, Buffers)]
        if all(len(b.values) for b in everything) and all(any(x.items) for x in lists):
            return arguments
    raise AssertionError(f"{name}: no seed gives every array an element")


def spoil(name: str, x: object) -> Iterator[tuple[str, object]]:
    """(description, argument with contents that it must not have)."""
    if isinstance(x, Buffers) and name in LISTS:
        yield f"{name}[0]=None", Buffers([None, *x.items[1:]])
    if isinstance(x, Buffer) and isinstance(x.values, array):
        for value in SPOILED.get(name, ()):
            if x.values.typecode == "i":
                value = min(value, (1 << 31) - 1)
            yield f"{name}[0]={value}", replace(x, values=array(x.values.typecode, [value]) + x.values[1:])


def check_invalid(library: ctypes.CDLL, name: str) -> Iterator[tuple[str, str]]:
    """(what is wrong with the call, "") before each call, ("", empty or the failure) after it."""
    arguments = full_sized(name)
    for argument, x in arguments.items():
        calls = [(f"{argument}={getattr(value, 'value', None)}", x, value) for value in worst(argument, x)]
        calls += [(what, spoiled, None) for what, spoiled in spoil(argument, x)]
        for what, given, value in calls:
            yield what, ""  # a fault is this case's
            with prepared({**arguments, argument: given}, "end", 0xA5) as call:
                values = call.values if value is None else {**call.values, argument: value}
                before = call.results()
                code = code_of(library, name, values, 2)
                after = call.results()
                changed = [key for key in call.kept if before[key] != after[key]]
            if code not in (1, 2) and not (name == "fdk_dino_state_size" and code == -1):
                yield "", f"returned {code}"
            else:
                yield "", f"changed {', '.join(changed)}" if changed else ""


def fuzz(library: ctypes.CDLL, options: argparse.Namespace, out: int) -> None:
    names = [options.only] if options.only else list(FUNCTIONS)
    for seed in range(options.first, options.first + options.count):
        for name in names:
            os.write(out, f"begin {name} {seed}\n".encode())
            problem = check_valid(library, name, seed, options.heap)
            os.write(out, f"{'fail ' + problem if problem else 'pass'}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("mode", choices=("fuzz", "invalid"))
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--heap", action="store_true")
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--only")
    options = parser.parse_args()
    library = ctypes.CDLL(options.library)
    if options.mode == "invalid":
        for name in [options.only] if options.only else list(FUNCTIONS):
            for what, problem in check_invalid(library, name):
                line = f"begin {name} {what}" if what else f"fail {problem}" if problem else "pass"
                os.write(1, f"{line}\n".encode())
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    others = [
        threading.Thread(target=fuzz, args=(library, options, nowhere)) for _ in range(options.callers - 1)
    ]
    for other in others:
        other.start()
    fuzz(library, options, 1)
    for other in others:
        other.join()


if __name__ == "__main__":
    sys.exit(main())
