"""The window equals the same pixels of Pillow's resize, bit for bit, whatever the processor has."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from fastdino_kernels import backend
from fastdino_kernels.multicrop import IMAGENET_MEAN, IMAGENET_STD
from fastdino_kernels.resize_crop import resize_crop
from PIL import Image

# Before Pillow 13 every resize went horizontally first; now very tall images do not.
TALL_AS_PILLOW = int(PIL.__version__.split(".")[0]) >= 13
BACKENDS = ["reference", "plain", "avx2", "avx512"]


@pytest.fixture(params=BACKENDS)
def side(request):
    """Levels that the processor lacks run as the best it has."""
    if request.param == "reference":
        with backend("reference"):
            yield request.param
        return
    library = request.getfixturevalue("library")
    library.fdk_multicrop_limit_simd(BACKENDS.index(request.param) - 1)
    yield request.param
    library.fdk_multicrop_limit_simd(2)


def pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return noise if rng.random() < 0.5 else (noise > 127).astype(np.uint8) * np.uint8(255)


@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 375), (224, 224), (90, 700), (1200, 100), (32, 32), (1, 5)]
)
def test_center_of_a_photo(side, shape):
    """The view of an evaluation at 56 pixels: shorter side 64, center crop."""
    height, width = shape
    if height > width and not TALL_AS_PILLOW:
        pytest.skip("needs Pillow 13 or later")
    image = picture(np.random.default_rng(height), height, width)
    size = (64, max(64, 64 * width // height)) if height < width else (max(64, 64 * height // width), 64)
    top, left = (size[0] - 56) // 2, (size[1] - 56) // 2
    out = torch.zeros(3, 56, 56, dtype=torch.uint8)
    resize_crop(image, size, (top, left), out=out)
    expected = pillow(image, size)[top : top + 56, left : left + 56]
    assert np.array_equal(out.permute(1, 2, 0).numpy(), expected)


def test_any_window_of_any_resize(side):
    rng = np.random.default_rng(5)
    for _ in range(15 if side == "reference" else 60):
        height, width = rng.integers(1, 90, 2)
        size = tuple(int(n) for n in rng.integers(1, 70, 2))
        if height - size[0] > 2 * (width - size[1]) and not TALL_AS_PILLOW:
            continue
        h, w = (int(rng.integers(1, n + 1)) for n in size)
        top, left = int(rng.integers(0, size[0] - h + 1)), int(rng.integers(0, size[1] - w + 1))
        image = picture(rng, height, width)
        out = torch.zeros(3, h, w, dtype=torch.uint8)
        resize_crop(image, size, (top, left), out=out)
        expected = pillow(image, size)[top : top + h, left : left + w]
        assert np.array_equal(out.permute(1, 2, 0).numpy(), expected), (height, width, size, top, left, h, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised(side, dtype):
    image = picture(np.random.default_rng(1), 40, 60)
    pixels, out = (
        torch.zeros(3, 20, 24, dtype=torch.uint8),
        torch.full((3, 20, 24), float("nan"), dtype=dtype),
    )
    for target in (pixels, out):
        resize_crop(image, (30, 45), (4, 9), out=target)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(out, ((pixels.float() / 255 - mean) / std).to(dtype))


def test_wrong_arguments_are_named(side):
    image, out = np.zeros((8, 9, 3), np.uint8), torch.zeros(3, 4, 4)
    with pytest.raises(TypeError, match="image"):
        resize_crop(image.astype(np.int32), (8, 8), (0, 0), out=out)
    with pytest.raises(ValueError, match="image"):
        resize_crop(image[:, ::2], (8, 8), (0, 0), out=out)
    for size, corner in (((8, 8), (5, 0)), ((8, 8), (0, -1)), ((0, 8), (0, 0)), ((3, 8), (0, 0))):
        with pytest.raises(ValueError, match="size, corner"):
            resize_crop(image, size, corner, out=out)
    with pytest.raises(TypeError, match="out"):
        resize_crop(image, (8, 8), (0, 0), out=out.double())
    for bad in (torch.zeros(4, 4, 3), torch.zeros(3, 4, 8)[..., ::2], torch.zeros(3, 0, 4)):
        with pytest.raises(ValueError, match="out"):
            resize_crop(image, (8, 8), (0, 0), out=bad)
    with pytest.raises(ValueError, match="mean, std"):
        resize_crop(image, (8, 8), (0, 0), out=out, std=(1, 0, 1))
