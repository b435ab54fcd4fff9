"""A backbone from any weights: our checkpoints and runs, official training files, released backbones, and
safetensors files and folders of timm and transformers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdino.config import ALIASES, ARCHITECTURES, RESNETS, SWIN_PATCH, SWINS, backbone_family
from fastdino.engine import checkpoint
from fastdino.interop.files import WeightsError, find_checkpoint
from fastdino.interop.foreign import file_of, read_weights
from fastdino.interop.official import differences, understood
from fastdino.models import Backbone, ResNet, SwinTransformer, TimmBackbone, VisionTransformer
from fastdino.models.swin import resize_bias_table
from fastdino.models.swin_windows import relative_position_index

KINDS = {"vit": "ViT", "resnet": "ResNet", "swin": "Swin", "timm": "model of timm"}


def load_backbone(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    patch_size: int | None = None,
    key: str = "auto",
) -> Backbone:
    """The backbone stored at ``path``, in evaluation mode and fp32, on the CPU.

    Args:
        path: checkpoint directory, run directory (its newest valid checkpoint), a ``.pth`` file of the
            official code, of EsViT or, for a ResNet, of torchvision; a ``.safetensors`` file of ours or
            timm's; a folder of timm's or, for a ViT, of transformers'. Its contents tell which of them it is.
        arch: checked against the file if given; settles the number of heads of a ViT file that does not tell.
            A Swin of another window than the file's gets its bias tables resized.
        patch_size: checked against the file if given.
        key: ``teacher`` or ``student``; ``auto`` is the student of a run of BYOL, MoCo-v2 or SwAV, whose
            result it is, else the teacher. A bare backbone file has one set of weights and ignores it.

    Kind and sizes come from the tensors. The number of heads of a ViT comes from the stored configuration,
    else from ``arch``, else it is width / 64 as in all official models. Raises OSError, WeightsError or
    CheckpointError naming the file; a model is returned whole or not at all.
    """
    path = Path(path)
    if key not in ("auto", "teacher", "student"):
        raise ValueError(f"key: expected auto, teacher or student, got {key!r}")
    native = path.is_dir() and file_of(path) is None
    state, settings = _native(path, key) if native else _foreign(path, key)
    family = "timm" if _is_timm(settings) else _family(path, state)
    if arch is not None and backbone_family(arch) != family:
        raise WeightsError(f"{path}: expected {arch}, the file holds a {KINDS[family]}")
    if family == "vit":
        model: Backbone = _vit(path, state, settings, arch, patch_size)
    elif family == "timm":
        with torch.random.fork_rng(devices=[]):  # not without memory: some of its buffers are in no file
            model = TimmBackbone(settings["arch"], settings["img_size"], settings["in_chans"])
    elif family == "resnet":
        model = _resnet(path, state, arch, patch_size)
    else:
        model = _swin(path, state, arch, patch_size)
    problems = differences(model.state_dict(), state)
    if problems:
        raise WeightsError(f"{path}: not the weights of a {KINDS[family]}: {problems}")
    # Names and shapes are known to fit; assigning needs no initialised model and draws no random numbers.
    whole = {n: state[n].float() if state[n].is_floating_point() else state[n] for n in model.state_dict()}
    model.load_state_dict(whole, assign=True)
    return model.eval()


def _is_timm(settings: Mapping[str, Any]) -> bool:
    """Whether a run of ours trained a model of timm's."""
    return "img_size" in settings and str(settings.get("arch")).startswith("timm:")


def _family(path: Path, state: Mapping[str, Tensor]) -> str:
    if any(name.endswith("relative_position_bias_table") for name in state):
        return "swin"
    if "conv1.weight" in state:
        return "resnet"
    if not state.keys() & {"cls_token", "pos_embed", "patch_embed.proj.weight"}:
        raise WeightsError(f"{path}: not the weights of a ViT, a ResNet-50 or a Swin: {_contents(state)}")
    return "vit"


def _contents(state: Mapping[str, Tensor]) -> str:
    some = ", ".join(list(state)[:8]) or "nothing"
    return f"it holds {some}{' ...' if len(state) > 8 else ''}"


def _vit(
    path: Path,
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    arch: str | None,
    patch_size: int | None,
) -> VisionTransformer:
    """A model without memory for its weights, as :func:`_resnet` and :func:`_swin` give."""
    shape = _sizes(path, state)
    if arch is not None and arch != settings.get("arch"):
        width, depth, _ = ARCHITECTURES[arch]
        if (width, depth) != (shape["embed_dim"], shape["depth"]):
            raise WeightsError(
                f"{path}: {arch} has width {width} and {depth} blocks, "
                f"the file has width {shape['embed_dim']} and {shape['depth']} blocks"
            )
    if patch_size is not None and patch_size != shape["patch_size"]:
        raise WeightsError(f"{path}: expected patch_size {patch_size}, the file has {shape['patch_size']}")
    with torch.device("meta"):
        return VisionTransformer(**shape, num_heads=_num_heads(path, settings, arch, shape["embed_dim"]))


def _resnet(
    path: Path, state: MutableMapping[str, Tensor], arch: str | None, patch_size: int | None
) -> ResNet:
    """The classifier of torchvision's files is taken out of ``state``, and counters that old ones lack are
    put in.
    """
    if patch_size is not None:
        raise WeightsError(f"{path}: expected patch_size {patch_size}, the file holds a ResNet")
    stem = state["conv1.weight"]
    if stem.ndim != 4:
        raise WeightsError(f"{path}: conv1.weight has {stem.ndim} dimensions, expected 4")
    width, in_chans = stem.shape[:2]
    if arch is not None and RESNETS[arch] != width:
        raise WeightsError(f"{path}: {arch} begins with {RESNETS[arch]} channels, the file with {width}")
    blocks = [_count(state, f"layer{i}.") for i in range(1, 5)]
    if 0 in blocks:
        raise WeightsError(f"{path}: not the weights of a ResNet: missing: layer{blocks.index(0) + 1}.0")
    with torch.device("meta"):
        model = ResNet(width, in_chans, blocks)
    for name in ("fc.weight", "fc.bias"):
        state.pop(name, None)
    for name in model.state_dict():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.tensor(0))
    return model


def _swin(
    path: Path, state: MutableMapping[str, Tensor], arch: str | None, patch_size: int | None
) -> SwinTransformer:
    """Bias tables in ``state`` are resized to the windows of ``arch``, and what follows from the sizes alone
    is put in or taken out.
    """
    if patch_size not in (None, SWIN_PATCH):
        raise WeightsError(f"{path}: expected patch_size {patch_size}, a Swin has {SWIN_PATCH}")
    depths = [_count(state, f"layers.{i}.blocks.") for i in range(_count(state, "layers."))]
    tables = [state.get(f"layers.{i}.blocks.0.attn.relative_position_bias_table") for i in range(len(depths))]
    kernel, hidden = state.get("patch_embed.proj.weight"), state.get("layers.0.blocks.0.mlp.fc1.weight")
    if kernel is None or hidden is None or kernel.ndim != 4 or not all(depths):
        missing = "patch_embed.proj.weight, layers.0.blocks.0.mlp.fc1.weight or blocks of a stage"
        raise WeightsError(f"{path}: not the weights of a Swin: missing {missing}; {_contents(state)}")
    if any(table is None or table.ndim != 2 for table in tables):
        raise WeightsError(f"{path}: not the weights of a Swin: a stage has no relative_position_bias_table")
    width, in_chans = kernel.shape[:2]
    found = [table for table in tables if table is not None]
    window = _window(found[0])
    if arch is not None:
        wanted = SWINS[ALIASES.get(arch, arch)]
        if wanted[:2] != (width, tuple(depths)):
            raise WeightsError(
                f"{path}: {arch} has width {wanted[0]} and {wanted[1]} blocks, "
                f"the file has width {width} and {tuple(depths)} blocks"
            )
        window = wanted[2]
    with torch.device("meta"):
        model = SwinTransformer(
            width,
            depths,
            window,
            in_chans,
            num_heads=[table.shape[1] for table in found],
            mlp_ratio=hidden.shape[0] / width,
        )
    for name in [name for name in state if name.endswith(".attn_mask")]:
        del state[name]  # the masks of 224-pixel images in files of the original Swin
    for i, stage in enumerate(model.windows):
        for j, (side, _) in enumerate(stage):
            at = f"layers.{i}.blocks.{j}.attn.relative_position_"
            if arch is not None and f"{at}bias_table" in state:
                state[f"{at}bias_table"] = resize_bias_table(state[f"{at}bias_table"].float(), side)
            state[f"{at}index"] = relative_position_index(side)
    return model


def _window(table: Tensor) -> int:
    """Side of the windows of a bias table [(2w - 1)^2, heads]."""
    return (math.isqrt(len(table)) + 1) // 2


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest number that follows ``prefix`` in a name; 0 if there is none."""
    found = [name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)]
    return max((int(number) + 1 for number in found if number.isdigit()), default=0)


def _native(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model, _, meta = checkpoint.load(find_checkpoint(path))
    key = evaluated(meta, key)
    if key == "teacher" and not any(name.startswith("teacher.") for name in model):
        raise WeightsError(f"{path}: has no teacher, only a student")
    prefix = f"{key}.backbone."
    state = {name.removeprefix(prefix): t for name, t in model.items() if name.startswith(prefix)}
    settings = meta["config"]
    return state, {**settings["model"], "img_size": settings.get("crops", {}).get("global_crops_size", 224)}


def evaluated(meta: Mapping[str, Any], key: str) -> str:
    """``key``, or for auto what is the result of the run whose checkpoint has this ``meta``."""
    if key != "auto":
        return key
    sibling = meta["config"].get("method", {}).get("method", "dino") not in ("dino", "esvit")
    return "student" if sibling else "teacher"


def _foreign(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    contents, settings = read_weights(path)
    official = understood(contents, path)
    bare = official.student is None and official.args is None
    weights = official.teacher if bare or key != "student" else official.student
    if weights is None:
        raise WeightsError(f"{path}: has no {'teacher' if key == 'auto' else key}")
    state = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    return state, official.args or settings


def _sizes(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the VisionTransformer whose tensors these are."""
    kernel, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if kernel is None or positions is None or hidden is None or kernel.ndim != 4 or positions.ndim != 3:
        raise WeightsError(
            f"{path}: not the weights of a ViT: missing patch_embed.proj.weight, pos_embed or "
            f"blocks.0.mlp.fc1.weight; {_contents(state)}"
        )
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        raise WeightsError(f"{path}: pos_embed holds {positions.shape[1]} tokens, expected 1 + a square")
    dim, in_chans, patch_size = kernel.shape[:3]
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": _count(state, "blocks."),
        "mlp_ratio": hidden.shape[0] / dim,
    }


def _num_heads(path: Path, settings: Mapping[str, Any], arch: str | None, embed_dim: int) -> int:
    if settings.get("num_heads"):
        heads = settings["num_heads"]
        if not isinstance(heads, int) or heads < 1 or embed_dim % heads:
            raise WeightsError(f"{path}: expected heads that divide the width {embed_dim}, got {heads!r}")
        return heads
    named = settings.get("arch") if settings.get("arch") in ARCHITECTURES else arch
    if named is not None:
        return ARCHITECTURES[named][2]
    if embed_dim % 64:
        raise WeightsError(f"{path}: the number of heads is not known for width {embed_dim}; give arch")
    return embed_dim // 64
