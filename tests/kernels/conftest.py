from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from fastdino_kernels import backend, csrc


@pytest.fixture
def library() -> ctypes.CDLL:
    """The C++ library; tests that need it are skipped where it is not built."""
    found = csrc.library() if csrc.PATH.exists() else None
    if found is None:
        pytest.skip("the C++ kernels are not built (make build)")
    return found


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
