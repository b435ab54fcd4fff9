"""Threads that an error stops."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of ``count`` threads; what it has not begun when its block is left, also by an error or Ctrl-C,
    is not done.
    """
    with ThreadPoolExecutor(count, thread_name_prefix=name) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
