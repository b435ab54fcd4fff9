"""Threads that an error stops, and that a read which never ends does not keep from stopping."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = 3.0
"""Seconds that what has begun may take when a pool is closed."""


class Pool:
    """Some threads for work that may hang, as reads of a network's files do.

    Unlike those of concurrent.futures, they are left to themselves when they do not end in time: neither
    `close` nor the end of the process waits for them.
    """

    def __init__(self, count: int, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._open: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        """Begin ``function(*arguments)`` in a thread. CancelledError if the pool is closed before the end."""
        future: Future[R] = Future()
        with self._lock:
            if self._closed:
                raise CancelledError
            self._open.add(future)
        self._work.put((future, lambda: function(*arguments)))
        return future

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``function`` of every item, in order; all are begun at once."""
        futures = [self.submit(function, item) for item in items]
        return (future.result() for future in futures)

    def close(self) -> None:
        """Forget what has not begun, and wait a little for the threads. Whoever waits for a result gets
        CancelledError. Safe to call twice, from any thread.
        """
        with self._lock:
            self._closed = True
            waiting = list(self._open)
        for future in waiting:
            if not future.cancel():
                with suppress(InvalidStateError):  # it has ended
                    future.set_exception(CancelledError())
        for _ in self._threads:
            self._work.put(None)
        deadline = time.monotonic() + PATIENCE
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            future, work = job
            if not future.set_running_or_notify_cancel():
                continue
            with suppress(InvalidStateError):  # nobody waits for it any more
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            with self._lock:
                self._open.discard(future)


@contextmanager
def threads(count: int, name: str) -> Iterator[Pool]:
    """A pool of ``count`` threads; what it has not begun when its block is left, also by an error or Ctrl-C,
    is not done.
    """
    pool = Pool(count, name)
    try:
        yield pool
    finally:
        pool.close()
