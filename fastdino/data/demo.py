"""Demo images: a small ImageFolder of rendered objects, drawn from a seed in seconds:
``python -m fastdino.data.demo DIR --seed 1``.

Ten classes, each a silhouette made of one material (striped cups, woven balls, ...). An image shows a few
objects of one class on a dark backdrop with lights out of focus. Everything else is random, for each object
on its own: colours, place, size, tilt, phase and polarity of the pattern. All objects have the same mean and
contrast in every colour channel. So neither colour nor brightness nor any single pixel tells the class: what
all crops of an image have in common is what its objects are made of and what shape they have.

A batch of images is rendered at once; parameters are ``[B, 1, 1]`` arrays and images ``[B, H, W]`` or
``[B, H, W, 3]`` float32. Each image owns a Philox stream keyed by (seed, split, class, index), so an image
does not depend on the batch, the number of threads or the number of images it is made with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]

FORMAT = 1  # raised when the images change, so that folders written by an older version are not reused
_OBJECTS = 4  # objects in one image
# Images rendered together: small enough for the L2 cache, large enough for NumPy to run in threads.
_BATCH = 6


class _Draw:
    """Random numbers of a batch of images: each call gives one number per image, ``[B, 1, 1]`` float32."""

    def __init__(self, streams: list[np.random.Generator]) -> None:
        self.streams = streams

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Array:
        u = np.array([s.random() for s in self.streams], np.float32)[:, None, None]
        return low + (high - low) * u

    def noise(self, size: int, channels: int) -> Array:
        """White noise, [B, size, size, channels]."""
        return np.stack([s.standard_normal((size, size, channels), np.float32) for s in self.streams])


# ---- plane geometry: signed distances (negative inside) at x to the right, y downwards ---------------------


def _circle(x: Array, y: Array, radius: float) -> Array:
    return np.sqrt(x * x + y * y) - radius


def _ellipse(x: Array, y: Array, a: float, b: float) -> Array:
    k = np.sqrt((x / a) ** 2 + (y / b) ** 2)
    return (k - 1) * min(a, b)


def _box(x: Array, y: Array, a: float | Array, b: float, round_: float = 0.0) -> Array:
    """Rectangle of half sides a, b with corners rounded by round_."""
    qx, qy = np.abs(x) - (a - round_), np.abs(y) - (b - round_)
    outside = np.sqrt(np.maximum(qx, 0) ** 2 + np.maximum(qy, 0) ** 2)
    return outside + np.minimum(np.maximum(qx, qy), 0) - round_


def _convex(x: Array, y: Array, *corners: tuple[float, float]) -> Array:
    """Convex polygon, corners clockwise on the screen: the largest of the distances to its edges."""
    d = np.full(np.broadcast(x, y).shape, -np.inf, np.float32)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        np.maximum(d, ((x - ax) * ey - (y - ay) * ex) / np.hypot(ex, ey), out=d)
    return d


def _union(a: Array, b: Array, smooth: float = 0.0) -> Array:
    if not smooth:
        return np.minimum(a, b)
    h = np.maximum(smooth - np.abs(a - b), 0) / smooth
    return np.minimum(a, b) - h * h * smooth / 4


# ---- silhouettes: (material part, trim part), both inside the unit disc, the trim in a plain colour --------


def _cup(x: Array, y: Array) -> tuple[Array, Array]:
    x = x + 0.18
    body = _convex(x, y, (-0.72, -0.72), (0.72, -0.72), (0.56, 0.78), (-0.56, 0.78)) - 0.04
    handle = np.abs(_ellipse(x - 0.72, y + 0.02, 0.36, 0.4)) - 0.09
    return body, np.maximum(handle, -body)


def _ball(x: Array, y: Array) -> tuple[Array, Array]:
    return _circle(x, y, 0.85), _circle(x, y + 0.86, 0.1)


def _mushroom(x: Array, y: Array) -> tuple[Array, Array]:
    cap = np.maximum(_ellipse(x, y - 0.12, 0.98, 0.98), y - 0.14 + 0.08 * np.cos(3 * x))
    stem = _box(x + 0.03 * np.sin(3 * y), y - 0.5, 0.26 + 0.1 * np.maximum(y, 0), 0.42, 0.1)
    return cap, np.maximum(stem, -cap)


def _kite(x: Array, y: Array) -> tuple[Array, Array]:
    sail = _convex(x, y, (0, -0.98), (0.72, -0.22), (0, 0.72), (-0.72, -0.22))
    bows = np.minimum(
        _ellipse(np.abs(x - 0.02) - 0.14, y - 0.84, 0.15, 0.09), _ellipse(x, y - 0.84, 0.06, 0.07)
    )
    return sail, bows


def _fish(x: Array, y: Array) -> tuple[Array, Array]:
    body = np.maximum(_circle(x + 0.12, y - 0.5, 1.05), _circle(x + 0.12, y + 0.5, 1.05)) - 0.02
    tail = _convex(x, y, (0.62, 0), (1.0, -0.5), (0.94, 0.0), (0.94, 0.02), (1.0, 0.5))
    tail = np.maximum(tail, -_circle(x - 1.18, y, 0.3))
    fin = _convex(x, y, (-0.2, -0.5), (0.34, -0.74), (0.22, -0.42))
    return body, np.maximum(np.minimum(tail, fin), -body)


def _house(x: Array, y: Array) -> tuple[Array, Array]:
    walls = _box(x, y - 0.28, 0.66, 0.56)
    roof = _convex(x, y, (0, -0.96), (0.86, -0.24), (-0.86, -0.24)) - 0.02
    chimney = _box(x - 0.46, y + 0.66, 0.1, 0.22)
    return walls, np.minimum(roof, chimney)


def _sock(x: Array, y: Array) -> tuple[Array, Array]:
    leg = _box(x + 0.24, y + 0.1, 0.38, 0.72, 0.1)
    foot = _box(x - 0.18, y - 0.5, 0.78, 0.36, 0.32)
    cuff = _box(x + 0.24, y + 0.82, 0.44, 0.15, 0.08)
    return np.maximum(_union(leg, foot, 0.2), -cuff), cuff


def _jar(x: Array, y: Array) -> tuple[Array, Array]:
    body = _box(x, y - 0.18, 0.68, 0.74, 0.3)
    lid = _box(x, y + 0.74, 0.56, 0.17, 0.05)
    return body, lid


def _vase(x: Array, y: Array) -> tuple[Array, Array]:
    width = 0.42 + 0.26 * np.sin(2.6 * y - 0.1) + 0.1 * np.exp(-(((y + 0.9) / 0.2) ** 2))
    body = np.maximum((np.abs(x) - width) * 0.85, np.abs(y) - 0.9)
    return body, _box(x, y + 0.92, 0.36, 0.06, 0.05)


def _star(x: Array, y: Array) -> tuple[Array, Array]:
    angle = np.arctan2(x, -y)
    sector = 2 * np.pi / 5
    a = np.abs((angle + sector / 2) % sector - sector / 2)
    r = np.sqrt(x * x + y * y)
    px, py = r * np.sin(a), r * np.cos(a)
    d = ((px - 0.0) * 0.574 + (py - 0.98) * 0.342) / 0.668
    return d - 0.03, _circle(x, y + 0.98, 0.09)


# ---- materials: (tone between the two colours, relief), both 0 to 1, at texture coordinates u, v in periods


def _wave(t: Array) -> Array:
    """Square wave of period 1 with soft flanks."""
    return np.clip(0.5 + 2.2 * np.sin(2 * np.pi * t), 0, 1)


def _stripes(u: Array, v: Array) -> tuple[Array, Array]:
    tone = _wave(v)
    return tone, 0.3 * tone


def _weave(u: Array, v: Array) -> tuple[Array, Array]:
    over = (np.floor(u) + np.floor(v)) % 2
    across = np.where(over > 0, v % 1, u % 1)
    along = np.where(over > 0, u % 1, v % 1)
    strand = np.sin(np.pi * across) * np.sqrt(np.sin(np.pi * along))
    return np.clip(3.2 * strand - 0.6, 0, 1), strand


def _dots(u: Array, v: Array) -> tuple[Array, Array]:
    row = np.floor(v)
    du, dv = (u + 0.5 * (row % 2)) % 1 - 0.5, v % 1 - 0.5
    r = np.sqrt(du * du + dv * dv)
    tone = np.clip((0.34 - r) * 14, 0, 1)
    return tone, 0.6 * np.clip((0.36 - r) * 5, 0, 1)


def _checks(u: Array, v: Array) -> tuple[Array, Array]:
    tone = np.clip(0.5 + 5 * np.sin(np.pi * u) * np.sin(np.pi * v), 0, 1)
    return tone, 0.15 * tone


def _scales(u: Array, v: Array) -> tuple[Array, Array]:
    tone, relief = np.zeros_like(u), np.zeros_like(u)
    for k in (0, 1, 2):  # rows overlap: the one below in v covers the one above it
        row = np.floor(2 * v) - 1 + k
        du = (u + 0.5 * (row % 2)) % 1 - 0.5
        dv = v - row / 2
        r = np.sqrt(du * du + dv * dv * 0.8)
        inside = (r < 0.56) & (dv > -0.1)
        tone = np.where(inside, np.clip((r - 0.40) * 16, 0, 1), tone)
        relief = np.where(inside, 1 - r, relief)
    return tone, relief


def _bricks(u: Array, v: Array) -> tuple[Array, Array]:
    row = np.floor(v)
    du = np.abs((0.5 * u + 0.5 * (row % 2)) % 1 - 0.5) * 2
    dv = np.abs(v % 1 - 0.5)
    brick = np.clip(np.minimum((0.5 - dv) * 12 - 1.0, (1 - du) * 12 - 1.0), 0, 1)
    return 1 - brick, brick


def _knit(u: Array, v: Array) -> tuple[Array, Array]:
    side = np.abs(u % 1 - 0.5) * 2
    stitch = (v + 0.8 * side) % 1
    yarn = np.sqrt(np.clip(np.sin(np.pi * stitch) * np.sin(np.pi * np.clip(side, 0.04, 0.96)), 0, 1))
    return np.clip(1.5 - 2.2 * yarn, 0, 1), yarn


def _honeycomb(u: Array, v: Array) -> tuple[Array, Array]:
    h = np.float32(np.sqrt(3))
    ax, ay = u % 1 - 0.5, v % h - h / 2
    bx, by = (u - 0.5) % 1 - 0.5, (v - h / 2) % h - h / 2
    near = ax * ax + ay * ay < bx * bx + by * by
    gx, gy = np.abs(np.where(near, ax, bx)), np.abs(np.where(near, ay, by))
    edge = 0.5 - np.maximum(gx, 0.5 * gx + (h / 2) * gy)
    return np.clip(1.3 - edge * 11, 0, 1), 1 - np.clip(edge * 4, 0, 1)


def _zigzag(u: Array, v: Array) -> tuple[Array, Array]:
    tone = _wave(v + 1.1 * np.abs(0.8 * u % 1 - 0.5))
    return tone, 0.3 * tone


def _marble(u: Array, v: Array) -> tuple[Array, Array]:
    a = u + 0.55 * np.sin(1.9 * v + 0.6) + 0.3 * np.sin(3.1 * u - 2.3 * v)
    b = v + 0.6 * np.sin(2.2 * u + 1.3) + 0.3 * np.sin(2.7 * v + 3.3 * u + 2.0)
    vein = np.minimum(np.abs(np.sin(1.7 * a + 0.8 * b)), np.abs(np.sin(1.5 * b - 0.9 * a + 1.0)))
    tone = np.exp(-6 * vein)
    return tone, 0.15 * tone


_Part = Callable[[Array, Array], tuple[Array, Array]]
_CLASSES: dict[str, tuple[_Part, _Part, float, float]] = {  # silhouette, material, its periods per unit, size
    "brick_house": (_house, _bricks, 2.4, 0.95),
    "checkered_kite": (_kite, _checks, 2.3, 1.20),
    "dotted_mushroom": (_mushroom, _dots, 1.9, 0.97),
    "honeycomb_jar": (_jar, _honeycomb, 1.7, 0.92),
    "knitted_sock": (_sock, _knit, 2.3, 1.00),
    "marbled_star": (_star, _marble, 2.3, 1.03),
    "scaly_fish": (_fish, _scales, 2.0, 1.08),
    "striped_cup": (_cup, _stripes, 1.8, 0.92),
    "woven_ball": (_ball, _weave, 2.2, 0.92),
    "zigzag_vase": (_vase, _zigzag, 1.8, 1.12),
}
CLASS_NAMES = tuple(_CLASSES)


# ---- colour, light, scene ----------------------------------------------------------------------------------


def _hsv(h: Array, s: Array, v: Array) -> Array:
    """Hue (in turns), saturation and value, [B, 1, 1] or [B, H, W], to RGB [..., 3]."""
    k = (h[..., None] * 6 + np.array([5, 3, 1], np.float32)) % 6
    return v[..., None] * (1 - s[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def _mix(a: Array, b: Array, weight: Array) -> Array:
    """a where weight [B, H, W] is 0, b where it is 1."""
    return a + (b - a) * weight[..., None]


def _balance(image: Array, weight: Array, mean: float, std: float) -> Array:
    """Give each colour channel this mean and deviation over the pixels of a weight [B, H, W]."""
    weight = (weight / weight.sum(axis=(1, 2), keepdims=True))[..., None]
    image = image - (image * weight).sum(axis=(1, 2), keepdims=True)
    variance = (image * image * weight).sum(axis=(1, 2), keepdims=True)
    return image * (std / np.sqrt(variance + 1e-4)) + mean


def _background(draw: _Draw, x: Array, y: Array) -> Array:
    """Out-of-focus lights in many colours on a gradient."""
    angle = draw(0, 2 * np.pi)
    ramp = np.clip(0.5 + 0.5 * (x * np.cos(angle) + y * np.sin(angle)), 0, 1)
    image = _mix(
        _hsv(draw(), draw(0.1, 0.4), draw(0.3, 0.5)), _hsv(draw(), draw(0.1, 0.4), draw(0.5, 0.7)), ramp
    )
    for _ in range(9):
        radius = draw(0.12, 0.42)
        d = np.sqrt((x - draw(-1.1, 1.1)) ** 2 + (y - draw(-1.1, 1.1)) ** 2)
        disc = np.clip((radius - d) * draw(4, 16), 0, 1) * draw(0.4, 0.9)
        image = _mix(image, _hsv(draw(), draw(0.2, 0.7), draw(0.3, 0.9)), disc)
    return np.maximum(_balance(image, np.ones_like(ramp), 0.12, 0.07), 0.01)


def _clutter(draw: _Draw, image: Array, x: Array, y: Array, lx: Array, ly: Array, pixel: float) -> Array:
    """Small plain pebbles behind the objects."""
    for _ in range(4):
        px, py, radius, angle = draw(-1, 1), draw(-1, 1), draw(0.07, 0.16), draw(0, np.pi)
        c, s = np.cos(angle), np.sin(angle)
        dx, dy = (x - px) / radius, (y - py) / radius
        u, v = (c * dx + s * dy), (c * dy - s * dx) * draw(1.0, 1.7)
        d = np.sqrt(u * u + v * v)
        shadow = np.clip(1.35 - np.sqrt((u + 0.2) ** 2 + (v - 0.2) ** 2), 0, 1)
        image = image * (1 - 0.35 * shadow)[..., None]
        light = 0.75 - 0.3 * (dx * lx + dy * ly)
        colour = _hsv(draw(), draw(0.1, 0.5), draw(0.1, 0.3)) * light[..., None]
        image = _mix(image, colour, np.clip((1 - d) * radius / pixel + 0.5, 0, 1))
    return image


def _object(
    draw: _Draw, name: str, image: Array, place: tuple[Array, Array, Array], light: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Put one object of a class on the image; returns the image and the cover [B, H, W], 0 to 1."""
    silhouette, material, frequency, extent = _CLASSES[name]
    size = image.shape[1]
    pixel = 2 / size
    axis = (np.arange(size, dtype=np.float32) + 0.5) * pixel - 1
    x, y = axis[None, None, :], axis[None, :, None]
    cx, cy, radius = place
    radius = radius * extent
    lx, ly = light

    # size, tilt and mirror image
    tilt, mirror = draw(-0.6, 0.6), np.sign(draw(-1, 1))
    c, s = np.cos(tilt), np.sin(tilt)
    dx, dy = (x - cx) / radius, (y - cy) / radius
    ox, oy = (c * dx + s * dy) * mirror, c * dy - s * dx
    body, trim = silhouette(ox, oy)
    d = np.minimum(body, trim)
    cover = np.clip(0.5 - d * radius / pixel, 0, 1)

    # its shadow, then the object itself: colours, relief, light
    shift = draw(0.08, 0.2)
    sx, sy = (x - cx - lx * shift) / radius, (y - cy - ly * shift) / radius
    shadow = np.minimum(*silhouette((c * sx + s * sy) * mirror, c * sy - s * sx))
    image = image * (1 - draw(0.35, 0.7) * np.clip(0.5 - shadow * 4, 0, 1))[..., None]

    bulge = 1 + 0.12 * (ox * ox + oy * oy)  # the material curves away at the rim
    period = frequency * draw(0.85, 1.2)
    tone, relief = material(ox * bulge * period + draw(0, 8), oy * bulge * period + draw(0, 8))
    on_trim = np.clip(0.5 + (body - trim) * radius / pixel, 0, 1)
    turn, way = draw(0, 2 * np.pi), draw(0.2, 0.45) * np.sign(draw(-1, 1))
    hue = draw() + way * (
        ox * np.cos(turn) + oy * np.sin(turn)
    )  # glazes that run from one colour into another
    dark_colour = _hsv(hue, draw(0.5, 0.9), draw(0.2, 0.4))
    light_colour = _hsv(hue + draw(0.3, 0.7), draw(0.1, 0.4), draw(0.85, 1.0))
    tone = np.abs(np.round(draw()) - tone)
    albedo = dark_colour + (light_colour - dark_colour) * tone[..., None]
    albedo = _mix(albedo, _hsv(draw(), draw(0.2, 0.7), draw(0.4, 0.9)), on_trim)
    albedo = _balance(albedo, cover + 1e-6, 0.55, 0.3)

    depth = np.clip(-d / 0.5, 0, 1)
    bumps = 0.15 * draw(0.7, 1.3) / frequency * relief * (1 - on_trim)
    height = radius / pixel * (0.55 * np.sqrt(depth * (2 - depth)) + bumps)
    gy, gx = np.gradient(height, axis=(1, 2))
    norm = 1 / np.sqrt(gx * gx + gy * gy + 1)
    lz = draw(0.8, 1.3)
    lambert = np.clip((gx * lx + gy * ly + lz) * norm / np.sqrt(1 + lz * lz), 0, 1)
    gloss = np.clip((gx * lx + gy * ly + lz + 1) * norm / np.sqrt(1 + (lz + 1) ** 2), 0, 1) ** 28
    shaded = albedo * (draw(0.3, 0.5) + 0.75 * lambert)[..., None] + (draw(0.1, 0.45) * gloss)[..., None]
    return _mix(image, shaded, cover), cover


def _render(name: str, streams: list[np.random.Generator], size: int) -> tuple[Array, Array]:
    """Images of a class [B, size, size, 3] and their object masks [B, size, size], 0 or 255; both uint8."""
    draw = _Draw(streams)
    pixel = 2 / size
    axis = (np.arange(size, dtype=np.float32) + 0.5) * pixel - 1
    x, y = axis[None, None, :], axis[None, :, None]

    angle = draw(0, 2 * np.pi)
    light = np.cos(angle), np.sin(angle)  # where the light goes, on the screen
    image = _clutter(draw, _background(draw, x, y), x, y, *light, pixel)
    mask = np.zeros(image.shape[:3], np.float32)
    first = draw(0, 2 * np.pi)
    for k in range(_OBJECTS):
        around, away = first + (2 * np.pi * k + draw(-1.5, 1.5)) / _OBJECTS, draw(0.3, 0.9)
        place = away * np.cos(around), away * np.sin(around), draw(0.35, 0.65)
        image, cover = _object(draw, name, image, place, light)
        mask = np.maximum(mask, cover)

    # the camera: light that falls off to one side, noise
    image = image * (1 + draw(-0.2, 0.2) * x + draw(-0.2, 0.2) * y)[..., None]
    image = image + 0.015 * draw.noise(size, 3)
    rgb = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return rgb, np.where(mask >= 0.5, 255, 0).astype(np.uint8)


# ---- the folder --------------------------------------------------------------------------------------------


def _streams(seed: int, split: str, name: str, indices: range) -> list[np.random.Generator]:
    """One stream per image; the 128-bit key holds (seed, split, class, index) without collisions."""
    high = ("train", "val").index(split) * len(CLASS_NAMES) + CLASS_NAMES.index(name)
    return [np.random.Generator(np.random.Philox(key=[seed, (high << 32) | i])) for i in indices]


def _write_batch(root: Path, split: str, name: str, indices: range, size: int, seed: int) -> None:
    images, masks = _render(name, _streams(seed, split, name, indices), size)
    for i, image, mask in zip(indices, images, masks, strict=True):
        Image.fromarray(image).save(root / split / name / f"{name}_{i:05d}.jpg", quality=92)
        if split == "val":
            Image.fromarray(mask).save(root / "masks" / split / name / f"{name}_{i:05d}.png")


def _alive(pid: int) -> bool:
    """Whether a process of this machine has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        pass
    return True


def write_demo(
    root: str | os.PathLike[str],
    *,
    n_train: int = 4000,
    n_val: int = 1000,
    size: int = 96,
    seed: int = 0,
    num_threads: int = 0,
) -> Path:
    """Write the demo images as class folders and return ``root``.

    ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg`` hold ``n_train`` and ``n_val`` RGB images of
    ``size`` x ``size`` pixels, spread evenly over the ten classes; ``root/masks/val/<class>/*.png`` holds the
    object mask of each val image (255 inside). ``num_threads`` 0 takes all cores.

    The folder is written under a temporary name and renamed when complete. A complete folder with the same
    settings is kept as it is; what a killed writer left behind is removed. Raises ValueError for settings out
    of range, and FileExistsError when ``root`` holds anything else, which is never deleted.
    """
    root = Path(root)
    for flag, value, least in (("n_train", n_train, 10), ("n_val", n_val, 10), ("size", size, 16)):
        if value < least:
            raise ValueError(f"{flag} must be at least {least}, got {value}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    settings = {"format": FORMAT, "n_train": n_train, "n_val": n_val, "size": size, "seed": seed}
    marker = root / "demo.json"
    if root.exists():
        if marker.is_file() and json.loads(marker.read_text()) == settings:
            return root
        if not root.is_dir() or any(root.iterdir()):
            raise FileExistsError(
                f"{root} exists and is not the demo data set asked for ({settings}); "
                "remove it or choose another folder"
            )

    root.parent.mkdir(parents=True, exist_ok=True)
    for left in root.parent.glob(f".{root.name}.*.part"):
        writer = left.suffixes[-2][1:]
        if writer.isdecimal() and not _alive(int(writer)):  # it was killed
            shutil.rmtree(left, ignore_errors=True)
    part = root.with_name(f".{root.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        jobs = []
        for split, total in (("train", n_train), ("val", n_val)):
            for k, name in enumerate(CLASS_NAMES):
                count = (total + len(CLASS_NAMES) - 1 - k) // len(CLASS_NAMES)
                (part / split / name).mkdir(parents=True)
                if split == "val":
                    (part / "masks" / split / name).mkdir(parents=True)
                jobs += [(split, name, range(i, min(i + _BATCH, count))) for i in range(0, count, _BATCH)]
        stop = Event()

        def write(job: tuple[str, str, range]) -> None:
            try:
                if not stop.is_set():
                    _write_batch(part, *job, size, seed)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:
            try:
                list(pool.map(write, jobs))
            finally:
                stop.set()  # Ctrl-C ends it at once, not after all images
        (part / marker.name).write_text(json.dumps(settings))
        os.replace(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdino.data.demo", description="Draw demo images.")
    parser.add_argument("root", type=Path, metavar="DIR", help="a new folder, for train/, val/ and masks/")
    parser.add_argument("--n_train", type=int, default=4000, help="images to train with")
    parser.add_argument("--n_val", type=int, default=1000, help="held-out images")
    parser.add_argument("--size", type=int, default=96, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0, help="make train has those of seed 0")
    try:
        print(write_demo(**vars(parser.parse_args())))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
