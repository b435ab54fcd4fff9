"""How each crop is made: the random parameters of the official DINO augmentation, drawn by counting instead
of by state.

A crop's parameters depend on (seed, epoch, sample, view) and the image's size alone, through splitmix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). So they are the same
for any number of processes, threads and batches, and a resumed run needs no saved generator.

Distributions (DINO, Caron et al. 2021, appendix; torchvision's RandomResizedCrop, ColorJitter and
RandomGrayscale):

    crop        area uniform in the scale range, aspect ratio log-uniform in 3/4..4/3, ten attempts to fit
    into the image, else
                the largest central crop of an allowed ratio
    flip        p .5 jitter      p .8: brightness and contrast U(.6, 1.4), saturation U(.8, 1.2), hue U(-.1,
    .1) turns, in random order gray        p .2 blur        sigma U(.1, 2), p 1 for the first global view, .1
    for the second, .5 for local ones solarize    p .2 for the second global view
"""

from __future__ import annotations

import math

import numpy as np

from fastdino.config import CropConfig

# Columns of a parameter row, shared with fastdino_kernels.multicrop.
Y, X, H, W, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, SIGMA, SOLARIZE = range(14)
COLUMNS = 16

LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
ATTEMPTS = 10
BRIGHTNESS_STRENGTH, CONTRAST_STRENGTH, SATURATION_STRENGTH, HUE_STRENGTH = 0.4, 0.4, 0.2, 0.1
P_FLIP, P_JITTER, P_GRAY, P_SOLARIZE = 0.5, 0.8, 0.2, 0.2
P_BLUR_FIRST, P_BLUR_SECOND, P_BLUR_LOCAL = 1.0, 0.1, 0.5
SIGMA_MIN, SIGMA_MAX = 0.1, 2.0

# One number per draw: what a draw is used for must never depend on the outcome of another.
_BOX_DRAWS = 2 * ATTEMPTS  # area and ratio of attempt k: draws 2k and 2k + 1
_PLACE_DRAWS = _BOX_DRAWS  # y, then x
_COLOR_DRAWS = _PLACE_DRAWS + 2  # one for each column from FLIP to SOLARIZE, and one more:
_BLUR_COIN = SOLARIZE + 1  # whether to blur, beside how much


def crop_parameters(
    seed: int, epoch: int, sample_ids: np.ndarray, sizes: np.ndarray, crops: CropConfig
) -> np.ndarray:
    """Parameter rows of all crops of a batch: float32 [B, V, 16], two global views followed by local ones.

    `sample_ids` int [B]: index of each image in the manifest. `sizes` int [B, 2]: height and width in pixels.
    A row holds, in this order, the crop box y, x, h, w in pixels, flip, jitter flag, factors of brightness,
    contrast and saturation, hue in turns, order of the four (index into
    ``itertools.permutations(range(4))``), gray, blur sigma in pixels of the crop (0: no blur), solarize, and
    two unused zeros.
    """
    n_views = 2 + crops.local_crops_number
    keys = _stream_keys(seed, epoch, np.asarray(sample_ids), n_views)  # [B, V]
    sizes = np.asarray(sizes, np.int64)
    local = np.arange(n_views) >= 2

    rows = np.zeros((len(sizes), n_views, COLUMNS), np.float32)
    scales = np.where(local[:, None], crops.local_crops_scale, crops.global_crops_scale)  # [V, 2]
    rows[..., Y : W + 1] = _crop_boxes(keys, sizes[:, :1], sizes[:, 1:], scales[:, 0], scales[:, 1])

    uniform = _uniform(keys[..., None] + _offsets(_COLOR_DRAWS, _COLOR_DRAWS + 11))  # [B, V, 11]
    u = dict(zip(range(FLIP, _BLUR_COIN + 1), np.moveaxis(uniform, -1, 0), strict=True))  # [B, V] each
    rows[..., FLIP] = u[FLIP] < P_FLIP
    rows[..., JITTER] = u[JITTER] < P_JITTER
    rows[..., BRIGHTNESS] = 1 + BRIGHTNESS_STRENGTH * (2 * u[BRIGHTNESS] - 1)
    rows[..., CONTRAST] = 1 + CONTRAST_STRENGTH * (2 * u[CONTRAST] - 1)
    rows[..., SATURATION] = 1 + SATURATION_STRENGTH * (2 * u[SATURATION] - 1)
    rows[..., HUE] = HUE_STRENGTH * (2 * u[HUE] - 1)
    rows[..., ORDER] = np.floor(24 * u[ORDER])
    rows[..., GRAY] = u[GRAY] < P_GRAY
    p_blur = np.where(local, P_BLUR_LOCAL, P_BLUR_FIRST)  # [V]
    p_blur[1] = P_BLUR_SECOND
    rows[..., SIGMA] = np.where(u[_BLUR_COIN] < p_blur, SIGMA_MIN + (SIGMA_MAX - SIGMA_MIN) * u[SIGMA], 0)
    rows[:, 1, SOLARIZE] = u[SOLARIZE][:, 1] < P_SOLARIZE
    return rows


def _crop_boxes(
    keys: np.ndarray, height: np.ndarray, width: np.ndarray, scale_low: np.ndarray, scale_high: np.ndarray
) -> np.ndarray:
    """Boxes y, x, h, w of torchvision's RandomResizedCrop for keys [B, V], sizes [B, 1], scales [V]: int64
    [B, V, 4]."""
    shape = keys.shape
    keys, height, width, scale_low, scale_high = (
        np.broadcast_to(values, shape).ravel() for values in (keys, height, width, scale_low, scale_high)
    )

    h, w = _central_fallback(height, width)
    central_y, central_x = (height - h) // 2, (width - w) // 2
    undecided = np.arange(keys.size)
    for attempt in range(ATTEMPTS):
        u = _uniform(keys[undecided, None] + _offsets(2 * attempt, 2 * attempt + 2))
        low, high = scale_low[undecided], scale_high[undecided]
        area = (height[undecided] * width[undecided]) * (low + (high - low) * u[:, 0])
        ratio = np.exp(LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0]) * u[:, 1])
        try_w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        try_h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (0 < try_w) & (try_w <= width[undecided]) & (0 < try_h) & (try_h <= height[undecided])
        h[undecided[fits]], w[undecided[fits]] = try_h[fits], try_w[fits]
        undecided = undecided[~fits]
        if not undecided.size:
            break

    # A crop that fits lies anywhere, at one of (height - h + 1) by (width - w + 1) places; the fallback lies
    # in the middle.
    u = _uniform(keys[:, None] + _offsets(_PLACE_DRAWS, _PLACE_DRAWS + 2))
    y = (u[:, 0] * (height - h + 1)).astype(np.int64)
    x = (u[:, 1] * (width - w + 1)).astype(np.int64)
    y[undecided], x[undecided] = central_y[undecided], central_x[undecided]
    return np.stack([y, x, h, w], axis=-1).reshape(*shape, 4)


def _central_fallback(height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the largest box of an allowed aspect ratio in images of the given sizes."""
    narrow, wide = math.exp(LOG_RATIO[0]), math.exp(LOG_RATIO[1])
    ratio = width / height
    h = np.where(ratio < narrow, np.rint(width / narrow), height).astype(np.int64)
    w = np.where(ratio > wide, np.rint(height * wide), width).astype(np.int64)
    return h, w


# -------------------------------------------------------------------------------------- counter-based numbers


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """The output function of splitmix64, a bijection of uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream_keys(seed: int, epoch: int, sample_ids: np.ndarray, n_views: int) -> np.ndarray:
    """One splitmix64 state per crop: uint64 [B, V]. Each word is absorbed by a full mix, so near inputs are
    unrelated."""
    key = np.zeros(1, np.uint64)
    for word in (seed, epoch):
        key = _mix(key + _GOLDEN + np.array([word % 2**64], np.uint64))
    key = _mix(key + _GOLDEN + sample_ids.astype(np.uint64))  # [B]
    return _mix(key[:, None] + _GOLDEN + np.arange(n_views, dtype=np.uint64))


def _offsets(first: int, last: int) -> np.ndarray:
    """What to add to a key to get the states of draws first..last-1 of its stream."""
    return np.arange(first + 1, last + 1, dtype=np.uint64) * _GOLDEN


def _uniform(state: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) from splitmix64 states."""
    return (_mix(state) >> np.uint64(11)) * 2.0**-53
