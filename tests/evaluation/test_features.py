"""Feature extraction: the official view of an image, order, modes, and errors that name the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation.features import center_crop, extract_features, normalize, raw_pixel_features


class Mean(torch.nn.Module):
    """Mean colour of the image, with a part that was in eval mode before and must be afterwards."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.BatchNorm2d(3)
        self.live = torch.nn.Dropout(0.5)

    def forward(self, x):
        assert not self.training and not self.live.training
        return self.live(x).mean((2, 3))


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(11):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (20 + i, 31 - i, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.mark.parametrize("batch_size, threads", [(1, 1), (4, 2), (100, 0)])
def test_features_in_order_whatever_the_batches(files, batch_size, threads):
    seen = []
    features = extract_features(
        Mean(),
        files,
        image_size=16,
        batch_size=batch_size,
        num_threads=threads,
        progress=lambda done, total: seen.append((done, total)),
    )
    expected = torch.cat(
        [normalize(torch.from_numpy(center_crop(Image.open(p), 16))[None]).mean((2, 3)) for p in files]
    )
    assert torch.equal(features, expected)
    assert seen[-1] == (11, 11) and len(seen) == -(-11 // batch_size)


@pytest.mark.parametrize("width, height", [(300, 200), (200, 301), (224, 224), (50, 500)])
def test_view_is_resize_then_center_crop(width, height):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    shorter = min(width, height)
    new = (256 * width // shorter, 256 * height // shorter)
    whole = np.asarray(image.resize(new, Image.Resampling.BICUBIC))
    top, left = round((new[1] - 224) / 2), round((new[0] - 224) / 2)
    assert np.array_equal(center_crop(image, 224), whole[top : top + 224, left : left + 224])


def test_normalize_uses_imagenet_statistics():
    x = normalize(torch.tensor([[[[255, 0, 128]]]], dtype=torch.uint8))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    assert x.shape == (1, 3, 1, 1) and x.flatten().tolist() == pytest.approx(expected)


def test_modes_come_back_even_after_an_error(files, tmp_path):
    model = Mean()
    model.frozen.eval()
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    for paths in (files, [*files, tmp_path / "broken.jpg"]):
        try:
            extract_features(model, paths, image_size=16, batch_size=4)
        except ValueError:
            pass
        assert model.training and model.live.training and not model.frozen.training


def test_errors_name_the_file(files, tmp_path):
    truncated = tmp_path / "half.png"
    truncated.write_bytes(files[0].read_bytes()[:200])
    for bad in (truncated, tmp_path / "nowhere.png"):
        with pytest.raises((ValueError, FileNotFoundError), match=bad.name):
            extract_features(Mean(), [*files, bad], image_size=16, batch_size=4)
    with pytest.raises(ValueError, match="3.png is not finite"):
        extract_features(Poisoned(), files, image_size=16, batch_size=2)
    with pytest.raises(ValueError, match="empty"):
        extract_features(Mean(), [])


class Poisoned(torch.nn.Module):
    """Gives NaN for the fourth image it sees."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        out = x.mean((2, 3))
        for row in out:
            self.count += 1
            if self.count == 4:
                row.fill_(float("nan"))
        return out


def test_raw_pixels(files):
    features = raw_pixel_features(files, 8)
    assert features.shape == (11, 192)
    assert torch.equal(
        features[3], normalize(torch.from_numpy(center_crop(Image.open(files[3]), 8))[None]).flatten()
    )
