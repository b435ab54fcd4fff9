"""Python that has imported everything: a server that forks for each command, and the ``python`` that asks it.

    python zygote.py --serve SOCKET   forks whenever it is asked to
    python zygote.py SOCKET ARGS...   does as ``python ARGS...`` in this folder, environment and streams

Imports take longer than most commands of toy size.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

IMPORTS = (
    "numpy PIL.Image torch torch.distributed.run nvidia.dali.fn fastdino.cli fastdino.engine.trainer".split()
)


def ask(server: str, arguments: list[str]) -> int:
    """The exit code of ``python ARGUMENTS``, run by the server."""
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(server)
        streams = array.array("i", [0, 1, 2]).tobytes()
        connection.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(16)
    return int(answer) if answer else 1


def serve(place: str) -> NoReturn:
    for name in IMPORTS:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(f"{place}.begun")
        listening.listen()
        os.rename(f"{place}.begun", place)  # who sees it can connect
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of those that have ended nothing stays
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    """Run the command in a process of its own, and tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.exit(_run(request))  # through the server's frames, to an interpreter's ordinary end
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(BrokenPipeError):  # who asked was killed meanwhile
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _run(request: dict[str, Any]) -> int:
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    words = request["arguments"]
    match words[words[:1] == ["-u"] :]:  # standard error, which matters, is not held back anyway
        case ["-m", module, *rest]:
            sys.argv, sys.path[0] = [module, *rest], os.getcwd()
            work = lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)  # noqa: E731
        case ["-c", code, *rest]:
            sys.argv, sys.path[0] = ["-c", *rest], os.getcwd()
            work = lambda: exec(code, {"__name__": "__main__"})  # noqa: E731
        case [script, *rest]:
            sys.argv, sys.path[0] = [script, *rest], str(Path(script).resolve().parent)
            work = lambda: runpy.run_path(script, run_name="__main__")  # noqa: E731
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
