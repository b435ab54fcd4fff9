"""``python -m fastdino``: what ``train.py`` of a checkout does, for an installed package."""

import sys

from fastdino.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
