"""Memory of micro-batches, filled by the loader's thread and handed to the training loop without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastdino.config import CropConfig

Image: TypeAlias = "np.ndarray | Tensor"
"""A decoded image, uint8 [height, width, 3]."""


@dataclass
class Crops:
    """One micro-batch of B images; all images of view 0 first, then all of view 1, and so on."""

    global_: Tensor  # [2B, 3, Sg, Sg]
    local: Tensor | None  # [N*B, 3, Sl, Sl], None without local crops
    ids: Tensor  # int64 [B] on the CPU: manifest indices of the images


class HostBuffer:
    """Memory of one micro-batch: on the CPU, and with a GPU also the copy there that is under way."""

    def __init__(self, crops: CropConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        options = {"dtype": dtype, "pin_memory": device.type == "cuda"}
        self._global, self._local, self.views = _allocate(crops, batch, options)
        self._ids = torch.empty(0, dtype=torch.int64)
        self._copied: Any = None  # torch.cuda.Event
        self._on_device: tuple[Tensor, Tensor | None] = (self._global, self._local)

    def wait(self) -> None:
        """Called by the producer: return once the memory may be written again."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, ids: np.ndarray, images: list[Image]) -> None:
        """Called by the producer when `views` are filled: keep the ids and start the copy to the GPU."""
        self._ids = torch.from_numpy(ids)
        if self._device.type == "cuda":
            self._on_device = (
                self._global.to(self._device, non_blocking=True),
                None if self._local is None else self._local.to(self._device, non_blocking=True),
            )
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))

    def hand_over(self) -> Crops:
        """Called by the consumer: the batch, ordered after its copy on the consumer's stream."""
        global_, local = self._on_device
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._copied)
            for tensor in (global_, local):
                if tensor is not None:
                    tensor.record_stream(stream)
            self._on_device = (self._global, self._local)  # the device copy belongs to the consumer now
        return Crops(global_, local, self._ids)

    def release(self) -> None:
        """Called by the consumer when it needs the batch no more."""


class DeviceBuffer:
    """Memory of one micro-batch on the GPU, filled there. Events order the producer's and the consumer's
    stream; the host waits for nothing but images whose memory goes back to DALI."""

    def __init__(self, crops: CropConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._global, self._local, self.views = _allocate(crops, batch, {"dtype": dtype, "device": device})
        self._ids = torch.empty(0, dtype=torch.int64)
        self._images: list[Image] = []
        self._filled: Any = None  # torch.cuda.Event
        # Recorded now for the first use: the allocator may hand out memory that queued work still reads.
        self._released = self._record()

    def wait(self) -> None:
        """Called by the producer: what its stream does next comes after the consumer's last use."""
        torch.cuda.current_stream(self._device).wait_event(self._released)
        if self._filled is not None:
            self._filled.synchronize()  # long past: other buffers were filled since
        self._images = []

    def send(self, ids: np.ndarray, images: list[Image]) -> None:
        """Called by the producer when `views` are being filled from `images`, which are kept until then."""
        self._ids, self._images = torch.from_numpy(ids), images
        self._filled = self._record()

    def hand_over(self) -> Crops:
        """Called by the consumer: the batch, ordered after what fills it on the consumer's stream."""
        torch.cuda.current_stream(self._device).wait_event(self._filled)
        return Crops(self._global, self._local, self._ids)

    def release(self) -> None:
        """Called by the consumer when it queues no more work on the batch."""
        self._released = self._record()

    def _record(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event


def resident(images: Sequence[np.ndarray], device: torch.device) -> list[Image]:
    """The images in memory of their own: on the CPU an array each, on a GPU one block, sent in one copy."""
    if device.type == "cpu":
        return [np.array(image) for image in images]
    packed = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    parts = packed.to(device).split([image.size for image in images])
    return [part.view(image.shape) for part, image in zip(parts, images, strict=True)]


def _allocate(
    crops: CropConfig, batch: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Memory of global and local crops, and each view's part of it: [B, 3, S, S]."""

    def memory(views: int, size: int) -> Tensor:
        return torch.empty(views * batch, 3, size, size, **options)

    global_, local = memory(2, crops.global_crops_size), None
    views = list(global_.split(batch))
    if crops.local_crops_number:
        local = memory(crops.local_crops_number, crops.local_crops_size)
        views += local.split(batch)
    return global_, local, views


Buffer: TypeAlias = "HostBuffer | DeviceBuffer"
