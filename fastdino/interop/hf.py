"""A folder that transformers' ViTModel, AutoModel and AutoImageProcessor open; written without transformers.

DINO has no pooler, but AutoModel gives every ViT one, and its output is taken for the feature of the image.
It is written as the identity, so ``pooler_output`` is the [CLS] token; that needs ``pooler_act``, which
transformers reads since 4.50.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdino.interop.source import Source

HELP = "Write a ViT as a folder for transformers."

_USAGE = """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("PATH")
model = AutoModel.from_pretrained("PATH").eval()
inputs = processor(Image.open("picture.jpg").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
features = outputs.pooler_output    # [1, {width}]: the [CLS] token, the pooler is the identity
tokens = outputs.last_hidden_state  # [1, 1 + {patches}, {width}], [CLS] first
```

Images of other sizes: export again with `--image_size`. `interpolate_pos_encoding=True` interpolates in
another way than DINO was trained with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastdino.interop import folder

    folder.arguments(parser)


def run(flags: argparse.Namespace) -> int:
    from fastdino.interop import folder

    return folder.run(flags, export_hf, 'transformers.AutoModel.from_pretrained("PATH")')


def export_hf(
    source: Source, folder: Path, *, license: str | None = None, results: list[str] | None = None
) -> None:
    """Write the folder; ``license`` and ``results`` go to the model card. Raises OSError, or WeightsError for
    another backbone than a ViT.
    """
    import torch

    from fastdino.interop.card import model_card
    from fastdino.interop.folder import write_folder
    from fastdino.interop.foreign import to_hf

    config = hf_config(source)
    width = config["hidden_size"]
    tensors = to_hf(source.tensors())
    tensors |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    usage = _USAGE.format(width=width, patches=(source.image_size // config["patch_size"]) ** 2)
    card = model_card(source, library="transformers", usage=usage, license=license, results=results or [])
    settings = {"config.json": config}
    if config["num_channels"] == 3:
        settings["preprocessor_config.json"] = processor_config(source.image_size)
    write_folder(folder, tensors, source.facts, settings, card)


def hf_config(source: Source) -> dict[str, Any]:
    """config.json. Raises WeightsError for another backbone than a ViT."""
    from fastdino.interop.files import WeightsError
    from fastdino.interop.source import mlp_ratio
    from fastdino.models import VisionTransformer

    vit = source.backbone
    if not isinstance(vit, VisionTransformer):
        more = "; a folder of timm opens in transformers too" if source.name == "resnet50" else ""
        raise WeightsError(f"{source.path}: expected a ViT for transformers, got {source.name}{more}")
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "intermediate_size": int(vit.embed_dim * mlp_ratio(vit)),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "image_size": source.image_size,
        "patch_size": vit.patch_size,
        "num_channels": vit.in_chans,
        "qkv_bias": True,
        "encoder_stride": vit.patch_size,
        "pooler_output_size": vit.embed_dim,
        "pooler_act": "linear",
    }


def processor_config(size: int) -> dict[str, Any]:
    """preprocessor_config.json: the view of an image that the evaluation takes. Crops lie one pixel off where
    the longer side after resizing is larger than ``size`` by 3 modulo 4, for transformers rounds down.
    """
    from fastdino.evaluation.features import IMAGENET_MEAN, IMAGENET_STD, center_view

    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": center_view(size, size, size)[0][0]},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
