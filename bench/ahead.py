"""Ahead-of-time compilation of Triton kernels: registers, spills and shared memory, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from fastdino_kernels.gpu.launch import Launch


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch for one architecture, per thread and per program."""

    capability: int
    registers: int
    spilled: int  # bytes of local memory
    shared: int  # bytes
    num_warps: int
    ptx: str = field(repr=False)


def compile_ahead(launch: Launch, capability: int) -> Compiled:
    """Compile for compute capability ``capability`` (70, 80, 90); needs Triton, but no GPU and no driver.

    Pointers count as aligned to 16 bytes, as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    assert set(names) == {*launch.signature, *launch.constants}, (
        f"{launch.name}: {set(names) ^ {*launch.signature, *launch.constants}}"
    )
    pointers = [i for i, n in enumerate(names) if launch.signature.get(n, "").startswith("*")]
    source = ASTSource(
        fn=launch.kernel,
        signature={n: launch.signature.get(n, "constexpr") for n in names},
        constexprs={(i,): launch.constants[n] for i, n in enumerate(names) if n in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "enable_fp_fusion": launch.fp_fusion,
        },
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        capability,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        num_warps=launch.num_warps,
        ptx=compiled.asm["ptx"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, ... of a compiled kernel, as NVIDIA's cuobjdump reports them."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", done.stdout)}
