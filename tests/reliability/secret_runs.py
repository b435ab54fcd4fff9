"""Commands of the product with secrets on their lines and around them, each in a process of its own.

Run as a program: it imports everything once and forks for each of the requests that it reads, JSON lists of
[name, kind, words]. What a command prints goes to ``<folder>/<name>.out``, the exit code to standard output.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def train(words: list[str]) -> int:
    from fastdino.cli import main

    return main(words)


def train_and_crash(words: list[str]) -> int:
    """A bug in the middle of a run."""
    from fastdino.data import loader

    def crop_parameters(*_: object, **__: object) -> object:
        raise RuntimeError("a bug")

    loader.crop_parameters = crop_parameters  # type: ignore[assignment]
    return train(words)


def train_and_lose_data(words: list[str]) -> int:
    """The shards go away once they are indexed."""
    import fsspec

    from fastdino.data import loader

    real = loader.MultiCropLoader

    def without_data(*arguments: object, **options: object) -> object:
        fsspec.filesystem("memory").store.clear()
        return real(*arguments, **options)  # type: ignore[arg-type]

    from fastdino.engine import trainer

    trainer.MultiCropLoader = without_data  # type: ignore[assignment, misc]
    return train(words)


def train_and_abort(words: list[str]) -> int:
    """A crash below Python, as faulthandler tells it."""
    from fastdino.data import loader

    faulthandler.enable()
    loader.crop_parameters = lambda *_, **__: os.abort()
    return train(words)


def evaluate(words: list[str]) -> int:
    from fastdino.evaluation.__main__ import main

    return main(words)


def pack(words: list[str]) -> int:
    from fastdino.data.pack import main

    return int(main(words) or 0)


def interop(words: list[str]) -> int:
    from fastdino.interop.__main__ import main

    return int(main(words) or 0)


KINDS: dict[str, Callable[[list[str]], int]] = {
    function.__name__: function
    for function in (train, train_and_crash, train_and_lose_data, train_and_abort, evaluate, pack, interop)
}


def main(folder: Path, objects: dict[str, str]) -> None:
    """Serve the requests on standard input; ``objects`` are files to put into fsspec's memory."""
    import fsspec

    import fastdino.cli
    import fastdino.engine.trainer  # noqa: F401

    memory = fsspec.filesystem("memory")
    for name, file in objects.items():
        memory.pipe(name, Path(file).read_bytes())
    for request in sys.stdin:
        name, kind, words = json.loads(request)
        child = os.fork()
        if child == 0:
            _run(KINDS[kind], words, folder / f"{name}.out")
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(function: Callable[[list[str]], int], words: list[str], output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        code = function(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
