"""Triton form of :mod:`fastdino_kernels.multicrop`: ten launches for all crops of a batch.

Weights of the resize; its first pass; its second pass with the jitter up to the contrast and the sum of the
luma that the contrast needs; the rest of the jitter and gray; six passes of the blur, for the crops that have
one. The last pass over a crop also solarizes, normalises and writes it; all that is stored before is 8-bit.

The host knows every size, so it lists all programs (a table and entries, see `multicrop_kernels`) and sends
the list in one copy from pinned memory; nothing waits for the device. Scratch memory is bounded by `SCRATCH`
bytes, or by what the largest crop alone needs: beyond that the crops go through the launches in groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..multicrop import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    JITTER,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    H,
    W,
    box_filter,
    hue_shift,
)
from . import multicrop_kernels as kernels
from .launch import Launch, on_device_of
from .multicrop_kernels import (
    FIELDS,
    _blur_kernel,
    _color_kernel,
    _first_pass_kernel,
    _second_pass_kernel,
    _weights_kernel,
)

SCRATCH = 256 << 20  # bytes
BLOCK = 512  # pixels of a program
WEIGHTS_BLOCK = 128  # outputs
WARPS = 4
ALIGNMENT = 16


@dataclass(frozen=True)
class Group:
    """Crops that share the scratch memory: where their entries of each kind begin, and how many there are."""

    weights: tuple[int, int]
    first_pass: tuple[int, int]
    pixels: tuple[int, int]
    blurred: int  # the first of the pixels' entries: those of the crops to blur
    bytes: int  # of scratch
    items: int  # of weights


@dataclass(frozen=True)
class Plan:
    """``table``: int64, the rows of all crops, then the entries of all groups."""

    table: np.ndarray
    n: int  # crops
    groups: list[Group]


def multicrop(
    images: Sequence[np.ndarray | Tensor], params: np.ndarray, out: Sequence[Tensor], values: Tensor
) -> None:
    """Fill ``out`` from checked arguments; ``values`` [3, 256], on the CPU: what each 8-bit value becomes."""
    device = out[0].device
    with on_device_of(out[0]):
        if device.type == "cuda":
            images = _uploaded(images, device)
        addresses = np.array([_address(image) for image in images])
        sides = np.array([tuple(image.shape[:2]) for image in images])
        starts = np.array([view.data_ptr() for view in out])
        pitches = np.array([view[0].numel() * view.element_size() for view in out])
        outs = starts + np.arange(len(images))[:, None] * pitches
        made = plan(addresses, sides, params, outs, np.array([view.shape[-1] for view in out]))
        head = values.reshape(-1).view(torch.int64)
        sent = torch.cat([head, torch.from_numpy(made.table)])
        if device.type == "cuda":  # torch reuses the pinned memory only after the copy
            sent = sent.pin_memory().to(device, non_blocking=True)
        _launch(made, sent[len(head) :], sent[: len(head)].view(_item(values)))


def plan(
    addresses: np.ndarray, sides: np.ndarray, params: np.ndarray, outs: np.ndarray, sizes: np.ndarray
) -> Plan:
    """The table and the groups, at most `SCRATCH` bytes of scratch and weights each or a single crop.

    ``addresses`` int64 [n] and ``sides`` [n, 2] (height, width) of the images, ``params`` [n, V, 16],
    ``outs`` int64 [n, V] addresses of the crops, ``sizes`` [V].
    """
    table, memory = _rows(addresses, sides, params, outs, sizes)
    n = len(table)
    spare, planes, items = memory[:, 0], memory[:, 1], memory[:, 2:]
    size, blurred = table[:, kernels.SIZE], table[:, kernels.BLURRED] != 0
    ends = (spare + planes + 4 * items.sum(1)).cumsum()
    parts: list[np.ndarray] = []
    groups: list[Group] = []
    begin = table.size

    def entries(crops: np.ndarray, counts: np.ndarray) -> tuple[int, int]:
        nonlocal begin
        numbers = np.arange(counts.sum()) - np.repeat(_starts(counts), counts)
        parts.append((np.repeat(crops, counts) << 32) + numbers)
        begin += len(numbers)
        return begin - len(numbers), len(numbers)

    end = 0
    while end < n:
        first, done = end, ends[end - 1] if end else 0
        end = max(first + 1, int(np.searchsorted(ends, done + SCRATCH, side="right")))
        crops, part = np.arange(first, end), slice(first, end)
        offsets = _starts(memory[part, :2].ravel()).reshape(-1, 2)
        table[part, kernels.SPARE], table[part, kernels.PLANES] = offsets.T
        table[part, kernels.WEIGHTS : kernels.WEIGHTS + 2] = _starts(items[part].ravel()).reshape(-1, 2)
        blocks = -(-(size[part] ** 2) // BLOCK)
        groups.append(
            Group(
                entries(crops, 2 * -(-size[part] // WEIGHTS_BLOCK)),
                entries(crops, -(-_first_pass(table[part]) // BLOCK)),
                entries(crops, blocks),
                blurred=int(blocks[blurred[part]].sum()),
                bytes=int(memory[part, :2].sum()),
                items=int(items[part].sum()),
            )
        )
    return Plan(np.concatenate([table.ravel(), *parts]), n, groups)


def _rows(
    addresses: np.ndarray, sides: np.ndarray, params: np.ndarray, outs: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all crops, those with blur first, but for their places in the scratch memory; what they need of
    it: bytes of the spare planes and of the planes, items of the weights across and down, [n * V, 4]."""
    n, views = params.shape[:2]
    flat = params.reshape(n * views, -1)
    order = np.argsort(flat[:, SIGMA] == 0, kind="stable")
    row, image, view = flat[order], order // views, order % views
    y, x, height, width = row[:, :4].astype(np.int64).T
    size, pitch = sizes[view].astype(np.int64), 3 * sides[image, 1].astype(np.int64)
    lengths = np.stack([width, height], 1)
    taps = 2 * np.ceil(2 * np.maximum(lengths / size[:, None], 1)).astype(np.int64) + 1
    jittered, blurred = row[:, JITTER] != 0, row[:, SIGMA] > 0
    steps = np.array(ORDERS)[row[:, ORDER].astype(np.int64)] - BRIGHTNESS  # [n * V, 4]
    factors = np.ascontiguousarray(row[:, BRIGHTNESS : SATURATION + 1])

    table = np.zeros((n * views, FIELDS), np.int64)
    table[:, kernels.IMAGE] = addresses[image] + y * pitch + 3 * x
    table[:, kernels.PITCH] = pitch
    table[:, kernels.SIZE] = size
    table[:, kernels.OUT] = outs[image, view]
    table[:, kernels.TALL] = (height > size) & (height - size > 2 * (width - size))
    table[:, kernels.LENGTHS : kernels.LENGTHS + 2] = lengths
    table[:, kernels.TAPS : kernels.TAPS + 2] = taps
    table[:, kernels.FLIP] = row[:, FLIP] != 0
    table[:, kernels.ORDER] = (steps << np.arange(0, 8, 2)).sum(1)
    table[:, kernels.BEFORE] = np.where(jittered, (steps == CONTRAST - BRIGHTNESS).argmax(1), 0)
    table[:, kernels.STEPS] = np.where(jittered, 4, 0)
    table[:, kernels.FACTORS : kernels.FACTORS + 3] = factors.view(np.int32)
    table[:, kernels.SHIFT] = hue_shift(row[:, HUE])
    table[:, kernels.GRAY] = row[:, GRAY] != 0
    table[:, kernels.BLURRED] = blurred
    table[:, kernels.RADIUS : kernels.OUTER + 1] = np.stack(box_filter(row[:, SIGMA]), 1)
    table[:, kernels.SOLARIZE] = row[:, SOLARIZE] != 0

    between, pixels = _first_pass(table), size * size
    if max(between.max(), pixels.max()) >= 2**31:
        raise ValueError("out: expected fewer than 2**31 pixels in a crop and between passes")
    spare = np.where(blurred, np.maximum(between, pixels), between)
    memory = np.stack([3 * spare, 3 * pixels, *((2 + taps) * size[:, None]).T], 1)
    memory[:, :2] = -(-memory[:, :2] // ALIGNMENT) * ALIGNMENT
    return table, memory


def _first_pass(table: np.ndarray) -> np.ndarray:
    """Outputs of each channel between the two passes of the resize."""
    tall = table[:, kernels.TALL] != 0
    width, height = table[:, kernels.LENGTHS : kernels.LENGTHS + 2].T
    return np.where(tall, width, height) * table[:, kernels.SIZE]


def _launch(made: Plan, table: Tensor, values: Tensor) -> None:
    new = table.new_empty
    scratch = new(max(group.bytes for group in made.groups), dtype=torch.uint8)
    weights = new(max(group.items for group in made.groups), dtype=torch.int32)
    sums = table.new_zeros(made.n)
    # Without contraction: see multicrop_kernels.
    how = dict(FIELDS=FIELDS, num_warps=WARPS, enable_fp_fusion=False)
    for group in made.groups:
        start, count = group.weights
        _weights_kernel[(count,)](table, weights, start, BLOCK=WEIGHTS_BLOCK, **how)
        start, count = group.first_pass
        _first_pass_kernel[(count,)](table, weights, scratch, start, BLOCK=BLOCK, **how)
        start, count = group.pixels
        _second_pass_kernel[(count,)](table, weights, scratch, sums, start, BLOCK=BLOCK, **how)
        _color_kernel[(count,)](table, values, scratch, sums, start, BLOCK=BLOCK, **how)
        for number in range(6 if group.blurred else 0):
            _blur_kernel[(group.blurred,)](table, values, scratch, start, number, BLOCK=BLOCK, **how)


def _starts(counts: np.ndarray) -> np.ndarray:
    return counts.cumsum() - counts


def _item(values: Tensor) -> torch.dtype:
    """Values are only moved, so as integers: sm_70 has no bfloat16."""
    return torch.int32 if values.element_size() == 4 else torch.int16


def _address(image: np.ndarray | Tensor) -> int:
    return image.data_ptr() if isinstance(image, Tensor) else image.ctypes.data


def _uploaded(images: Sequence[np.ndarray | Tensor], device: torch.device) -> list[Tensor]:
    """The images on the device; those of the host get there in one copy."""
    there = [image for image in images if isinstance(image, Tensor) and image.device == device]
    if len(there) == len(images):
        return there
    host = [image for image in images if not isinstance(image, Tensor) or image.device != device]
    sizes = [int(np.prod(image.shape)) for image in host]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True, device="cpu")
    for image, part in zip(host, packed.split(sizes), strict=True):
        np.copyto(part.numpy(), np.asarray(image).reshape(-1))
    sent = iter(packed.to(device, non_blocking=True).split(sizes))
    return [
        image if isinstance(image, Tensor) and image.device == device else next(sent).view(image.shape)
        for image in images
    ]


def launches() -> list[Launch]:
    """For 64 images of 500 x 375 with average boxes, every other crop blurred."""
    n, sizes = 64, np.array([224] * 2 + [96] * 8)
    rows = np.zeros((n, len(sizes), COLUMNS), np.float32)
    rows[:, :2, H : W + 1] = 297, 395  # 5/8 of the area
    rows[:, 2:, H : W + 1] = 145, 194  # 3/20
    rows[:, :, JITTER] = 1
    rows[:, ::2, SIGMA] = 1.3
    sides = np.full((n, 2), (375, 500))
    made = plan(np.zeros(n, np.int64), sides, rows, np.zeros((n, len(sizes)), np.int64), sizes)
    (group,) = made.groups
    table = made.table[: made.n * FIELDS].reshape(made.n, FIELDS)
    lengths = table[:, kernels.LENGTHS : kernels.LENGTHS + 2]
    pixels, blurred = table[:, kernels.SIZE] ** 2, table[:, kernels.BLURRED] != 0
    boxes, between = 3 * int(lengths.prod(1).sum()), 3 * int(_first_pass(table).sum())
    crops, smooth = 3 * int(pixels.sum()), 3 * int(pixels[blurred].sum())
    weights = 4 * group.items
    found = []
    for name, item in (("i32", 4), ("i16", 2)):
        passes = (  # kernel, programs, bytes
            (_weights_kernel, group.weights[1], weights),
            (_first_pass_kernel, group.first_pass[1], weights + boxes + between),
            (_second_pass_kernel, group.pixels[1], weights + between + crops),
            (_color_kernel, group.pixels[1], crops + smooth + item * (crops - smooth)),
            (_blur_kernel, group.blurred, smooth + item * smooth),  # the last, largest one
        )
        for kernel, programs, traffic in passes:
            suffix = f"_{name}" if "values_ptr" in kernel.arg_names else ""
            if item == 2 and not suffix:
                continue  # the same as above
            signature = dict(
                table_ptr="*i64",
                weights_ptr="*i32",
                values_ptr=f"*{name}",
                scratch_ptr="*u8",
                sums_ptr="*i64",
                start="i32",
                number="i32",
            )
            block = WEIGHTS_BLOCK if kernel is _weights_kernel else BLOCK
            found.append(
                Launch(
                    f"multicrop{kernel.__name__.removesuffix('_kernel')}{suffix}",
                    kernel,
                    {key: kind for key, kind in signature.items() if key in kernel.arg_names},
                    dict(FIELDS=FIELDS, BLOCK=block),
                    num_warps=WARPS,
                    num_stages=3,
                    problem=f"{n} images, crops 2 x 224 + 8 x 96, {8 * item}-bit",
                    grid=programs,
                    bytes=traffic,
                    fp_fusion=False,
                )
            )
    return found
