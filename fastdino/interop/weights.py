"""A backbone from any weights: our checkpoints and runs, official training files, released backbones."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdino.config import ARCHITECTURES
from fastdino.engine import checkpoint
from fastdino.interop.files import WeightsError, find_checkpoint
from fastdino.interop.official import differences, read_official
from fastdino.models import VisionTransformer


def load_backbone(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    patch_size: int | None = None,
    key: str = "teacher",
) -> VisionTransformer:
    """The backbone stored at ``path``, in evaluation mode and fp32, on the CPU.

    Args:
        path: checkpoint directory, run directory (its newest valid checkpoint), or an official ``.pth`` file.
        arch: checked against the file if given; settles the number of heads of a file that does not tell.
        patch_size: checked against the file if given.
        key: ``teacher`` or ``student``; a bare backbone file has only one set of weights and ignores it.

    Sizes come from the tensors. The number of heads comes from the stored configuration, else from ``arch``,
    else it is width / 64 as in all official models. Raises OSError, WeightsError or CheckpointError naming
    the file; a model is returned whole or not at all.
    """
    path = Path(path)
    if key not in ("teacher", "student"):
        raise ValueError(f"key: expected teacher or student, got {key!r}")
    state, settings = _native(path, key) if path.is_dir() else _official(path, key)
    shape = _sizes(path, state)
    if arch is not None:
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        if arch != settings.get("arch") and ARCHITECTURES[arch][:2] != (shape["embed_dim"], shape["depth"]):
            raise WeightsError(
                f"{path}: {arch} has width {ARCHITECTURES[arch][0]} and {ARCHITECTURES[arch][1]} blocks, "
                f"the file has width {shape['embed_dim']} and {shape['depth']} blocks"
            )
    if patch_size is not None and patch_size != shape["patch_size"]:
        raise WeightsError(f"{path}: expected patch_size {patch_size}, the file has {shape['patch_size']}")
    with torch.device("meta"):
        model = VisionTransformer(**shape, num_heads=_num_heads(path, settings, arch, shape["embed_dim"]))
    problems = differences(model.state_dict(), state)
    if problems:
        raise WeightsError(f"{path}: not the weights of a ViT: {problems}")
    # Names and shapes are known to fit; assigning needs no initialised model and draws no random numbers.
    model.load_state_dict({name: state[name].float() for name in model.state_dict()}, assign=True)
    return model.eval()


def _native(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model, _, meta = checkpoint.load(find_checkpoint(path))
    prefix = f"{key}.backbone."
    state = {name.removeprefix(prefix): t for name, t in model.items() if name.startswith(prefix)}
    return state, meta["config"]["model"]


def _official(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    official = read_official(path)
    bare = official.student is None and official.args is None
    weights = official.teacher if bare or key == "teacher" else official.student
    if weights is None:
        raise WeightsError(f"{path}: has no {key}")
    state = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    return state, official.args or {}


def _sizes(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the VisionTransformer whose tensors these are."""
    kernel, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if kernel is None or positions is None or hidden is None or kernel.ndim != 4 or positions.ndim != 3:
        some = ", ".join(list(state)[:8]) or "nothing"
        raise WeightsError(
            f"{path}: not the weights of a ViT: missing patch_embed.proj.weight, pos_embed or "
            f"blocks.0.mlp.fc1.weight; it holds {some}{' ...' if len(state) > 8 else ''}"
        )
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        raise WeightsError(f"{path}: pos_embed holds {positions.shape[1]} tokens, expected 1 + a square")
    dim, in_chans, patch_size = kernel.shape[:3]
    blocks = {
        int(name.split(".")[1])
        for name in state
        if name.startswith("blocks.") and name.split(".")[1].isdigit()
    }
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": max(blocks) + 1,
        "mlp_ratio": hidden.shape[0] / dim,
    }


def _num_heads(path: Path, settings: Mapping[str, Any], arch: str | None, embed_dim: int) -> int:
    if settings.get("num_heads"):
        return int(settings["num_heads"])
    named = settings.get("arch") if settings.get("arch") in ARCHITECTURES else arch
    if named is not None:
        return ARCHITECTURES[named][2]
    if embed_dim % 64:
        raise WeightsError(f"{path}: the number of heads is not known for width {embed_dim}; give arch")
    return embed_dim // 64
