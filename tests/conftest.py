from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when a kernel is defined: where there is no GPU, its kernels run in its interpreter on CPU
# tensors. Ahead-of-time compilation, which needs the real compiler, has a process of its own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastdino_kernels import backend  # noqa: E402


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where the test's tensors belong, with the triton backend chosen: the GPU, or the CPU interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with backend("triton"):
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
