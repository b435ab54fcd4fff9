"""Resize of an image of which only a window is wanted, as Pillow's antialiased bicubic gives it to the bit.

    resized = image.resize((width', height'), BICUBIC);  out = resized[top : top + h, left : left + w]

computed for the window alone: each pass has the weights of its whole axis, and runs only over the outputs
that the window shows and the inputs that these need. So an evaluation's view (shorter side to 256, center
224) costs about what its 224 x 224 pixels cost. The order of the two passes is that of the whole image.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import csrc
from .backend import resolve
from .multicrop import IMAGENET_MEAN, IMAGENET_STD, MAX_SIDE, resample_weights

DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)


def resize_crop(
    image: np.ndarray | Tensor,
    size: tuple[int, int],
    corner: tuple[int, int],
    *,
    out: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> None:
    """Fills `out` with a window of the resized image.

    `image`: uint8 [height, width, 3], contiguous, on the CPU. `size`: height and width of the resized image.
    `corner`: row and column of the window's first pixel in it. `out`: contiguous CPU tensor [3, h, w]; uint8
    for pixels, float32, bfloat16 or float16 for (x / 255 - mean) / std.

    Runs on the calling thread alone and releases the interpreter's lock, so that images can be finished by
    several Python threads. Raises TypeError or ValueError naming the argument.
    """
    array = _check_image(image)
    _check_out(out)
    if len(size) != 2 or len(corner) != 2 or not all(isinstance(n, int) for n in (*size, *corner)):
        raise ValueError(f"size, corner: expected two whole numbers each, got {size!r} and {corner!r}")
    window = (*corner, *out.shape[1:])
    for axis, name in enumerate(("row", "column")):
        start, length, side = window[axis], window[2 + axis], size[axis]
        if not 1 <= side <= MAX_SIDE or start < 0 or start + length > side:
            raise ValueError(
                f"size, corner: expected a window inside the resized image, sides up to {MAX_SIDE}, "
                f"got {name}s {start} to {start + length} of {side}"
            )
    table = None if out.dtype == torch.uint8 else _table(tuple(mean), tuple(std), out.dtype)
    lib = csrc.library() if resolve(out) == "cpu" else None
    if lib is None:
        _reference(array, size, window, table, out)
        return
    code = lib.fdk_resize_crop(
        ctypes.c_void_p(array.ctypes.data),
        ctypes.c_int64(array.shape[0]),
        ctypes.c_int64(array.shape[1]),
        (ctypes.c_int32 * 2)(*size),
        (ctypes.c_int32 * 4)(*window),
        None if table is None else ctypes.c_void_p(table.data_ptr()),
        ctypes.c_int(out.element_size()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int(1),
    )
    csrc.check(code, "resize_crop")


def _reference(
    image: np.ndarray, size: tuple[int, int], window: tuple[int, ...], table: Tensor | None, out: Tensor
) -> None:
    """The specification: the whole image is resized, then cut."""
    height, width = image.shape[:2]
    vertical_first = height > size[0] and height - size[0] > 2 * (width - size[1])
    for axis in (0, 1) if vertical_first else (1, 0):
        weights = resample_weights(image.shape[axis], size[axis]).astype(np.float64)
        # Products and sums stay below 2**53, so float64 is exact here.
        total = np.tensordot(weights, np.moveaxis(image, axis, 0).astype(np.float64), axes=1).astype(np.int64)
        image = np.moveaxis(np.clip((total + (1 << 21)) >> 22, 0, 255).astype(np.uint8), 0, axis)
    top, left, rows, columns = window
    view = torch.from_numpy(image[top : top + rows, left : left + columns].astype(np.int64))
    for channel in range(3):
        out[channel] = view[..., channel] if table is None else table[channel][view[..., channel]]


@functools.lru_cache(maxsize=8)
def _table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """What each 8-bit value v becomes, [3, 256]: (v / 255 - mean) / std in float32, rounded to dtype."""
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise ValueError(f"mean, std: expected 3 numbers each, std > 0, got {mean} and {std}")
    with torch.inference_mode(False):  # the cache outlives an evaluation
        values = torch.arange(256, dtype=torch.float32, device="cpu").div(255)  # [256]
        rows = [values.sub(m).div(s) for m, s in zip(mean, std, strict=True)]
        return torch.stack(rows).to(dtype).contiguous()


def _check_image(image: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(image, Tensor) and (image.device.type != "cpu" or image.layout is not torch.strided):
        raise ValueError(f"image: expected a dense CPU tensor, got {image.layout} on {image.device}")
    array = image.numpy() if isinstance(image, Tensor) else image
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"image: expected uint8, got {got}")
    good = array.ndim == 3 and array.shape[2] == 3 and 0 not in array.shape and array.flags.c_contiguous
    if not good or max(array.shape) > MAX_SIDE:
        raise ValueError(
            f"image: expected a contiguous [height, width, 3], sides up to {MAX_SIDE}, "
            f"got {list(array.shape)} with strides {list(array.strides)}"
        )
    return array


def _check_out(out: Tensor) -> None:
    if not isinstance(out, Tensor) or out.layout is not torch.strided or out.dtype not in DTYPES:
        got = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"out: expected a tensor of {', '.join(str(d) for d in DTYPES)}, got {got}")
    if out.device.type != "cpu" or out.ndim != 3 or out.shape[0] != 3 or 0 in out.shape:
        raise ValueError(f"out: expected a CPU tensor [3, h, w], got {list(out.shape)} on {out.device}")
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
