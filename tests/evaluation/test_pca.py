"""PCA against a planted direction, the split into foreground and background, the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation.__main__ import main
from fastdino.evaluation.pca import foreground, otsu, patch_pictures, principal_components, to_colors


def test_a_planted_direction_is_the_first_component():
    rng = np.random.default_rng(0)
    direction = rng.normal(size=12)
    direction /= np.linalg.norm(direction)
    amount = rng.normal(size=200) * 7
    features = 5 + amount[:, None] * direction + 1e-3 * rng.normal(size=(200, 12))
    components, shares = principal_components(features.astype(np.float32))
    sign = np.sign(direction[np.abs(direction).argmax()])
    assert np.allclose(components[:, 0], sign * (amount - amount.mean()), atol=0.01)
    assert shares[0] > 0.999 and np.abs(components[:, 1:]).max() < 0.01


def test_fewer_dimensions_than_components():
    components, shares = principal_components(np.array([[0.0], [2.0]]))
    assert components.tolist() == [[-1, 0, 0], [1, 0, 0]] and shares.tolist() == [1, 0, 0]
    assert principal_components(np.ones((1, 5)))[0].tolist() == [[0, 0, 0]]


def test_colors_span_the_range():
    colors = to_colors(np.stack([np.linspace(-3, 9, 101), np.zeros(101), np.linspace(1, 0, 101)], 1))
    assert colors[0].tolist() == [0, 0, 255] and colors[-1].tolist() == [255, 0, 0]
    assert colors[50].tolist() == [128, 0, 128]
    assert to_colors(np.zeros((0, 3))).shape == (0, 3)


def test_otsu_by_hand():
    assert otsu(np.array([11.0, 0.0, 1.0, 10.0, 0.0])) == 1.0
    assert otsu(np.array([4.0])) == 4.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_foreground_is_the_side_that_has_less_of_the_border(sign):
    inside = np.zeros((6, 8), bool)
    inside[2:5, 2:6] = True
    low = np.zeros((4, 4))
    regions = foreground([sign * np.where(inside, 5.0, -5.0), sign * (low - 5)])
    assert (regions[0] == inside).all() and not regions[1].any()


class Bright(torch.nn.Module):
    """A backbone whose patch tokens are the patches' mean colours, 4 pixels a side."""

    patch_size = 4

    def get_intermediate_layers(self, x, n):
        return [torch.nn.functional.pad(torch.nn.functional.avg_pool2d(x, 4).flatten(2).mT, (0, 0, 1, 0))]


def test_pictures_of_images_of_different_shapes(tmp_path):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[4:12, 8:16] = (250, 240, 230)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.new("RGB", (16, 32), (0, 0, 0)).save(tmp_path / "b.png")
    (first, second), shares = patch_pictures(
        Bright(), [tmp_path / "a.png", tmp_path / "b.png"], image_size=16
    )
    image, colors, parts = first
    assert (image == pixels).all() and {p.shape for p in second} == {(32, 16, 3)}
    assert shares[0] > 0.99
    assert len(np.unique(colors[4:12, 8:16].reshape(-1, 3), axis=0)) == 1
    assert (colors[5, 9] != colors[0, 0]).any()
    dark = (parts == 24).all(-1)
    assert dark[:4].all() and not dark[4:12, 8:16].any() and (second[2] == 24).all()


def test_command(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 32 + i, 3), dtype=np.uint8)).save(
            tmp_path / f"data/{i}.png"
        )
    line = ["pca", "--weights", "random", "--arch", "vit_tiny", "--device", "cpu", "--image_size", "32"]
    line += [
        "--data_path",
        str(tmp_path / "data"),
        "--num_images",
        "3",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(line) == 0
    assert "3 images" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "pca.json").read_text())
    assert len(record["details"]["variance"]) == 3 and Image.open(tmp_path / "out" / "pca.png").width > 560
