"""Multi-crop augmentation: decoded images and rows of random parameters in, normalised crops out.

Each crop goes through the steps of DINO's DataAugmentationDINO (Caron et al. 2021, section 3) as Pillow and
torchvision compute them, in 8 bits between the steps, so the result is the same to the bit:

    crop, antialiased bicubic resize to S x S, flip,
    brightness, contrast, saturation and hue in the order given, gray, Gaussian blur, solarize,
    (x / 255 - mean) / std

`multicrop` runs the C++ kernels of `csrc/` or, for crops on a GPU, the Triton kernels of `gpu/multicrop.py`;
`multicrop_reference` is the same in numpy and the specification.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import csrc
from .backend import resolve

# Columns of a parameter row.
Y, X, H, W = 0, 1, 2, 3  # crop box in source pixels, inside the image
FLIP = 4  # 1: mirror left to right
JITTER = 5  # 1: apply the four factors below
BRIGHTNESS, CONTRAST, SATURATION = 6, 7, 8  # factors >= 0, 1 changes nothing
HUE = 9  # in turns, -.5 ... .5
ORDER = 10  # index into ORDERS
GRAY = 11  # 1: three times the luma
SIGMA = 12  # standard deviation of the blur in pixels of the crop, 0 ... MAX_SIGMA; 0: no blur
SOLARIZE = 13  # 1: invert values of 128 and above
COLUMNS = 16  # the last two are 0

ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
MAX_SIGMA = 100.0
MAX_SIDE = 1 << 24  # of images: what float32, the type of the parameters, counts up to exactly
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def multicrop(
    images: Sequence[np.ndarray | Tensor],
    params: np.ndarray | Tensor,
    *,
    out: Sequence[Tensor],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    num_threads: int = 0,
) -> None:
    """Fills `out` with V crops of each of n images.

    `images`: n arrays or tensors, uint8 [height, width, 3], contiguous, any sizes, on the CPU or on the
    device of `out`.
    `params`: float32 [n, V, 16] on the CPU, see the columns above.
    `out`: V contiguous tensors [n, 3, S_v, S_v] of one dtype (float32, bfloat16, float16) on one device, CPU
    or CUDA, S_v >= 1.
    `mean`, `std`: per channel, of values in 0 ... 1. `num_threads`, on a CPU: 0 means
    `torch.get_num_threads()`.

    On a GPU the work is queued on the current stream, and the host does not wait for it: until it is done
    `images` there must stay as they are. Images of the host are uploaded, all in one copy; they and `params`
    may change at once.

    The result does not depend on the device, nor on the number of threads. Raises TypeError or ValueError
    naming the argument.
    """
    rows = _check(images, params, out, mean, std, num_threads)
    if not images or not out:
        return
    table = _normalize_table(mean, std, out[0].dtype)
    backend = resolve(out[0])
    if backend == "triton":
        from .gpu.multicrop import multicrop as on_gpu

        on_gpu(images, rows, out, table)
        return
    arrays = [_array(image) for image in images]
    lib = csrc.library() if backend == "cpu" else None
    if lib is None:
        _reference(arrays, rows, out, mean, std)
        return
    n, views = len(arrays), len(out)
    code = lib.fdk_multicrop(
        ctypes.c_int64(n),
        (ctypes.c_void_p * n)(*(a.ctypes.data for a in arrays)),
        (ctypes.c_int32 * (2 * n))(*(side for a in arrays for side in a.shape[:2])),
        ctypes.c_int64(views),
        ctypes.c_void_p(rows.ctypes.data),
        (ctypes.c_void_p * views)(*(t.data_ptr() for t in out)),
        (ctypes.c_int32 * views)(*(t.shape[-1] for t in out)),
        ctypes.c_void_p(table.data_ptr()),
        ctypes.c_int(table.element_size()),
        ctypes.c_int(num_threads or csrc.num_threads()),
    )
    csrc.check(code, "multicrop")


def multicrop_reference(
    images: Sequence[np.ndarray | Tensor],
    params: np.ndarray | Tensor,
    *,
    out: Sequence[Tensor],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> None:
    """`multicrop` in numpy: the specification, to the bit."""
    rows = _check(images, params, out, mean, std, 0)
    _reference([_array(image) for image in images], rows, out, mean, std)


def _reference(
    arrays: list[np.ndarray],
    rows: np.ndarray,
    out: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    for view, destination in enumerate(out):
        table = _normalize_table(mean, std, destination.dtype)
        for i, image in enumerate(arrays):
            crop = torch.from_numpy(augment(image, rows[i, view], destination.shape[-1]).astype(np.int64))
            for channel in range(3):
                destination[i, channel] = table[channel][crop[..., channel]]


def _normalize_table(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """What each 8-bit value v becomes, [3, 256]: (v / 255 - mean) / std in float32, rounded to dtype."""
    values = torch.arange(256, dtype=torch.float32, device="cpu").div(255)  # [256]
    rows = [values.sub(m).div(s) for m, s in zip(mean, std, strict=True)]
    return torch.stack(rows).to(dtype).contiguous()


# --- the specification --------------------------------------------------------------------------------------


def augment(image: np.ndarray, row: np.ndarray, size: int) -> np.ndarray:
    """One crop before normalisation: uint8 [height, width, 3], parameter row -> uint8 [size, size, 3]."""
    y, x, h, w = (int(v) for v in row[:4])
    crop = resize(image[y : y + h, x : x + w], size)
    if row[FLIP]:
        crop = crop[:, ::-1]
    if row[JITTER]:
        for column in ORDERS[int(row[ORDER])]:
            crop = _JITTER[column](crop, row[column])
    if row[GRAY]:
        crop = np.repeat(luma(crop)[..., None], 3, axis=-1)
    if row[SIGMA] > 0:
        crop = gaussian_blur(crop, row[SIGMA])
    if row[SOLARIZE]:
        crop = np.where(crop < 128, crop, 255 - crop)
    return crop


def resize(crop: np.ndarray, size: int) -> np.ndarray:
    """Bicubic with antialiasing along one axis, rounded to 8 bits, then along the other.

    Horizontally first, unless the height shrinks by more than twice what the width does: so does Pillow 13.
    """
    height, width = crop.shape[:2]
    vertical_first = height > size and height - size > 2 * (width - size)
    for axis in (0, 1) if vertical_first else (1, 0):
        crop = np.moveaxis(_resample(np.moveaxis(crop, axis, 0), size), 0, axis)
    return crop


def _resample(lines: np.ndarray, size: int) -> np.ndarray:
    weights = resample_weights(len(lines), size)
    # Products and sums stay below 2**53, so float64 is exact here and much faster than integers.
    total = np.tensordot(weights.astype(np.float64), lines.astype(np.float64), axes=1).astype(np.int64)
    return np.clip((total + (1 << 21)) >> 22, 0, 255).astype(np.uint8)


def resample_weights(length: int, size: int) -> np.ndarray:
    """Weight of every input in every output, int64 [size, length], in units of 2**-22.

    Keys' cubic convolution with a = -1/2, stretched when shrinking, cut at the border and normalised.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    center = (np.arange(size) + 0.5) * scale
    first = np.maximum((center - 2 * stretch + 0.5).astype(np.int64), 0)  # astype truncates, as C does
    last = np.minimum((center + 2 * stretch + 0.5).astype(np.int64), length)
    inputs = np.arange(length)
    d = np.abs((inputs - center[:, None] + 0.5) * (1.0 / stretch))
    near = (1.5 * d - 2.5) * d * d + 1
    far = (((d - 5) * d + 8) * d - 4) * -0.5
    weights = np.where(d < 1, near, np.where(d < 2, far, 0.0))
    weights[(inputs < first[:, None]) | (inputs >= last[:, None])] = 0.0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # cumsum adds from left to right
    scaled = weights * (1 << 22)
    return np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int64)


def luma(crop: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma with 16-bit weights, uint8 [..., 3] -> uint8 [...]."""
    return ((crop.astype(np.int32) @ np.array([19595, 38470, 7471], np.int32) + 32768) >> 16).astype(np.uint8)


def _blend(degenerate: np.ndarray | np.float32, crop: np.ndarray, factor: np.float32) -> np.ndarray:
    """degenerate + factor * (crop - degenerate) in float32, clipped and truncated."""
    base = np.asarray(degenerate, np.float32)
    return np.clip(base + np.float32(factor) * (crop.astype(np.float32) - base), 0, 255).astype(np.uint8)


def brightness(crop: np.ndarray, factor: np.float32) -> np.ndarray:
    return _blend(np.float32(0), crop, factor)


def contrast(crop: np.ndarray, factor: np.float32) -> np.ndarray:
    """About the rounded mean of the luma."""
    gray = luma(crop)
    return _blend(np.float32(int(gray.sum(dtype=np.int64) / gray.size + 0.5)), crop, factor)


def saturation(crop: np.ndarray, factor: np.float32) -> np.ndarray:
    return _blend(luma(crop)[..., None], crop, factor)


def hue(crop: np.ndarray, turns: np.float32) -> np.ndarray:
    """Adds turns * 255, truncated, to the 8-bit hue modulo 256, though a turn is 255: so does torchvision."""
    hsv = rgb_to_hsv(crop)
    hsv[..., 0] += np.uint8(hue_shift(turns))
    return hsv_to_rgb(hsv)


def hue_shift(turns: np.ndarray | np.float32) -> np.ndarray:
    """What to add to the 8-bit hue, 0 ... 255."""
    return (np.asarray(turns, np.float64) * 255).astype(np.int64) % 256


def rgb_to_hsv(rgb: np.ndarray) -> np.ndarray:
    """8-bit HSV. The types matter: quotients are rounded to float32, sums are float64, results truncated."""
    r, g, b = (rgb[..., c].astype(np.int32) for c in range(3))
    top, bottom = rgb.max(-1).astype(np.int32), rgb.min(-1).astype(np.int32)
    chroma = np.maximum(top - bottom, 1).astype(np.float32)
    rc, gc, bc = (((top - c).astype(np.float32) / chroma).astype(np.float64) for c in (r, g, b))
    sector = np.where(r == top, bc - gc, np.where(g == top, 2.0 + rc - bc, 4.0 + gc - rc)).astype(np.float32)
    turns = np.fmod(sector.astype(np.float64) / 6.0 + 1.0, 1.0).astype(np.float32)
    s = (top - bottom).astype(np.float32) / np.maximum(top, 1).astype(np.float32)
    h = np.where(top == bottom, 0, (turns.astype(np.float64) * 255.0).astype(np.int32))
    return np.stack([h, (s.astype(np.float64) * 255.0).astype(np.int32), top], -1).astype(np.uint8)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """Inverse of `rgb_to_hsv`, rounded half up; hue 255 is a full turn, as hue 0."""
    h, s, v = (hsv[..., c].astype(np.float64) for c in range(3))
    angle = h * 6.0 / 255.0
    sector = np.floor(angle)
    f = (angle - sector).astype(np.float32).astype(np.float64)
    fs = (s / 255.0).astype(np.float32)
    fs_f = (fs * f.astype(np.float32)).astype(np.float64)  # a float32 product
    fs = fs.astype(np.float64)
    p, q, t = v * (1.0 - fs), v * (1.0 - fs_f), v * (1.0 - fs * (1.0 - f))
    table = [(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)]
    which = sector.astype(np.int32) % 6
    rgb = np.stack([np.choose(which, [entry[c] for entry in table]) for c in range(3)], -1)
    return np.floor(rgb + 0.5).astype(np.uint8)


def gaussian_blur(crop: np.ndarray, sigma: np.float32) -> np.ndarray:
    """Three extended box filters (Gwosdek et al. 2011) along each axis, rounded to 8 bits; edges repeated."""
    radius, inner, outer = (int(v) for v in box_filter(sigma))
    for axis in (1, 0):
        lines = np.moveaxis(crop, axis, 0)
        at = np.clip(np.arange(len(lines))[:, None] + np.arange(-radius - 1, radius + 2), 0, len(lines) - 1)
        for _ in range(3):
            taps = lines[at].astype(np.int64)  # [length, 2 * radius + 3, ...]
            total = inner * taps[:, 1:-1].sum(1) + outer * (taps[:, 0] + taps[:, -1])
            lines = ((total + (1 << 23)) >> 24).astype(np.uint8)
        crop = np.moveaxis(lines, 0, axis)
    return crop


def box_filter(sigma: np.ndarray | np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer radius of the box; weights of the values inside and of the two beyond, in units of 2**-24."""
    f32, f64 = np.float32, np.float64
    sigma = np.asarray(sigma, f32)
    variance = sigma * sigma / f32(3)
    length = np.sqrt(12.0 * variance.astype(f64) + 1.0).astype(f32)
    whole = np.floor((length.astype(f64) - 1.0) / 2.0).astype(f32)
    part = (f32(2) * whole + f32(1)) * (whole * (whole + f32(1)) - f32(3) * variance)
    part = part / (f32(6) * (variance - (whole + f32(1)) * (whole + f32(1))))
    extended = whole + part
    radius = extended.astype(np.int64)
    inner = (f32(1 << 24) / (extended * f32(2) + f32(1))).astype(np.int64)
    return radius, inner, ((1 << 24) - (2 * radius + 1) * inner) // 2


_JITTER = {BRIGHTNESS: brightness, CONTRAST: contrast, SATURATION: saturation, HUE: hue}


# --- arguments ----------------------------------------------------------------------------------------------


def _check(
    images: Sequence[np.ndarray | Tensor],
    params: np.ndarray | Tensor,
    out: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    num_threads: int,
) -> np.ndarray:
    """The parameters as a contiguous array, once all is as documented."""
    _check_out(out, len(images))
    device = out[0].device if out else torch.device("cpu")
    for i, image in enumerate(images):
        _check_image(f"images[{i}]", image, device)
    for name, triple in (("mean", mean), ("std", std)):
        if len(triple) != 3 or not all(math.isfinite(v) for v in triple):
            raise ValueError(f"{name}: expected 3 finite numbers, got {tuple(triple)}")
    if not all(v > 0 for v in std):
        raise ValueError(f"std: expected numbers > 0, got {tuple(std)}")
    if not isinstance(num_threads, int):
        raise TypeError(f"num_threads: expected an int, got {type(num_threads).__name__}")
    if num_threads < 0:
        raise ValueError(f"num_threads: expected 0 or more, got {num_threads}")

    if isinstance(params, Tensor) and params.device.type != "cpu":
        raise ValueError(f"params: expected a CPU tensor, got {params.device}")
    rows = params.detach().numpy() if isinstance(params, Tensor) else params
    if not isinstance(rows, np.ndarray) or rows.dtype != np.float32:
        got = rows.dtype if isinstance(rows, np.ndarray) else type(rows).__name__
        raise TypeError(f"params: expected float32, got {got}")
    if rows.shape != (len(images), len(out), COLUMNS):
        raise ValueError(f"params: expected shape {[len(images), len(out), COLUMNS]}, got {list(rows.shape)}")
    _check_rows(rows, images)
    return np.ascontiguousarray(rows)


def _check_image(name: str, image: np.ndarray | Tensor, device: torch.device) -> None:
    if isinstance(image, Tensor):
        if image.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got {image.layout}")
        if image.device.type != "cpu" and image.device != device:
            also = "" if device.type == "cpu" else f" or one on {device}, as out[0]"
            raise ValueError(f"{name}: expected a CPU tensor{also}, got {image.device}")
        contiguous = image.is_contiguous()
    elif isinstance(image, np.ndarray):
        contiguous = image.flags.c_contiguous
    else:
        raise TypeError(f"{name}: expected a numpy array or a tensor, got {type(image).__name__}")
    if image.dtype not in (np.uint8, torch.uint8):
        raise TypeError(f"{name}: expected uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or max(image.shape) > MAX_SIDE:
        raise ValueError(
            f"{name}: expected shape [height, width, 3], sides up to {MAX_SIDE}, got {list(image.shape)}"
        )
    if not contiguous:
        strides = image.stride() if isinstance(image, Tensor) else image.strides
        raise ValueError(f"{name}: expected a contiguous image, got strides {strides}")


def _array(image: np.ndarray | Tensor) -> np.ndarray:
    return image.detach().cpu().numpy() if isinstance(image, Tensor) else image


def _check_out(out: Sequence[Tensor], n: int) -> None:
    for v, tensor in enumerate(out):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"out[{v}]: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"out[{v}]: expected a dense tensor, got {tensor.layout}")
        if tensor.device.type not in ("cpu", "cuda") or tensor.device != out[0].device:
            expected = "a CPU or CUDA tensor, all views on one device"
            raise ValueError(f"out[{v}]: expected {expected}, got {tensor.device}")
        if tensor.dtype not in DTYPES or tensor.dtype != out[0].dtype:
            one_of = ", ".join(str(d) for d in DTYPES)
            raise TypeError(f"out[{v}]: expected one of {one_of}, the same for all views, got {tensor.dtype}")
        shape = list(tensor.shape)
        if len(shape) != 4 or shape[:2] != [n, 3] or shape[2] != shape[3] or shape[3] == 0:
            raise ValueError(f"out[{v}]: expected shape [{n}, 3, S, S] with S >= 1, got {shape}")
        if not tensor.is_contiguous():
            raise ValueError(f"out[{v}]: expected a contiguous tensor, got strides {tensor.stride()}")


def _check_rows(rows: np.ndarray, images: Sequence[np.ndarray | Tensor]) -> None:
    def require(good: np.ndarray, what: str) -> None:
        if not good.all():
            image, view = np.argwhere(~good)[0]
            raise ValueError(f"params[{image}, {view}]: {what}, got {rows[image, view].tolist()}")

    require(np.isfinite(rows).all(-1), "expected finite numbers")
    box = rows[..., :4]
    require((box == np.floor(box)).all(-1), "expected a crop box y, x, h, w of whole pixels")
    sides = np.array([tuple(image.shape[:2]) for image in images], np.float32).reshape(-1, 1, 2)
    inside = (box[..., :2] >= 0) & (box[..., 2:] >= 1) & (box[..., :2] + box[..., 2:] <= sides)
    require(inside.all(-1), "expected a crop box y, x, h, w inside its image")
    require(rows[..., BRIGHTNESS : SATURATION + 1].min(-1) >= 0, "expected factors >= 0 in columns 6, 7, 8")
    turns = rows[..., HUE]
    require((turns >= -0.5) & (turns <= 0.5), "expected a hue of -0.5 to 0.5 in column 9")
    order = rows[..., ORDER]
    known = (order == np.floor(order)) & (order >= 0) & (order < len(ORDERS))
    require(known, "expected an order of 0 to 23 in column 10")
    sigma = rows[..., SIGMA]
    require((sigma >= 0) & (sigma <= MAX_SIGMA), f"expected a blur sigma of 0 to {MAX_SIGMA:g} in column 12")
