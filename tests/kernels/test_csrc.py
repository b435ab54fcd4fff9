"""The C++ library: found, of the right version, refused otherwise, and safe with threads and fork."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdino_kernels import csrc
from fastdino_kernels.multicrop import COLUMNS, H, W, multicrop


@pytest.fixture
def fresh():
    """`library` forgets what it found, before and after."""
    csrc.library.cache_clear()
    yield
    csrc.library.cache_clear()


def crops(threads: int, n: int = 24) -> torch.Tensor:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(n)]
    params = np.zeros((n, 1, COLUMNS), np.float32)
    params[..., H], params[..., W] = 40, 50
    out = torch.full((n, 3, 32, 32), float("nan"))
    multicrop(images, params, out=[out], num_threads=threads)
    return out


def test_missing_library_is_none_and_said_once(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(csrc, "PATH", tmp_path / "libnone.so")
    with pytest.warns(RuntimeWarning, match=r"libnone.so is not built"):
        assert csrc.library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert csrc.library() is None


def test_damaged_library_is_none(fresh, monkeypatch, tmp_path):
    path = tmp_path / "libbad.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(csrc, "PATH", path)
    with pytest.warns(RuntimeWarning, match="libbad.so"):
        assert csrc.library() is None


def test_library_of_another_version_is_none(fresh, monkeypatch, library):
    csrc.library.cache_clear()
    monkeypatch.setattr(csrc, "ABI", 1000)
    with pytest.warns(RuntimeWarning, match=r"has interface version \d+, this package needs 1000"):
        assert csrc.library() is None


def test_source_and_loader_agree_on_the_version():
    source = Path(__file__).parents[2] / "csrc" / "abi.cpp"
    assert f"return {csrc.ABI};" in source.read_text()


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert csrc.num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_check():
    csrc.check(0, "f")
    with pytest.raises(ValueError, match="f: error 1"):
        csrc.check(1, "f")
    with pytest.raises(MemoryError, match="f: out of memory"):
        csrc.check(2, "f")
    with pytest.raises(RuntimeError, match="f: error 3"):
        csrc.check(3, "f")


def test_python_threads_share_the_pool(library):
    expected = crops(1)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(crops(4))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)


def test_more_threads_than_processors_and_than_tasks(library):
    expected = crops(1)
    assert torch.equal(crops(50), expected)
    assert torch.equal(crops(2), expected)  # fewer than the pool has by now


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_pool_works_in_a_forked_child(library):
    expected = crops(4)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own threads (OpenMP) do not survive a fork: it would wait for them
        os._exit(0 if torch.equal(crops(4), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(crops(4), expected)
