"""Which launch of torchrun wrote into an output directory last: workers that it starts again continue their
own run, and not one that lay there before."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from fastdino.engine.logs import write_text

NAME = ".launch"


def sign(output: Path) -> None:
    """From now on the checkpoints in ``output`` are those of this launch."""
    if (this := _this()) is not None:
        write_text(output / NAME, this)


def is_restart(output: Path) -> bool:
    """Whether this process was started again by the launch whose checkpoints are in ``output``."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    try:
        return (output / NAME).read_text() == _this()
    except OSError:
        return False


def _this() -> str | None:
    """Run, machine and process of torchrun's agent; its id alone may be given to another process later."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent = str(os.getppid())
    _, born = parent_and_birth(agent)
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {agent} {born}"


def parent_and_birth(pid: str) -> tuple[str, str]:
    """Parent and time of birth of a process; empty where that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[1], fields[19]
    except OSError:
        return "", ""
