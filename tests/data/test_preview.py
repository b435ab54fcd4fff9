"""The contact sheet shows the crops of the first step, where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastdino.config import CropConfig
from fastdino.data import preview
from fastdino.data.loader import MultiCropLoader
from fastdino.data.manifest import Manifest, build_manifest
from fastdino.data.preview import BACKGROUND, CAPTION, CELL, GAP, HEADER, MARGIN, contact_sheet

# Crops of half a cell's size are enlarged exactly, so that the sheet can be read back.
CROPS = CropConfig(global_crops_size=CELL, local_crops_size=CELL // 4, local_crops_number=3)


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    rng = np.random.default_rng(0)
    for label in ("a very long class name that cannot fit into its place", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(3):
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((90, 40 + 50 * i)).save(tmp_path / "data" / label / f"{i}.png")
    return build_manifest(tmp_path / "data")


def cell(sheet: np.ndarray, row: int, x: int) -> np.ndarray:
    top = MARGIN + HEADER + row * (CELL + CAPTION + GAP)
    return sheet[top : top + CELL, x : x + CELL].astype(int)


def left_edges(sheet: np.ndarray, row: int) -> list[int]:
    """Where the pictures of a row begin: columns with a frame after columns of background."""
    top = MARGIN + HEADER + row * (CELL + CAPTION + GAP)
    used = (sheet[top : top + CELL] != BACKGROUND).any(axis=(0, 2))
    return (np.flatnonzero(used[1:] & ~used[:-1]) + 2).tolist()  # one for the frame, one for the difference


def test_the_sheet_holds_the_crops_of_the_first_step(manifest, tmp_path):
    path = tmp_path / "crops.png"
    contact_sheet(manifest, CROPS, 5, 4, path)
    sheet = np.asarray(Image.open(path))
    with MultiCropLoader(manifest, CROPS, seed=5, global_batch=6, micro_batch=6) as loader:
        batch = next(loader)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    edges = left_edges(sheet, 3)[-5:]
    for row in range(4):
        views = [batch.global_[v * 6 + row] for v in range(2)] + [batch.local[v * 6 + row] for v in range(3)]
        for x, view in zip(edges, views, strict=True):
            pixels = 255 * (view.numpy().transpose(1, 2, 0) * std + mean)
            shown = cell(sheet, row, x)[:: CELL // pixels.shape[0], :: CELL // pixels.shape[0]]
            assert np.abs(shown[1:, 1:] - pixels[1:, 1:]).max() < 1, (row, x)


@pytest.mark.parametrize(("n", "local", "rows"), [(1, 0, 1), (100, 8, 6)])
def test_any_number_of_images_and_crops(manifest, tmp_path, n, local, rows):
    contact_sheet(manifest, CropConfig(local_crops_number=local), 0, n, tmp_path / "crops.png")
    width, height = Image.open(tmp_path / "crops.png").size
    assert height == 2 * MARGIN + HEADER + rows * (CELL + CAPTION + GAP) - GAP
    assert width > (3 + local) * CELL


def test_beside_the_crops_of_the_gpu(manifest, tmp_path, triton_device, monkeypatch):
    """Three rows for each image: the loader's crops, the GPU's, and their difference."""
    crops = CropConfig(global_crops_size=CELL // 9, local_crops_size=CELL // 16, local_crops_number=1)

    def rows() -> list[list[np.ndarray]]:
        contact_sheet(manifest, crops, 5, 1, tmp_path / "crops.png")
        sheet = np.asarray(Image.open(tmp_path / "crops.png"))
        assert sheet.shape[0] == 2 * MARGIN + HEADER + 3 * (CELL + CAPTION + GAP) - GAP
        return [[cell(sheet, row, x)[1:-1, 1:-1] for x in left_edges(sheet, 0)[-3:]] for row in range(3)]

    for cpu, gpu, difference in zip(*rows(), strict=True):
        assert np.abs(cpu - gpu).max() <= 1 and np.ptp(gpu) > 10 and (difference == 0).all()
    levels = preview._levels
    wrong = lambda *given: [view ^ (given[3:] != ()) for view in levels(*given)]  # noqa: E731
    monkeypatch.setattr(preview, "_levels", wrong)
    assert all((difference == preview.AMPLIFIED).all() for difference in rows()[2])


def test_without_labels_and_with_tiny_images(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (1, 1), (200, 30, 40)).save(tmp_path / "data/dot.png")
    Image.new("RGB", (300, 2)).save(tmp_path / "data/line.png")
    contact_sheet(build_manifest(tmp_path / "data"), CROPS, 0, 2, tmp_path / "crops.png")
    assert Image.open(tmp_path / "crops.png").format == "PNG"


def test_at_least_one_image(manifest, tmp_path):
    with pytest.raises(ValueError, match="--preview_crops: expected at least 1 image, got 0"):
        contact_sheet(manifest, CROPS, 0, 0, tmp_path / "crops.png")
