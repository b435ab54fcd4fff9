"""Pretrain with DINO: ``python train.py --data_path DIR``, or the same under ``torchrun`` on several GPUs."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from fastdino.cli import main as run
    except ModuleNotFoundError as error:
        print(
            f"train.py: error: {error}; `make build` installs all into .venv, to be activated by "
            "`. .venv/bin/activate`",
            file=sys.stderr,
        )
        return 2
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
