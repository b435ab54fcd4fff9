"""Files and folders of timm, transformers and safetensors, read under the official names.

timm calls the tensors of a ViT and of a ResNet as the official code does. transformers' names of a ViT are in
``HF_NAMES``; its queries, keys and values are the rows of our ``qkv``, in this order."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdino.config import config_from_dict
from fastdino.interop.files import WeightsError, is_safetensors, read_pickle, read_safetensors

# The official name of a tensor, without .weight and .bias, by that of transformers; {} is a block.
HF_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.{}.layernorm_before": "blocks.{}.norm1",
    "encoder.layer.{}.attention.output.dense": "blocks.{}.attn.proj",
    "encoder.layer.{}.layernorm_after": "blocks.{}.norm2",
    "encoder.layer.{}.intermediate.dense": "blocks.{}.mlp.fc1",
    "encoder.layer.{}.output.dense": "blocks.{}.mlp.fc2",
    "layernorm": "norm",
}
HF_QKV = tuple(f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value"))
_FILES = ("model.safetensors", "pytorch_model.bin")


def file_of(folder: Path) -> Path | None:
    """The weights in a folder of timm or transformers, None if it is no such folder."""
    if (folder / "manifest.json").is_file():  # one of our checkpoints
        return None
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def read_weights(path: Path) -> tuple[Any, dict[str, Any]]:
    """``(contents, settings)`` of a file or folder of weights: tensors by official names, or what an official
    training file holds; and what is known of the model (``arch``, ``num_heads``).

    Raises OSError or WeightsError naming the file.
    """
    folder = path if path.is_dir() else path.parent
    file = file_of(path) if path.is_dir() else path
    if file is None:
        raise WeightsError(f"{path}: expected {' or '.join(_FILES)} in this folder")
    safe = is_safetensors(file)
    contents, metadata = read_safetensors(file) if safe else (read_pickle(file), {})
    beside = safe or path.is_dir()
    config = _config(folder / "config.json") if beside and (folder / "config.json").is_file() else {}
    settings = _settings(config, metadata, folder / "config.json")
    if isinstance(contents, Mapping) and is_hf(contents):
        contents = from_hf(contents, file)
    return contents, settings


def metadata_of(path: Path) -> dict[str, str]:
    """Ours in the safetensors file at ``path``, or of the folder ``path``; empty if there is none."""
    file = file_of(path) if path.is_dir() else path
    if file is None or not is_safetensors(file):
        return {}
    return {k: v for k, v in read_safetensors(file)[1].items() if k.startswith("fastdino.")}


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: expected the settings of a model, got {type(config).__name__}")
    return config


def _settings(config: Mapping[str, Any], metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What of the model its tensors do not tell; refuses a model that computes something else with them."""
    settings: dict[str, Any] = {}
    if "fastdino.config" in metadata:
        try:
            settings = asdict(config_from_dict(json.loads(metadata["fastdino.config"])).model)
        except (ValueError, TypeError, AttributeError):
            pass  # readers do not depend on it
    arguments = config.get("model_args") or {}
    heads = config.get("num_attention_heads", arguments.get("num_heads"))
    if heads is not None:
        settings["num_heads"] = heads
    for name, value in (("hidden_act", config.get("hidden_act")), ("act_layer", arguments.get("act_layer"))):
        if value not in (None, "gelu"):
            raise WeightsError(f"{path}: {name}: expected gelu, got {value!r}")
    return settings


def is_hf(state: Mapping[Any, Any]) -> bool:
    """Whether these are names of transformers' ViT."""
    return any(str(name).endswith("embeddings.patch_embeddings.projection.weight") for name in state)


def from_hf(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors of transformers' ViT under official names. Its pooler and classifier, which DINO does not have,
    are left out. Raises WeightsError naming a tensor that has no place.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: expected tensors by name, got {type(value).__name__} under {name!r}")
        bare = name.removeprefix("module.").removeprefix("vit.")
        if bare.startswith(("pooler.", "classifier.")):
            continue
        pattern, number, suffix = _parted(bare)
        if pattern in HF_QKV:
            parts.setdefault(f"blocks.{number}.attn.qkv{suffix}", {})[pattern] = value
        elif pattern in HF_NAMES:
            renamed[HF_NAMES[pattern].format(number) + suffix] = value
        else:
            raise WeightsError(f"{path}: {name} has no place in a ViT of DINO")
    for name, found in parts.items():
        if len(found) < len(HF_QKV):
            missing = ", ".join(part.rpartition(".")[2] for part in HF_QKV if part not in found)
            raise WeightsError(f"{path}: missing {missing} of {name}")
        renamed[name] = torch.cat([found[part] for part in HF_QKV])
    return renamed


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ViT under the names that transformers 4 and 5 read; inverse of :func:`from_hf`."""
    theirs = {ours: name for name, ours in HF_NAMES.items()}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        pattern, number, suffix = _parted(name)
        if pattern == "blocks.{}.attn.qkv":
            for part, rows in zip(HF_QKV, value.chunk(3), strict=True):
                renamed[part.format(number) + suffix] = rows.clone()
        else:
            renamed[theirs[pattern].format(number) + suffix] = value
    return renamed


def _parted(name: str) -> tuple[str, str, str]:
    """``(name with {} for the number of the block and without its suffix, that number, the suffix)``."""
    found = re.fullmatch(r"(?:(encoder\.layer\.|blocks\.)(\d+)\.)?(.*?)(\.weight|\.bias)?", name, re.DOTALL)
    assert found is not None
    stem = f"{found[1]}{{}}.{found[3]}" if found[2] else found[3]
    return stem, found[2] or "", found[4] or ""
