"""The crops equal those of Pillow and torchvision bit for bit, step by step and as a whole.

torchvision itself is not needed: its functions on PIL images are few lines around Pillow, written out here.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import PIL
import pytest
import torch
from fastdino_kernels import backend
from fastdino_kernels.multicrop import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    multicrop,
    multicrop_reference,
)
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

# Before Pillow 13 every resize went horizontally first; now very tall boxes do not.
TALL_AS_PILLOW = int(PIL.__version__.split(".")[0]) >= 13
BACKENDS = ["reference", "plain", "avx2", "avx512"]


@pytest.fixture(params=BACKENDS)
def run(request):
    """`multicrop` on one implementation. Levels that the processor lacks run as the best it has."""
    if request.param == "reference":
        with backend("reference"):
            yield multicrop
        return
    library = request.getfixturevalue("library")
    library.fdk_multicrop_limit_simd(BACKENDS.index(request.param) - 1)
    yield multicrop
    library.fdk_multicrop_limit_simd(2)


@pytest.fixture(params=BACKENDS[1:])
def level(request, library):
    """Limits the C++ kernels to what this kind of processor has; its number."""
    number = BACKENDS.index(request.param) - 1
    library.fdk_multicrop_limit_simd(number)
    yield number
    library.fdk_multicrop_limit_simd(2)


def pillow_hue(image: Image.Image, turns: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    shifted = np.array(h) + np.int32(turns * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), s, v)).convert("RGB")


PILLOW = {
    BRIGHTNESS: lambda image, f: ImageEnhance.Brightness(image).enhance(f),
    CONTRAST: lambda image, f: ImageEnhance.Contrast(image).enhance(f),
    SATURATION: lambda image, f: ImageEnhance.Color(image).enhance(f),
    HUE: pillow_hue,
}


def pillow(image: np.ndarray, row: np.ndarray, size: int) -> np.ndarray:
    """The official augmentation of one crop before ToTensor: uint8 [size, size, 3]."""
    y, x, h, w = (int(v) for v in row[:4])
    crop = Image.fromarray(image).crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)
    if row[FLIP]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if row[JITTER]:
        for column in ORDERS[int(row[ORDER])]:
            crop = PILLOW[column](crop, float(row[column]))
    if row[GRAY]:
        gray = crop.convert("L")
        crop = Image.merge("RGB", (gray, gray, gray))
    if row[SIGMA] > 0:
        crop = crop.filter(ImageFilter.GaussianBlur(float(row[SIGMA])))
    if row[SOLARIZE]:
        crop = ImageOps.solarize(crop, 128)
    return np.array(crop)


def to_tensor(crop: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """ToTensor and Normalize."""
    tensor = torch.from_numpy(crop).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return tensor.sub(mean).div(std).to(dtype)


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise, or black and white noise (the most that a filter can overshoot), or smooth colours."""
    kind = rng.integers(3)
    if kind == 2:
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        return np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return noise if kind == 0 else (noise > 127).astype(np.uint8) * np.uint8(255)


def whole(image: np.ndarray) -> np.ndarray:
    """A row that takes the whole image and changes nothing else."""
    row = np.zeros(COLUMNS, np.float32)
    row[2:4] = image.shape[:2]
    row[BRIGHTNESS : SATURATION + 1] = 1
    return row


def random_box(rng: np.random.Generator, row: np.ndarray, height: int, width: int, size: int) -> None:
    """A box anywhere, or one that touches a border of the image."""
    h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
    if h - size > 2 * (w - size) and not TALL_AS_PILLOW:
        h = min(h, w)
    row[:4] = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    if rng.random() < 0.3:
        row[:2] = height - h, width - w


def random_row(rng: np.random.Generator, height: int, width: int, size: int) -> np.ndarray:
    row = np.zeros(COLUMNS, np.float32)
    random_box(rng, row, height, width, size)
    row[[FLIP, JITTER]] = rng.integers(0, 2, 2)
    row[BRIGHTNESS : SATURATION + 1] = rng.uniform(0.4, 1.6, 3)
    row[[HUE, ORDER]] = rng.uniform(-0.5, 0.5), rng.integers(24)
    row[[GRAY, SOLARIZE]] = rng.random(2) < 0.2
    row[SIGMA] = rng.choice([0, rng.uniform(0.1, 2)])
    return row


def bytes_of(run, image: np.ndarray, row: np.ndarray, size: int) -> np.ndarray:
    """The crop before normalisation: uint8 [size, size, 3]."""
    out = torch.full((1, 3, size, size), float("nan"))
    run([image], row.reshape(1, 1, COLUMNS), out=[out], mean=(0, 0, 0), std=(1 / 255,) * 3)
    return out[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


def assert_equals_pillow(run, image: np.ndarray, row: np.ndarray, size: int) -> None:
    got, expected = bytes_of(run, image, row, size).astype(int), pillow(image, row, size).astype(int)
    worst = abs(got - expected).max()
    assert worst == 0, f"image {image.shape}, size {size}, off by up to {worst}, row {row.tolist()}"


# --- step by step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_resize(run, seed):
    rng = np.random.default_rng(seed)
    for _ in range(30):
        height, width = (int(v) for v in np.exp(rng.uniform(0, np.log(300), 2)))
        size = int(np.exp(rng.uniform(0, np.log(80))))
        image, row = picture(rng, height, width), np.zeros(COLUMNS, np.float32)
        random_box(rng, row, height, width, size)
        assert_equals_pillow(run, image, row, size)


@pytest.mark.parametrize(
    "height, width, size",
    [
        (1, 1, 1),
        (1, 1, 17),
        (2, 2, 224),
        (500, 3, 96),
        (3, 500, 96),
        (1200, 1000, 20),  # scale 50: more taps than a vector
        (1500, 1600, 224),  # scale 7: outputs too far apart for one vector
        (375, 500, 224),
        (224, 224, 224),
        (224, 96, 224),
        (60, 900, 1),
    ],
)
def test_resize_extremes(run, height, width, size):
    if height - size > 2 * (width - size) and not TALL_AS_PILLOW:
        pytest.skip("Pillow before 13 resizes tall images in the other order")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for image in (noise, (noise > 127).astype(np.uint8) * np.uint8(255)):
        assert_equals_pillow(run, image, whole(image), size)


@pytest.mark.skipif(not TALL_AS_PILLOW, reason="needs Pillow 13 or later")
def test_order_of_the_passes(run):
    """Where Pillow changes the order: the height shrinks by more than twice what the width does."""
    rng = np.random.default_rng(0)
    size = 20
    for height, width in [(40, 30), (41, 30), (40, 29), (21, 20), (21, 19), (20, 10), (19, 5), (25, 10)]:
        image = rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)
        assert_equals_pillow(run, image, whole(image), size)


def test_flip_gray_solarize(run):
    rng = np.random.default_rng(0)
    for column in (FLIP, GRAY, SOLARIZE):
        for size in (1, 5, 16, 33, 64):
            image = picture(rng, 20, 40)
            row = whole(image)
            row[column] = 1
            assert_equals_pillow(run, image, row, size)


@pytest.mark.parametrize("column", [BRIGHTNESS, CONTRAST, SATURATION])
def test_enhancers(run, column):
    rng = np.random.default_rng(column)
    for factor in [0, 1, 2, 0.6, 1.4, *rng.uniform(0, 3, 15)]:
        image = picture(rng, *rng.integers(1, 50, 2))
        row = whole(image)
        row[[JITTER, column]] = 1, factor
        assert_equals_pillow(run, image, row, int(rng.integers(1, 50)))


def test_contrast_rounds_the_mean_half_up(run):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8] = 101  # mean luma 50.5
    row = whole(image)
    row[[JITTER, CONTRAST]] = 1, 0
    assert (bytes_of(run, image, row, 16) == 51).all()
    assert_equals_pillow(run, image, row, 16)


def test_hue(run):
    rng = np.random.default_rng(0)
    for turns in [0, 0.5, -0.5, 0.0039, -0.0039, 0.1, -0.1, *rng.uniform(-0.5, 0.5, 15)]:
        image = picture(rng, *rng.integers(1, 60, 2))
        row = whole(image)
        row[[JITTER, HUE]] = 1, turns
        assert_equals_pillow(run, image, row, int(rng.integers(1, 60)))


def test_hue_of_all_colours(level):
    """Each of the 2**24 colours, with another shift on each level."""
    colours = np.arange(1 << 24, dtype=np.uint32).reshape(16, 1024, 1024)
    table = [(colours >> shift).astype(np.uint8) for shift in (16, 8, 0)]
    images = list(np.ascontiguousarray(np.stack(table, -1)))
    row = whole(images[0])
    row[JITTER] = 1
    row[HUE] = 0.06 * level
    out = torch.empty(1, 3, 1024, 1024, dtype=torch.float16)  # holds 0 ... 255 exactly
    for image in images:
        multicrop([image], row.reshape(1, 1, COLUMNS), out=[out], mean=(0, 0, 0), std=(1 / 255,) * 3)
        expected = torch.from_numpy(np.array(pillow_hue(Image.fromarray(image), float(row[HUE]))))
        assert torch.equal(out[0].permute(1, 2, 0).round().to(torch.uint8), expected)


def test_blur(run):
    rng = np.random.default_rng(0)
    for sigma in [0.001, 0.1, 1, 1.4142135, 1.4142137, 2, *rng.uniform(0.1, 2, 15), *rng.uniform(2, 30, 5)]:
        image = picture(rng, *rng.integers(1, 60, 2))
        row = whole(image)
        row[SIGMA] = sigma
        assert_equals_pillow(run, image, row, int(rng.integers(1, 70)))  # often less than the filter is wide


# --- as a whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_whole_chain(run, dtype):
    rng = np.random.default_rng(0)
    sizes, n = (48, 96, 31, 1), 12
    images = [picture(rng, *rng.integers(1, 200, 2)) for _ in range(n)]
    rows = np.array([[random_row(rng, *image.shape[:2], size) for size in sizes] for image in images])
    out = [torch.full((n, 3, size, size), float("nan"), dtype=dtype) for size in sizes]
    run(images, rows, out=out)
    for i, image in enumerate(images):
        for v, size in enumerate(sizes):
            expected = to_tensor(pillow(image, rows[i, v], size), dtype)
            assert torch.equal(out[v][i], expected), f"image {i}, view {v}, row {rows[i, v].tolist()}"


def test_all_orders_of_the_jitter(run):
    rng = np.random.default_rng(0)
    image = picture(rng, 30, 30)
    outcomes = set()
    for order in range(24):
        row = whole(image)
        row[[JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER]] = 1, 1.4, 1.3, 0.7, 0.1, order
        assert_equals_pillow(run, image, row, 24)
        outcomes.add(bytes_of(run, image, row, 24).tobytes())
    assert len(outcomes) > 12


def test_views_may_share_a_buffer_and_nothing_else_is_written(run):
    rng = np.random.default_rng(0)
    images = [picture(rng, 30, 40) for _ in range(3)]
    rows = np.array([[random_row(rng, 30, 40, 13) for _ in range(4)] for _ in images])
    guarded = torch.full((6, 3, 3, 13, 13), 7.0)
    run(images, rows, out=list(guarded[1:5].unbind(0)))
    assert (guarded[0] == 7).all() and (guarded[5] == 7).all()
    alone = [torch.empty(3, 3, 13, 13) for _ in range(4)]
    run(images, rows, out=alone)
    assert torch.equal(guarded[1:5], torch.stack(alone))


def test_unaligned_output(run):
    rng = np.random.default_rng(0)
    image = picture(rng, 30, 40)
    row = random_row(rng, 30, 40, 17).reshape(1, 1, COLUMNS)
    expected = torch.empty(1, 3, 17, 17)
    run([image], row, out=[expected])
    odd = torch.empty(3 * 17 * 17 + 1)[1:].view(1, 3, 17, 17)
    run([image], row, out=[odd])
    assert torch.equal(odd, expected)


def test_tensors_equal_arrays(run):
    rng = np.random.default_rng(0)
    image = picture(rng, 30, 40)
    row = random_row(rng, 30, 40, 17).reshape(1, 1, COLUMNS)
    a, b = torch.empty(1, 3, 17, 17), torch.empty(1, 3, 17, 17)
    run([image], row, out=[a])
    run([torch.from_numpy(image)], torch.from_numpy(row), out=[b])
    assert torch.equal(a, b)


def test_reference_is_the_reference_backend():
    rng = np.random.default_rng(0)
    image = picture(rng, 30, 40)
    row = random_row(rng, 30, 40, 17).reshape(1, 1, COLUMNS)
    a, b = torch.empty(1, 3, 17, 17), torch.empty(1, 3, 17, 17)
    multicrop_reference([image], row, out=[a])
    with backend("reference"):
        multicrop([image], row, out=[b])
    assert torch.equal(a, b)


def test_independent_of_threads(library):
    rng = np.random.default_rng(0)
    sizes, n = (64, 32, 32), 9
    images = [picture(rng, *rng.integers(1, 300, 2)) for _ in range(n)]
    rows = np.array([[random_row(rng, *image.shape[:2], size) for size in sizes] for image in images])
    outcomes = []
    for threads in (1, 2, 3, 16):
        out = [torch.full((n, 3, size, size), float("nan")) for size in sizes]
        multicrop(images, rows, out=out, num_threads=threads)
        outcomes.append(out)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_reads_nothing_beyond_the_image(level):
    """The image ends where readable memory ends: one byte further is a crash."""
    rng = np.random.default_rng(0)
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 16 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert (
        libc.mprotect(ctypes.c_void_p(start + 15 * page), ctypes.c_size_t(page), mmap_none := 0) == mmap_none
    )
    for height, width, size in [
        (1, 1, 3),
        (7, 5, 20),
        (60, 100, 32),
        (100, 60, 32),
        (3, 2000, 5),
        (1500, 2, 5),
    ]:
        count = 3 * height * width
        flat = np.frombuffer(memory, np.uint8, count, 15 * page - count)
        flat[:] = rng.integers(0, 256, count)
        image = flat.reshape(height, width, 3)
        row = whole(image)
        assert (bytes_of(multicrop, image, row, size) == bytes_of(multicrop, image.copy(), row, size)).all()


def test_nothing_to_do(run):
    run([], np.zeros((0, 2, COLUMNS), np.float32), out=[torch.empty(0, 3, 8, 8), torch.empty(0, 3, 4, 4)])
    run([np.zeros((5, 5, 3), np.uint8)], np.zeros((1, 0, COLUMNS), np.float32), out=[])


# --- arguments ---------------------------------------------------------------------------------------------


def arguments():
    image = np.zeros((10, 20, 3), np.uint8)
    return {
        "images": [image],
        "params": whole(image).reshape(1, 1, COLUMNS),
        "out": [torch.zeros(1, 3, 8, 8)],
    }


def row_with(column: int, value: float) -> np.ndarray:
    params = arguments()["params"]
    params[0, 0, column] = value
    return params


BAD_TYPES = [
    ({"images": [[1]]}, r"images\[0\]: expected a numpy array or a tensor, got list"),
    ({"images": [np.zeros((9, 9, 3))]}, r"images\[0\]: expected uint8, got float64"),
    ({"params": np.zeros((1, 1, COLUMNS))}, "params: expected float32, got float64"),
    ({"params": [[[0] * COLUMNS]]}, "params: expected float32, got list"),
    ({"out": [torch.zeros(1, 3, 8, 8).double()]}, r"out\[0\]: expected one of .* got torch.float64"),
    ({"out": [np.zeros((1, 3, 8, 8))]}, r"out\[0\]: expected a tensor, got ndarray"),
    ({"num_threads": 1.5}, "num_threads: expected an int, got float"),
]
BAD_VALUES = [
    ({"images": [np.zeros((9, 9), np.uint8)]}, r"images\[0\]: expected shape .* got \[9, 9\]"),
    ({"images": [np.zeros((0, 9, 3), np.uint8)]}, r"images\[0\]: expected shape .* got \[0, 9, 3\]"),
    ({"images": [np.zeros((9, 9, 3), np.uint8)[:, ::2]]}, r"images\[0\]: expected a contiguous image"),
    ({"images": [torch.zeros(9, 9, 3, device="meta")]}, r"images\[0\]: expected a CPU tensor, got meta"),
    ({"params": np.zeros((1, 2, COLUMNS), np.float32)}, r"params: expected shape \[1, 1, 16\]"),
    ({"out": [torch.zeros(1, 3, 8, 9)]}, r"out\[0\]: expected shape \[1, 3, S, S\].* got \[1, 3, 8, 9\]"),
    ({"out": [torch.zeros(2, 3, 8, 8)]}, r"out\[0\]: expected shape"),
    ({"out": [torch.zeros(1, 3, 0, 0)]}, r"out\[0\]: expected shape .* S >= 1"),
    ({"out": [torch.zeros(1, 3, 8, 16)[..., ::2]]}, r"out\[0\]: expected a contiguous tensor"),
    (
        {"out": [torch.zeros(1, 3, 8, 8, device="meta")]},
        r"out\[0\]: expected a CPU or CUDA .* got meta",
    ),
    ({"params": torch.zeros(1, 1, COLUMNS, device="meta")}, "params: expected a CPU tensor, got meta"),
    ({"mean": (0.5, 0.5)}, "mean: expected 3 finite numbers"),
    ({"std": (1, 1, 0)}, "std: expected numbers > 0"),
    ({"num_threads": -1}, "num_threads: expected 0 or more, got -1"),
    ({"params": row_with(0, 1)}, r"params\[0, 0\]: expected a crop box .* inside its image"),
    ({"params": row_with(1, -1)}, "inside its image"),
    ({"params": row_with(2, 0)}, "inside its image"),
    ({"params": row_with(3, 21)}, "inside its image"),
    ({"params": row_with(3, 7.5)}, "whole pixels"),
    ({"params": row_with(CONTRAST, -0.1)}, "factors >= 0"),
    ({"params": row_with(HUE, 0.6)}, "hue of -0.5 to 0.5"),
    ({"params": row_with(ORDER, 24)}, "order of 0 to 23"),
    ({"params": row_with(ORDER, 0.5)}, "order of 0 to 23"),
    ({"params": row_with(SIGMA, -1)}, "blur sigma of 0 to 100"),
    ({"params": row_with(SIGMA, float("nan"))}, "finite numbers"),
]


@pytest.mark.parametrize(
    "change, error, message",
    [(change, TypeError, message) for change, message in BAD_TYPES]
    + [(change, ValueError, message) for change, message in BAD_VALUES],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        multicrop(**{**arguments(), **change})


def test_bad_argument_leaves_the_output_alone():
    given = arguments()
    given["out"][0].fill_(7)
    given["params"][0, 0, ORDER] = 99
    with pytest.raises(ValueError):
        multicrop(**given)
    assert (given["out"][0] == 7).all()
