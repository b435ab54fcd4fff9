"""The Triton form of multi-crop, interpreted where there is no GPU, equals the specification to the bit."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdino_kernels.multicrop import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    JITTER,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
    hsv_to_rgb,
    multicrop,
    multicrop_reference,
    rgb_to_hsv,
)
from torch import Tensor

from tests.kernels.test_multicrop import picture, random_row, whole
from tests.kernels.test_triton_updates import NoWaiting

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
gpu = importlib.import_module("fastdino_kernels.gpu.multicrop")
kernels = importlib.import_module("fastdino_kernels.gpu.multicrop_kernels")
_hue = kernels._hue

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("poisoned")


def expected(images: Sequence[np.ndarray], rows: np.ndarray, out: Sequence[Tensor]) -> list[Tensor]:
    result = [torch.empty(view.shape, dtype=view.dtype) for view in out]
    multicrop_reference(images, rows, out=result)
    return result


def check(images: Sequence[np.ndarray], rows: np.ndarray, sizes: Sequence[int], device, dtype=torch.float32):
    """All crops equal the specification's; returns them."""
    out = [torch.full((len(images), 3, s, s), float("nan"), dtype=dtype, device=device) for s in sizes]
    multicrop([torch.from_numpy(image).to(device) for image in images], rows, out=out)
    for v, (got, want) in enumerate(zip(out, expected(images, rows, out), strict=True)):
        for i in range(len(images)):
            wrong = (got[i].cpu() != want[i]).sum().item()
            assert wrong == 0, f"image {i}, view {v}: {wrong} values differ, row {rows[i, v].tolist()}"
    return out


def check_rows(image: np.ndarray, rows: Sequence[np.ndarray], size: int, device: torch.device):
    """One view of the given size for each row."""
    return check([image], np.stack(rows)[None], [size] * len(rows), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_whole_chain(triton_device: torch.device, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    sizes, n = (24, 13, 1), 3
    images = [picture(rng, *rng.integers(1, 60, 2)) for _ in range(n)]
    images[-1] = images[-1][:1, :1].copy()
    rows = np.array([[random_row(rng, *image.shape[:2], size) for size in sizes] for image in images])
    rows[0, 0, [JITTER, SIGMA, SOLARIZE]] = 1, 1.3, 1
    check(images, rows, sizes, triton_device, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="large crops take long in the interpreter")
def test_crops_as_in_training(triton_device: torch.device) -> None:
    rng = np.random.default_rng(0)
    sizes = (224, 224, 96, 96)
    images = [picture(rng, *rng.integers(20, 700, 2)) for _ in range(16)]
    rows = np.array([[random_row(rng, *image.shape[:2], size) for size in sizes] for image in images])
    check(images, rows, sizes, triton_device, torch.bfloat16)


def test_all_orders_of_the_jitter(triton_device: torch.device) -> None:
    image = picture(np.random.default_rng(0), 9, 9)
    row = whole(image)
    row[[JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE]] = 1, 1.4, 1.3, 0.7, 0.1
    rows = np.repeat(row[None], 24, 0)
    rows[:, ORDER] = range(24)
    out = check_rows(image, list(rows), 9, triton_device)
    assert len({crop.cpu().numpy().tobytes() for crop in out}) > 12


def test_factors(triton_device: torch.device) -> None:
    image = picture(np.random.default_rng(1), 8, 8)
    rows = []
    for column, value in [(c, f) for c in (BRIGHTNESS, CONTRAST, SATURATION) for f in (0, 2.7)]:
        rows.append(whole(image))
        rows[-1][[JITTER, column]] = 1, value
    for turns in (0.5, -0.5, 0.0039, -0.0039):
        rows.append(whole(image))
        rows[-1][[JITTER, HUE]] = 1, turns
    check_rows(image, rows, 8, triton_device)


def test_contrast_rounds_the_mean_half_up(triton_device: torch.device) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8] = 101  # mean luma 50.5
    row = whole(image)
    row[[JITTER, CONTRAST]] = 1, 0
    out = torch.empty(1, 3, 16, 16, device=triton_device)
    multicrop([image], row.reshape(1, 1, COLUMNS), out=[out], mean=(0, 0, 0), std=(1 / 255,) * 3)
    assert (out.round() == 51).all()


@pytest.mark.parametrize("column", [FLIP, GRAY, SOLARIZE])
def test_flags(triton_device: torch.device, column: int) -> None:
    wide, tall = picture(np.random.default_rng(0), 5, 12), picture(np.random.default_rng(1), 40, 6)
    rows = np.stack([whole(wide), whole(tall)])[:, None]
    plain = check([wide, tall], rows, [7], triton_device)[0]
    rows[..., column] = 1
    (changed,) = check([wide, tall], rows, [7], triton_device)
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize(
    "size, boxes",
    [
        (20, [(40, 30), (41, 30), (40, 29), (21, 20), (20, 20), (19, 5), (3, 50)]),  # both orders
        (1, [(1, 1), (4, 9), (9, 4)]),
        (17, [(1, 1), (2, 2), (70, 3)]),
        (40, [(13, 60)]),
    ],
)
def test_resize(triton_device: torch.device, size: int, boxes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 2, (h + 2, w + 3, 3), dtype=np.uint8) * np.uint8(255) for h, w in boxes]
    rows = np.zeros((len(boxes), 1, COLUMNS), np.float32)
    for row, (h, w) in zip(rows[:, 0], boxes, strict=True):
        row[:4] = rng.integers(3), rng.integers(4), h, w
    check(images, rows, [size], triton_device)


def test_blur(triton_device: torch.device) -> None:
    image = picture(np.random.default_rng(0), 11, 11)
    rows = []
    for sigma in (0.001, 0.1, 0.5, 1.4142135, 1.4142137, 2, 9):  # the last is wider than the crop
        rows.append(whole(image))
        rows[-1][SIGMA] = sigma
    rows.insert(2, whole(image))
    check_rows(image, rows, 11, triton_device)


@triton.jit
def _hue_kernel(rgb_ptr, shift, N: tl.constexpr, BLOCK: tl.constexpr):
    at = rgb_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    red, green, blue = tl.load(at), tl.load(at + N), tl.load(at + 2 * N)
    red, green, blue = _hue(red.to(tl.int32), green.to(tl.int32), blue.to(tl.int32), shift)
    tl.store(at, red.to(tl.uint8))
    tl.store(at + N, green.to(tl.uint8))
    tl.store(at + 2 * N, blue.to(tl.uint8))


@pytest.mark.parametrize("shift", [0, 25, 231])
def test_hue_of_many_colours(triton_device: torch.device, shift: int) -> None:
    """All of the 2**24 on a GPU, every 61st in the interpreter."""
    on_gpu = triton_device.type == "cuda"
    n, block = (1 << 24, 1024) if on_gpu else (1 << 18, 1 << 18)
    colours = np.arange(n, dtype=np.uint32) * np.uint32(1 if on_gpu else 61)
    rgb = np.stack([(colours >> s).astype(np.uint8) for s in (16, 8, 0)])
    got = torch.from_numpy(rgb.copy()).to(triton_device)
    _hue_kernel[(n // block,)](got, shift, N=n, BLOCK=block, enable_fp_fusion=False)
    for begin in range(0, n, 1 << 18):
        part = slice(begin, begin + (1 << 18))
        hsv = rgb_to_hsv(rgb[:, part].T)
        hsv[:, 0] += np.uint8(shift)
        assert (got[:, part].cpu().numpy().T == hsv_to_rgb(hsv)).all()


def small_batch(n: int = 3) -> tuple[list[np.ndarray], np.ndarray, list[int]]:
    rng = np.random.default_rng(3)
    images, sizes = [picture(rng, 12 + 3 * i, 10) for i in range(n)], [9, 6]
    rows = np.array([[random_row(rng, *image.shape[:2], size) for size in sizes] for image in images])
    rows[:, 0, SIGMA], rows[:, 1, SIGMA] = 1.3, 0
    return images, rows, sizes


def test_scratch_memory_is_bounded(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of crops, down to one crop, give the same as all at once."""
    images, rows, sizes = small_batch()
    plan, made = gpu.plan, []
    monkeypatch.setattr(gpu, "plan", lambda *arguments: made.append(plan(*arguments)) or made[-1])
    for limit in (gpu.SCRATCH, 4000, 1):
        monkeypatch.setattr(gpu, "SCRATCH", limit)
        check(images, rows, sizes, triton_device)
    assert [len(m.groups) for m in made] == [1, 2, 6]
    assert all(group.bytes + 4 * group.items <= 4000 for group in made[1].groups)


def plan_of(sides: Sequence[tuple[int, int]], sizes: Sequence[int]):
    n = len(sides)
    rows = np.zeros((n, len(sizes), COLUMNS), np.float32)
    rows[..., 2:4] = np.array(sides)[:, None]
    return gpu.plan(np.zeros(n, np.int64), np.array(sides), rows, np.zeros((n, len(sizes))), np.array(sizes))


def test_scratch_memory_of_large_images() -> None:
    groups = plan_of([(9000, 12000), (12000, 9000)] * 16, [224, 224, 96, 96]).groups
    assert len(groups) > 1 and all(g.bytes + 4 * g.items <= gpu.SCRATCH for g in groups)
    assert max(g.bytes for g in groups) > gpu.SCRATCH / 2  # and none is smaller than need be
    assert sum(g.pixels[1] for g in groups) == 32 * 2 * (98 + 18)
    with pytest.raises(ValueError, match=r"out: expected fewer than 2\*\*31 pixels"):
        plan_of([(7, 7)], [46341])


def test_pixels_beyond_2_to_the_31_bytes(triton_device: torch.device) -> None:
    """Boxes at the right end of a very wide image; its memory is never touched elsewhere."""
    height, width = 90, 8_000_000
    if triton_device.type == "cuda":
        image = torch.zeros(height, width, 3, dtype=torch.uint8, device=triton_device)
    else:
        image = torch.from_numpy(np.zeros((height, width, 3), np.uint8))
    corner = picture(np.random.default_rng(1), height, 60)
    image[:, -60:] = torch.from_numpy(corner)
    rows = np.zeros((1, 2, COLUMNS), np.float32)
    rows[0, :, :4] = [(0, width - 60, height, 60), (0, width - 3, height, 3)]  # across first, down first
    out = [torch.empty(1, 3, 16, 16, device=triton_device) for _ in range(2)]
    multicrop([image], rows, out=out)
    rows[0, :, 1] = 0, 57
    for got, want in zip(out, expected([corner], rows, out), strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs memory of the host")
def test_reads_nothing_beyond_the_image(triton_device: torch.device) -> None:
    """The image ends where readable memory ends: one byte further is a crash."""
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    for height, width, size in [(1, 1, 3), (7, 5, 9), (9, 20, 6), (40, 2, 5)]:
        count = 3 * height * width
        image = np.frombuffer(memory, np.uint8, count, mmap.PAGESIZE - count).reshape(height, width, 3)
        check([image], whole(image).reshape(1, 1, COLUMNS), [size], triton_device)


def test_views_in_one_buffer_and_nothing_else_is_written(triton_device: torch.device) -> None:
    images, rows, _ = small_batch()
    out = [torch.empty(3, 3, 6, 6) for _ in range(2)]
    wanted = torch.stack(expected(images, rows, out))
    guarded = torch.full((4 * wanted[0].numel() + 1,), 7.0, device=triton_device)[1:]  # not aligned either
    guarded = guarded.view(4, *wanted[0].shape)
    multicrop(images, rows, out=list(guarded[1:3].unbind(0)))
    assert torch.equal(guarded[1:3].cpu(), wanted) and (guarded[0] == 7).all() and (guarded[3] == 7).all()


def test_images_from_anywhere_and_bitwise_the_same_again(triton_device: torch.device) -> None:
    images, rows, sizes = small_batch()
    (first, *_) = out = check(images, rows, sizes, triton_device)
    mixed = [images[0], torch.from_numpy(images[1]), torch.from_numpy(images[2]).to(triton_device)]
    again = [torch.empty_like(view) for view in out]
    images[0].flags.writeable = False
    multicrop(mixed, torch.from_numpy(rows), out=again)
    assert torch.equal(first, again[0]) and torch.equal(out[1], again[1])


def test_waits_for_nothing(triton_device: torch.device) -> None:
    images, rows, sizes = small_batch(1)
    out = [torch.empty(1, 3, size, size, device=triton_device) for size in sizes]
    images_there = [torch.from_numpy(image).to(triton_device) for image in images]
    with NoWaiting():
        multicrop(images_there, rows, out=out)
    for got, want in zip(out, expected(images, rows, out), strict=True):
        assert torch.equal(got.cpu(), want)


def test_nothing_to_do(triton_device: torch.device) -> None:
    multicrop([], np.zeros((0, 1, COLUMNS), np.float32), out=[torch.empty(0, 3, 8, 8, device=triton_device)])
    multicrop([np.zeros((5, 5, 3), np.uint8)], np.zeros((1, 0, COLUMNS), np.float32), out=[])


def test_no_fused_products_and_no_approximate_quotients() -> None:
    """Neither rounds as the specification does."""
    code = """if True:
        from bench.ahead import compile_ahead
        from fastdino_kernels.gpu.multicrop import launches
        for launch in launches():
            if launch.name in ("multicrop_weights", "multicrop_color_i16"):
                print(launch.name, compile_ahead(launch, 80).ptx)
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )
    ptx = done.stdout
    assert "multicrop_weights" in ptx and "multicrop_color_i16" in ptx, done.stderr
    assert "div.rn.f64" in ptx and "div.rn.f32" in ptx
    for approximate in ("fma.rn.f32", "fma.rn.f64", "div.full", "div.approx"):
        assert approximate not in ptx
