from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when a kernel is defined: where there is no GPU, its kernels run in its interpreter on CPU
# tensors. Ahead-of-time compilation, which needs the real compiler, has a process of its own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastdino_kernels import backend, csrc  # noqa: E402


@pytest.fixture
def library() -> ctypes.CDLL:
    """The C++ library; tests that need it are skipped where it is not built."""
    found = csrc.library() if csrc.PATH.exists() else None
    if found is None:
        pytest.skip("the C++ kernels are not built (make build)")
    return found


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where the test's tensors belong, with the triton backend chosen: the GPU, or the CPU interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with backend("triton"):
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["cpu", "reference", "triton"])
def device(request: pytest.FixtureRequest, library: object) -> Iterator[torch.device]:
    """Chooses a backend; the device its tensors belong on."""
    if request.param == "triton":
        yield request.getfixturevalue("triton_device")
        return
    with backend(request.param):
        yield torch.device("cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
