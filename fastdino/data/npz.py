"""Arrays of a ``.npz`` file that somebody else may have written: memory for no more than its bytes."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def load(file: Path | io.BytesIO, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays named ``columns``. Raises FileNotFoundError or ValueError saying what is wrong."""
    try:
        size = file.getbuffer().nbytes if isinstance(file, io.BytesIO) else os.stat(file).st_size
        if isinstance(file, Path) and not file.is_file():
            raise ValueError("not a regular file")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("expected arrays that are not compressed")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its arrays claim more bytes than the file has")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in columns}
    except FileNotFoundError:
        raise
    except Exception as error:  # arbitrary bytes can fail in any operation of the readers
        raise ValueError(str(error) or type(error).__name__) from error
