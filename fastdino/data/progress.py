"""A progress bar over work that comes in chunks, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], total: int, progress: bool, text: str, *, chunks: bool = False) -> Iterator[T]:
    """The items, with a bar of `total` on standard error if `progress` and that is a terminal.

    ``chunks``: each item is a list, and what is in it counts.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (progress and sys.stderr.isatty())) as bar:
        task = bar.add_task("", total=total)
        for item in items:
            yield item
            bar.advance(task, len(item) if chunks else 1)  # type: ignore[arg-type]
