from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from reliability.promises import IN_MEMORY
from tests.engine.conftest import images as images


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system in memory where there is one: its flushes take no time."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix=IN_MEMORY) as path:
        yield Path(path)
