"""Rivals for `bench.loader` made of DALI's own operations, in two forms.

`separate` has a chain of operations for each crop. `stacked` resizes each crop, stacks those of one size
(layout FHWC) and has one chain for each stack, whose arguments differ by crop (`fn.per_frame`): on a GPU that
is about a fifth of the launches. What cannot differ by crop (conditions, mirror) is written as arithmetic or
goes into the resize. The colours of both are not exact: hue in YIQ, contrast about 128, a fixed order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from fastdino_kernels.multicrop import IMAGENET_MEAN, IMAGENET_STD
from torch import Tensor

from bench.official_crops import view_sizes
from fastdino.data.decoding import import_dali

if TYPE_CHECKING:
    from bench.loader_providers import Setting

RATIO = [3 / 4, 4 / 3]
NO_BLUR = 0.05  # a sigma whose filter is the identity


def separate(setting: Setting, gpu: bool) -> Iterator[list[Tensor]]:
    """Batches of crops [B, 3, S, S], without end."""
    fn, types = _dali()
    crops = setting.crops

    def coin(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.DALIDataType.BOOL)

    def graph() -> Any:
        _, images = _images(setting, gpu)
        made = []
        for view, size in enumerate(view_sizes(crops)):
            crop = fn.random_resized_crop(
                images,
                size=size,
                random_area=crops.global_crops_scale if view < 2 else crops.local_crops_scale,
                random_aspect_ratio=RATIO,
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            if coin(0.8):
                crop = fn.color_twist(
                    crop,
                    brightness=fn.random.uniform(range=[0.6, 1.4]),
                    contrast=fn.random.uniform(range=[0.6, 1.4]),
                    saturation=fn.random.uniform(range=[0.8, 1.2]),
                    hue=fn.random.uniform(range=[-36.0, 36.0]),
                )
            if coin(0.2):
                gray = fn.color_space_conversion(crop, image_type=types.RGB, output_type=types.GRAY)
                crop = fn.cat(gray, gray, gray, axis=2)
            if coin(1.0 if view == 0 else 0.1 if view == 1 else 0.5):
                crop = fn.gaussian_blur(crop, sigma=fn.random.uniform(range=[0.1, 2.0]))
            if view == 1:
                if coin(0.2):
                    crop = fn.lookup_table(
                        crop,
                        keys=list(range(256)),
                        values=[v if v < 128 else 255 - v for v in range(256)],
                        dtype=types.UINT8,
                    )
            made.append(_normalized(crop, mirror=fn.random.coin_flip(probability=0.5)))
        return tuple(made)

    pipeline = _built(graph, setting, gpu, enable_conditionals=True)
    while True:
        yield [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]


def stacked(setting: Setting, gpu: bool) -> Iterator[list[Tensor]]:
    """As `separate`; the crops are views of [B, V, 3, S, S]."""
    fn, types = _dali()
    crops, n_local = setting.crops, setting.crops.local_crops_number

    def uniform(low: float, high: float, n: int) -> Any:
        return fn.random.uniform(range=[low, high], shape=[n])

    def coins(probability: float, n: int) -> Any:
        return fn.cast(fn.random.coin_flip(probability=probability, shape=[n]), dtype=types.FLOAT)

    def resized(images: Any, sides: Any, size: int, scale: tuple[float, float]) -> Any:
        anchor, shape = fn.random_crop_generator(sides, random_area=scale, random_aspect_ratio=RATIO)
        begin, extent = fn.cast(anchor, dtype=types.FLOAT), fn.cast(shape, dtype=types.FLOAT)
        flipped = coins(0.5, 1) * types.Constant([0.0, 1.0]) * extent  # a box whose ends are swapped in x
        return fn.resize(
            images,
            size=[size, size],
            roi_start=begin + flipped,
            roi_end=begin + extent - flipped,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )

    def stack(images: Any, sides: Any, blur: list[float], solarize: list[int], size: int, scale: Any) -> Any:
        n = len(blur)
        frames = fn.stack(*(resized(images, sides, size, scale) for _ in blur), axis_name="F")
        jitter, gray = coins(0.8, n), coins(0.2, n)
        frames = fn.color_twist(
            frames,
            brightness=fn.per_frame(1 + jitter * uniform(-0.4, 0.4, n)),
            contrast=fn.per_frame(1 + jitter * uniform(-0.4, 0.4, n)),
            saturation=fn.per_frame((1 + jitter * uniform(-0.2, 0.2, n)) * (1 - gray)),
            hue=fn.per_frame(jitter * uniform(-36.0, 36.0, n)),
        )
        blurred = uniform(0.0, 1.0, n) < types.Constant(blur)
        sigma = NO_BLUR + blurred * (uniform(0.1, 2.0, n) - NO_BLUR)
        frames = fn.gaussian_blur(frames, sigma=fn.per_frame(sigma))
        if any(solarize):  # the smaller of a value and its inverse
            mask = fn.cast(255 * coins(0.2, n) * types.Constant(solarize), dtype=types.UINT8)
            mask = fn.reshape(mask, shape=[n, 1, 1, 1])
            frames = _dali_math().min(frames, frames ^ (mask.gpu() if gpu else mask))
        return _normalized(frames, output_layout="FCHW")

    def graph() -> Any:
        sides, images = _images(setting, gpu)
        stacks = [stack(images, sides, [1.0, 0.1], [0, 1], crops.global_crops_size, crops.global_crops_scale)]
        if n_local:
            none = [0] * n_local
            size, scale = crops.local_crops_size, crops.local_crops_scale
            stacks.append(stack(images, sides, [0.5] * n_local, none, size, scale))
        return tuple(stacks)

    pipeline = _built(graph, setting, gpu)
    while True:
        made = [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]  # [B, V, 3, S, S] each
        yield [view for stack in made for view in stack.unbind(1)]


def _dali() -> tuple[Any, Any]:
    dali = import_dali()
    return dali.fn, dali.types


def _dali_math() -> Any:
    return import_dali().math


def _images(setting: Setting, gpu: bool) -> tuple[Any, Any]:
    """Height and width of the images, on the CPU, and the images."""
    fn, types = _dali()
    paths = [os.path.abspath(path) for path in setting.manifest.paths]
    files, _ = fn.readers.file(files=paths, shuffle_after_epoch=True)
    sides = fn.peek_image_shape(files, adjust_orientation=False, dtype=types.INT64)[:2]
    return sides, fn.decoders.image(files, device="mixed" if gpu else "cpu", adjust_orientation=False)


def _normalized(crops: Any, **options: Any) -> Any:
    fn, _ = _dali()
    mean, std = ([255 * v for v in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return fn.crop_mirror_normalize(crops, mean=mean, std=std, **options)


def _built(graph: Callable[[], Any], setting: Setting, gpu: bool, **options: Any) -> Any:
    pipeline = import_dali().pipeline_def(graph, **options)(
        batch_size=setting.batch, num_threads=setting.workers, device_id=0 if gpu else None, seed=0
    )
    pipeline.build()
    return pipeline
