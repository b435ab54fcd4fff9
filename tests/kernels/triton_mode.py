"""Running Triton kernels on CPU tensors: tests of a module that imports this run in Triton's interpreter.

The interpreter is chosen by an environment variable that Triton reads when a kernel is defined, so the whole
test process is in interpreter mode from here on; ahead-of-time compilation happens in a process of its own.
"""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
