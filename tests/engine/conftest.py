"""A small real data set for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 JPEGs of 40 to 60 pixels in 4 class folders: coloured stripes of a class-specific width over
    noise.
    """
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(96):
        label, side = i % 4, int(rng.integers(40, 60))
        wave = np.sin(np.arange(side) * (0.3 + 0.3 * label) + rng.uniform(0, 6))[None, :, None]
        pixels = 128 + 60 * wave * rng.uniform(-1, 1, 3) + rng.normal(0, 10, (side, side, 3))
        folder = root / f"class{label}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=92)
    return root
