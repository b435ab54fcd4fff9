"""Entry points of ``torch.hub.load(repo, "dino_vits16")``: the official models with the official weights."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent / "kernels"))  # where the repository is not installed

from fastdino.models import ResNet, VisionTransformer, vit_base, vit_small  # noqa: E402

dependencies = ["torch", "numpy", "safetensors"]

_URL = "https://dl.fbaipublicfiles.com/dino/dino_{0}_pretrain/dino_{0}_pretrain.pth"


def dino_vits16(pretrained=True, **sizes) -> VisionTransformer:
    """ViT-S/16; ``sizes`` are arguments of :class:`VisionTransformer`."""
    return _filled(vit_small(16, **sizes), pretrained, "deitsmall16")


def dino_vits8(pretrained=True, **sizes) -> VisionTransformer:
    """ViT-S/8."""
    return _filled(vit_small(8, **sizes), pretrained, "deitsmall8")


def dino_vitb16(pretrained=True, **sizes) -> VisionTransformer:
    """ViT-B/16."""
    return _filled(vit_base(16, **sizes), pretrained, "vitbase16")


def dino_vitb8(pretrained=True, **sizes) -> VisionTransformer:
    """ViT-B/8."""
    return _filled(vit_base(8, **sizes), pretrained, "vitbase8")


def dino_resnet50(pretrained=True, **sizes) -> ResNet:
    """ResNet-50 without a classifier; ``sizes`` are arguments of :class:`ResNet`."""
    return _filled(ResNet(**sizes), pretrained, "resnet50")


def _filled(model, pretrained, name):
    """``model``, if ``pretrained`` with the tensors of the official file, all of which have to fit."""
    if pretrained:
        url = _URL.format(name)
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    return model
