"""Any backbone of timm that gives one feature vector per image, as ``--arch timm:NAME``: XCiT, ConvNeXt, ...

timm is imported when such a backbone is asked for. Its forward pass is its own: crops of different sizes go
through one after another, and positions are interpolated by timm's rule, not by DINO's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.config import ConfigError
from fastdino.models.attention import join
from fastdino.models.resnet import by_resolution

# How models are told that images of other sizes than img_size come; those without positions need nothing.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})


class TimmBackbone(nn.Module):
    """``timm.create_model(NAME, num_classes=0)`` without pretrained weights."""

    def __init__(
        self, arch: str, img_size: int = 224, in_chans: int = 3, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.name, self.in_chans = arch, in_chans
        self._drop_path_rate = drop_path_rate
        self.model = _create(arch, img_size, in_chans, drop_path_rate)
        self.embed_dim = int(self.model.head_hidden_size)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """One batch of images [B, C, H, W] -> [B, D], or a sequence of batches of possibly different
        resolutions -> [sum of B, D]; in fp32 or wider.
        """
        features = join([self.model(part) for part in by_resolution(x)])
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def forward_regions(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Raises ValueError: what timm's models give besides the vector is different in each of them."""
        raise ValueError(f"expected a backbone with regions, got {self.name}")

    def probe_features(self, x: Tensor, n: int = 1) -> Tensor:
        """What a linear classifier sees, [B, D]: the features, whatever ``n`` blocks are asked for."""
        return self(x)

    @property
    def drop_path_rate(self) -> float:
        """Stochastic depth in training mode."""
        return self._drop_path_rate

    @drop_path_rate.setter
    def drop_path_rate(self, rate: float) -> None:
        if rate not in (0.0, self._drop_path_rate):
            raise ValueError(f"drop_path_rate: expected 0, which switches it off, got {rate}")
        module: Any
        for module in self.modules():
            if type(module).__name__ == "DropPath":
                module.drop_prob = rate
        self._drop_path_rate = rate


def _create(arch: str, img_size: int, in_chans: int, drop_path_rate: float) -> Any:
    """Raises ConfigError if there is no timm, no such model, or none that takes these arguments."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision's are those of another torch
        raise ConfigError("arch", f"{arch} needs timm: pip install timm ({error})") from error
    name = arch.removeprefix("timm:")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.partition('_')[0]}*")[:5])
        raise ConfigError("arch", f"timm has no model {name!r}" + (f"; it has {near}, ..." if near else ""))
    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans}
    if drop_path_rate:
        arguments["drop_path_rate"] = drop_path_rate
    for flag in _ANY_SIZE:
        try:
            return timm.create_model(name, **arguments, **{"img_size": img_size, **flag})
        except TypeError:
            continue
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        raise ConfigError("drop_path_rate", f"expected 0 with --arch {arch} ({error})") from error


def check_timm(arch: str, img_size: int, drop_path_rate: float, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError unless the model exists and gives a vector for crops of the ``sizes`` by flag."""
    with torch.device("meta"):
        model = TimmBackbone(arch, img_size, drop_path_rate=drop_path_rate).eval()
        for flag, size in sizes.items():
            try:
                shape = tuple(model(torch.empty(2, 3, size, size)).shape)
            except (RuntimeError, AssertionError, ValueError) as error:
                got = " ".join(str(error).split())
                raise ConfigError(flag, f"expected a size that {arch} takes, got {size} ({got})") from error
            if shape != (2, model.embed_dim):
                wanted = f"expected a model with one vector of {model.embed_dim} per image"
                raise ConfigError("arch", f"{wanted}, {arch} gives {shape}")
