"""A backbone to be written elsewhere, with what its run or its file tells about where it comes from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import fastdino
from fastdino.config import (
    ARCHITECTURES,
    Config,
    ModelConfig,
    as_flags,
    config_from_dict,
    config_to_dict,
    with_flags,
)
from fastdino.engine import checkpoint
from fastdino.interop.files import WeightsError, find_checkpoint
from fastdino.interop.foreign import file_of, metadata_of
from fastdino.interop.weights import evaluated, load_backbone
from fastdino.models import Backbone, TimmBackbone, VisionTransformer

# Flags that name places on the machine of the run: no business of those who get the weights.
PLACES = ("data_path", "eval_data_path", "output_dir", "resume", "dist_url")


@dataclass
class Source:
    """What is exported."""

    path: Path
    backbone: Backbone
    image_size: int
    """Side of the images in pixels; a ViT's positions are those of its grid."""
    facts: dict[str, str]
    """Of the origin, by the names of the metadata of safetensors files; unknown ones are left out."""
    run: Path | None
    """Run directory, if these are the weights that the run evaluated."""

    @property
    def config(self) -> Config | None:
        """The resolved configuration of the run."""
        text = self.facts.get("fastdino.config")
        return None if text is None else config_from_dict(json.loads(text))

    @property
    def name(self) -> str:
        """Of the network: vit_small/16, resnet50, ..."""
        from fastdino.evaluation.command import network_name

        return network_name(self.backbone)

    def tensors(self) -> dict[str, Tensor]:
        """The weights by their official names."""
        return dict(self.backbone.state_dict())


def arguments(parser: argparse.ArgumentParser) -> None:
    """The flags :func:`open_source` reads."""
    parser.add_argument(
        "source",
        help="run or checkpoint directory, official .pth, .safetensors, or a folder of timm or transformers",
    )
    parser.add_argument("target", help="what is written; a folder must be new or empty")
    parser.add_argument("--checkpoint_key", default="auto", help="teacher or student (default: auto)")
    parser.add_argument("--arch", help="architecture, where the file does not say it (vit_small, ...)")
    parser.add_argument("--patch_size", type=int, help="patch side in pixels, checked against the file")


def image_size_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image_size",
        type=int,
        metavar="PIXELS",
        help="interpolate a ViT's positions to this size, as the official code does (default: as trained)",
    )


def open_source(flags: argparse.Namespace) -> Source:
    """The backbone that the flags name, its positions at --image_size. Raises OSError, CheckpointError or
    WeightsError naming the file or the flag.
    """
    path = Path(flags.source)
    backbone = load_backbone(path, arch=flags.arch, patch_size=flags.patch_size, key=flags.checkpoint_key)
    if isinstance(backbone, TimmBackbone):
        hint = "timm's own are the attribute model of what fastdino.interop.weights.load_backbone returns"
        raise WeightsError(f"{path}: {backbone.name}: only backbones of ours are exported; {hint}")
    image_size = _at_size(backbone, flags.image_size)
    if path.is_dir() and file_of(path) is None:
        facts, run = _facts_of_run(find_checkpoint(path), flags.checkpoint_key)
    else:
        facts, run = metadata_of(path), None
        facts.setdefault("fastdino.source", path.resolve().name)
    return Source(path, backbone, image_size, {"fastdino.version": fastdino.__version__, **facts}, run)


def _at_size(backbone: Backbone, wanted: int | None) -> int:
    """Gives a ViT the positions of ``wanted`` pixels, or leaves it as it is; returns the side in pixels."""
    if wanted is not None and wanted < 1:
        raise WeightsError(f"--image_size: expected a positive number, got {wanted}")
    if not isinstance(backbone, VisionTransformer):
        return wanted or 224
    side = round((backbone.pos_embed.shape[1] - 1) ** 0.5) * backbone.patch_size
    if wanted in (None, side):
        return side
    assert wanted is not None
    if wanted % backbone.patch_size:
        expected = f"a multiple of the patch size {backbone.patch_size}"
        raise WeightsError(f"--image_size: expected {expected}, got {wanted}")
    backbone.pos_embed.data = backbone.interpolate_pos_encoding(wanted, wanted).detach().contiguous()
    return wanted


def _facts_of_run(found: Path, key: str) -> tuple[dict[str, str], Path | None]:
    """What the checkpoint ``found`` and the files beside it tell; and the run directory, if these weights are
    those that the run evaluated.
    """
    meta = checkpoint.read_meta(found)
    identity: Mapping[str, Any] = meta.get("identity", {})
    run = found.parent.parent if found.parent.name == "checkpoints" else None
    taken, default = evaluated(meta, key), as_flags(Config())
    config = with_flags(config_from_dict(meta["config"]), {name: default[name] for name in PLACES})
    names = [found.name, taken] if run is None else [run.resolve().name, found.name, taken]
    facts = {
        "fastdino.config": json.dumps(config_to_dict(config)),
        "fastdino.source": ", ".join(names),
    }
    if "global batch" in identity:  # an imported checkpoint knows neither its steps nor its images
        facts["fastdino.step"] = str(meta["step"])
        facts["fastdino.images_seen"] = str(meta["step"] * identity["global batch"])
        facts["fastdino.image_list"] = str(identity["list of images"])
    environment = _json(run / "environment.json") if run is not None else {}
    for name in ("commit", "images"):
        if environment.get(name) is not None:
            facts[f"fastdino.{name}"] = str(environment[name])
    return facts, run if taken == evaluated(meta, "auto") else None


def _json(path: Path) -> dict[str, Any]:
    """A JSON object in a file that may be absent or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def model_config(backbone: Backbone) -> ModelConfig:
    """The flags that build such a backbone. Raises WeightsError if there are none."""
    if not isinstance(backbone, VisionTransformer):
        if " " in backbone.name:
            raise WeightsError(f"--arch has no name for a {backbone.name}")
        return ModelConfig(arch=backbone.name, in_chans=backbone.in_chans)
    if (ratio := mlp_ratio(backbone)) != 4:
        raise WeightsError(f"--arch: expected MLPs 4 times as wide as the tokens, got {ratio:g} times")
    sizes = (backbone.embed_dim, backbone.depth, backbone.num_heads)
    model = ModelConfig(patch_size=backbone.patch_size, in_chans=backbone.in_chans)
    for arch in ("vit_tiny", "vit_small", "vit_base"):
        if ARCHITECTURES[arch] == sizes:
            model.arch = arch
            return model
    model.embed_dim, model.depth, model.num_heads = sizes
    return model


def mlp_ratio(backbone: VisionTransformer) -> float:
    """Width of the hidden layers by that of the tokens."""
    return backbone.get_parameter("blocks.0.mlp.fc1.weight").shape[0] / backbone.embed_dim
