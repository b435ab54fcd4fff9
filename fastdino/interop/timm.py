"""A folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens, and transformers' AutoModel
through its TimmWrapper; written without timm.

The names of a ViT's and of a ResNet's tensors are the official ones. timm's Swin has another epsilon in its
norms, and no setting for it in such a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdino.interop.source import Source
    from fastdino.models import VisionTransformer

HELP = "Write a folder for timm (and transformers' AutoModel)."

# Models of timm by width, depth, heads and patch, and the one to start from for other ViTs.
_VITS = {
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (384, 12, 6, 8): "vit_small_patch8_224",
    (768, 12, 12, 16): "vit_base_patch16_224",
    (768, 12, 12, 8): "vit_base_patch8_224",
}
_ANY_VIT = "vit_tiny_patch16_224"

_USAGE = """```python
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:PATH", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("picture.jpg").convert("RGB")).unsqueeze(0)
with torch.no_grad():
    features = model(image)                 # [1, {width}]
    tokens = model.forward_features(image)  # {tokens}
```"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastdino.interop import folder

    folder.arguments(parser)


def run(flags: argparse.Namespace) -> int:
    from fastdino.interop import folder

    return folder.run(flags, export_timm, 'timm.create_model("local-dir:PATH", pretrained=True)')


def export_timm(
    source: Source, folder: Path, *, license: str | None = None, results: list[str] | None = None
) -> None:
    """Write the folder; ``license`` and ``results`` go to the model card. Raises OSError or WeightsError."""
    from fastdino.interop.card import model_card
    from fastdino.interop.folder import write_folder
    from fastdino.models import VisionTransformer

    config = timm_config(source, license)
    vit = isinstance(source.backbone, VisionTransformer)
    tokens = "[1, 1 + patches, D], [CLS] first" if vit else "[1, D, h, w], the last map"
    tokens = tokens.replace("D", str(source.backbone.embed_dim))
    usage = _USAGE.format(width=source.backbone.embed_dim, tokens=tokens)
    card = model_card(source, library="timm", usage=usage, license=license, results=results or [])
    write_folder(folder, source.tensors(), source.facts, {"config.json": config}, card)


def timm_config(source: Source, license: str | None) -> dict[str, Any]:
    """config.json. Raises WeightsError for a backbone that timm does not have."""
    from fastdino.evaluation.features import IMAGENET_MEAN, IMAGENET_STD, center_view
    from fastdino.interop.files import WeightsError
    from fastdino.models import ResNet, VisionTransformer
    from fastdino.models.resnet import BLOCKS

    backbone, size = source.backbone, source.image_size
    vit = isinstance(backbone, VisionTransformer)
    if isinstance(backbone, VisionTransformer):
        architecture, arguments = _vit(backbone, size)
    elif isinstance(backbone, ResNet) and (backbone.embed_dim, backbone.blocks) == (2048, BLOCKS):
        architecture, arguments = (
            "resnet50",
            {"in_chans": backbone.in_chans} if backbone.in_chans != 3 else {},
        )
    else:
        reason = "no wider ones" if isinstance(backbone, ResNet) else "and of Swins one with another epsilon"
        raise WeightsError(f"{source.path}: timm has ViTs and the ResNet-50, {reason}; got {source.name}")
    pretrained: dict[str, Any] = {
        "tag": "fastdino",
        "input_size": [backbone.in_chans, size, size],
        "fixed_input_size": vit,
        "interpolation": "bicubic",
        "crop_pct": _crop_pct(size, center_view(size, size, size)[0][0]),
        "crop_mode": "center",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "num_classes": 0,
        "pool_size": None if vit else [-(-size // 32)] * 2,
        "first_conv": "patch_embed.proj" if vit else "conv1",
        "classifier": "head" if vit else "fc",
    }
    if license is not None:
        pretrained["license"] = license
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": "token" if vit else "avg",
        "pretrained_cfg": pretrained,
    }
    return config | ({"model_args": arguments} if arguments else {})


def _vit(vit: VisionTransformer, size: int) -> tuple[str, dict[str, Any]]:
    """A model of timm and what is different in ours."""
    from fastdino.interop.source import mlp_ratio

    sizes = (vit.embed_dim, vit.depth, vit.num_heads, vit.patch_size)
    name = _VITS.get(sizes)
    arguments: dict[str, Any] = {}
    if name is None:
        name = _ANY_VIT
        arguments = dict(zip(("embed_dim", "depth", "num_heads", "patch_size"), sizes, strict=True))
    if size != 224:
        arguments["img_size"] = size
    if vit.in_chans != 3:
        arguments["in_chans"] = vit.in_chans
    if mlp_ratio(vit) != 4:
        arguments["mlp_ratio"] = mlp_ratio(vit)
    return name, arguments


def _crop_pct(size: int, shorter: int) -> float:
    """The share that makes timm, which rounds ``size`` / share down, resize to ``shorter`` pixels."""
    share = size / shorter
    return share if int(size / share) == shorter else size / (shorter + 0.5)
