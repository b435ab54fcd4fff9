"""Pretrain with DINO: ``python train.py --data_path DIR``, or the same under ``torchrun`` on several GPUs."""

from __future__ import annotations

import sys


def main() -> int:
    from fastdino.cli import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
