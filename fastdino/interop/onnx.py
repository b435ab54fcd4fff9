"""A backbone as one ``.onnx`` file for any batch and image size, compared with PyTorch before it is kept.

A ViT's positions are interpolated inside the graph as the official code does it: bicubic, of a grid
P [s, s, D] to h x w patches, is A_h P A_w^T. Row i of A_n [n, s] samples at (i + 1/2) s / (n + 0.1) - 1/2
with the four cubic weights of a = -0.75; samples beyond the border take its value. For images of the
training size the official code takes P as it is: there 0 in the place of 0.1 makes A the identity. As that
choice is a value of the graph and no branch of Python, one graph serves all sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdino
from fastdino.evaluation.features import IMAGENET_MEAN, IMAGENET_STD
from fastdino.models import Backbone, ResNet, VisionTransformer
from fastdino.models.vit import Block

HELP = "Write a ViT or a ResNet as one ONNX file for any batch and image size."
OPSET = 18
"""Version of the operators: known to runtimes since 2023."""
TOLERANCE = 1e-4
"""Largest difference to PyTorch with which a file is written, relative to the largest output."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run or checkpoint directory, or a file of weights")
    parser.add_argument("target", help="file to write, *.onnx")
    parser.add_argument("--arch", help="architecture, where the file does not say it (vit_small, ...)")
    parser.add_argument("--patch_size", type=int, help="patch side in pixels, checked against the file")
    parser.add_argument("--checkpoint_key", default="auto", help="teacher or student (default: auto)")
    parser.add_argument(
        "--image_size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="this size only: a side, or height and width (default: any multiples of the patch)",
    )


def run(flags: argparse.Namespace) -> int:
    """Load, write and check; prints one line. Raises OSError or ValueError naming what is wrong."""
    require_packages()
    size = flags.image_size
    if size is not None and len(size) > 2:
        raise ValueError(f"--image_size: expected one or two numbers, got {len(size)}")
    from fastdino.interop.weights import load_backbone

    model = load_backbone(
        flags.source, arch=flags.arch, patch_size=flags.patch_size, key=flags.checkpoint_key
    )
    target = Path(flags.target)
    difference = export_onnx(model, target, image_size=None if size is None else (size[0], size[-1]))
    taken = "any image size" if size is None else f"images of {size[0]} x {size[-1]} pixels"
    checked = (
        "not checked, for onnxruntime is not installed"
        if difference is None
        else f"onnxruntime differs from PyTorch by at most {difference:.1e}"
    )
    megabytes = target.stat().st_size / 1e6
    print(f"{target}: pixel_values -> features, tokens; {taken}; {megabytes:.1f} MB; {checked}")
    return 0


def require_packages() -> None:
    """Raises ValueError with what to install unless an export can be made."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX export needs {' and '.join(missing)}: pip install 'fastdino[export]'")


def export_onnx(
    model: Backbone,
    path: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> float | None:
    """Write ``model`` (fp32, on the CPU) to ``path`` in one step, weights inside. Returns the largest
    absolute difference between onnxruntime and PyTorch over several sizes, or None without onnxruntime.

    The file takes ``pixel_values`` [B, C, H, W], normalised images, and gives ``features`` [B, D], a ViT's
    normed [CLS] token or the mean of a ResNet's map, and ``tokens``: [B, 1 + N, D] with [CLS] first, or the
    map's [B, N, D]. ``image_size`` (height, width) fixes H and W; other sizes than multiples of the patch P
    fail at the node ``image_sides_must_be_multiples_of_P``. ``metadata`` joins what the file says of itself.

    Raises ValueError for another model than a ViT or ResNet, an impossible size, missing packages, or if the
    file computes something else.
    """
    require_packages()
    if isinstance(model, VisionTransformer):
        graph: nn.Module = _ViT(model)
    elif isinstance(model, ResNet):
        graph = _ResNet(model)
    else:
        got = f"got a {type(model).__name__}, which lays out its windows anew for each batch and size"
        raise ValueError(f"ONNX export: expected a ViT or a ResNet, {got}")
    patch = _patch(model)
    if image_size is not None and any(side < patch or side % patch for side in image_size):
        sides = " x ".join(map(str, image_size))
        raise ValueError(f"image_size: expected multiples of the patch ({patch} pixels), got {sides}")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    was_training = model.training
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.eval()
        program = _program(graph, model, image_size)
        _describe(program.model, model, image_size, metadata or {})
        program.save(temporary, external_data=False)
        difference = _difference(temporary, model, image_size)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        model.train(was_training)
    return difference


class _ViT(nn.Module):
    """The forward pass of a ViT in operations that trace with unknown sizes; shares the weights."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> features [B, D], tokens [B, 1 + N, D]."""
        vit, p = self.vit, self.vit.patch_size
        batch, chans, height, width = pixel_values.shape
        h, w = height // p, width // p
        patches = pixel_values.reshape(batch, chans, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        projection = vit.patch_embed.proj
        x = F.linear(
            patches.reshape(batch, h * w, chans * p * p), projection.weight.flatten(1), projection.bias
        )
        x = torch.cat((vit.cls_token.expand(batch, 1, -1), x), dim=1) + self.positions(h, w)
        for block in vit.blocks:
            assert isinstance(block, Block)
            qkv = block.attn.qkv(block.norm1(x)).reshape(batch, 1 + h * w, 3, vit.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, 1 + N, d]
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
            x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        tokens = vit.norm(x)
        return tokens[:, 0], tokens

    def positions(self, h: int, w: int) -> Tensor:
        """[1, 1 + h*w, D]."""
        learned = self.vit.pos_embed
        side = math.isqrt(learned.shape[1] - 1)
        rows, columns = torch.scalar_tensor(h), torch.scalar_tensor(w)
        native = (rows == side) & (columns == side)
        extra = torch.where(native, 0.0, 0.1)
        grid = cubic_matrix(h, side, side / (rows + extra)) @ learned[0, 1:].reshape(side, -1)  # [h, side*D]
        grid = cubic_matrix(w, side, side / (columns + extra)) @ grid.reshape(h, side, -1)  # [h, w, D]
        return torch.cat((learned[:, :1], grid.reshape(1, h * w, -1)), dim=1)


def cubic_matrix(n: int, side: int, scale: Tensor) -> Tensor:
    """[n, side] that interpolates ``side`` values to ``n``, sampled ``scale`` apart (module docstring)."""
    a = -0.75
    center = (torch.arange(n) + 0.5) * scale - 0.5  # [n]
    first = center.floor()
    t = (center - first)[:, None]
    near = torch.cat((t, 1 - t), 1)  # distances up to 1 of the two inner samples, [n, 2]
    inner = ((a + 2) * near - (a + 3)) * near * near + 1
    far = near + 1
    outer = ((far - 5) * far + 8) * far * a - 4 * a
    weights = torch.stack((outer[:, 0], inner[:, 0], inner[:, 1], outer[:, 1]), 1)  # [n, 4]
    taken = (first[:, None] + torch.arange(-1, 3)).clamp(0, side - 1)  # [n, 4]
    return (weights[..., None] * (taken[..., None] == torch.arange(side))).sum(1)


class _ResNet(nn.Module):
    """A ResNet with its map."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> features [B, D], tokens [B, N, D]."""
        tokens = self.resnet.feature_map(pixel_values).flatten(2).mT
        return tokens.mean(1), tokens


def _patch(model: Backbone) -> int:
    """What the sides of an image must be multiples of."""
    return model.patch_size if isinstance(model, VisionTransformer) else 1


def _program(graph: nn.Module, model: Backbone, size: tuple[int, int] | None) -> Any:
    """The traced ``torch.onnx.ONNXProgram``."""
    # Sides and batch of the example differ: equal numbers would be taken for the same size.
    patch, dim = _patch(model), torch.export.Dim
    height, width = size or ((3 * patch, 5 * patch) if isinstance(model, VisionTransformer) else (96, 160))
    dynamic: dict[int, Any] = {0: dim("batch")}
    if size is None and isinstance(model, VisionTransformer):
        dynamic |= {2: patch * dim("rows"), 3: patch * dim("columns")}
    elif size is None:
        dynamic |= {2: dim("height", min=33), 3: dim("width", min=33)}  # for the tracer: smaller ones work
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every operator of torchvision where that is not installed
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            return torch.onnx.export(
                graph,
                (torch.zeros(2, model.in_chans, height, width),),
                input_names=["pixel_values"],
                output_names=["features", "tokens"],
                dynamic_shapes=(dynamic,),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        log.setLevel(level)


def _describe(
    onnx_model: Any, model: Backbone, size: tuple[int, int] | None, metadata: Mapping[str, str]
) -> None:
    """Put what a user of the file needs to know into its metadata, and a name where an error shows it."""
    multiples = f"multiples of {_patch(model)}"
    what = {
        "features": model.embed_dim,
        "image_size": size or (multiples if _patch(model) > 1 else "any"),
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
    }
    facts = {
        f"fastdino.{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in what.items()
    }
    onnx_model.metadata_props.update(facts | dict(metadata))
    onnx_model.producer_name, onnx_model.producer_version = "fastdino", fastdino.__version__
    for node in onnx_model.graph:
        if node.op_type == "Reshape" and node.inputs[0].name == "pixel_values":
            node.name = f"image_sides_must_be_{multiples.replace(' ', '_')}"


def _difference(path: Path, model: Backbone, size: tuple[int, int] | None) -> float | None:
    """Largest absolute difference to the model itself, over sizes and batches; ValueError if too large."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    largest = 0.0
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in _probes(model, size):
        images = torch.randn(batch, model.in_chans, height, width, generator=generator)
        with torch.no_grad():
            expected = _outputs(model, images)
        found = session.run(["features", "tokens"], {"pixel_values": images.numpy()})
        for ours, theirs in zip(expected, map(torch.from_numpy, found), strict=True):
            difference = (ours - theirs).abs().max().item()
            if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
                raise ValueError(
                    f"ONNX export: onnxruntime differs from PyTorch by {difference:.2g} at "
                    f"{height} x {width} pixels; nothing was written"
                )
            largest = max(largest, difference)
    return largest


def _outputs(model: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and tokens by the model's own code."""
    if isinstance(model, VisionTransformer):
        return model(images), model.get_intermediate_layers(images, 1)[0]
    assert isinstance(model, ResNet)
    features, (tokens,) = model.forward_regions([images])
    return features, tokens


def _probes(model: Backbone, size: tuple[int, int] | None) -> Sequence[tuple[int, int, int]]:
    """Batch, height and width of images to compare with: training's grid, finer, coarser and not square."""
    if size is not None:
        return [(1, *size), (3, *size)]
    if not isinstance(model, VisionTransformer):
        return [(1, 64, 64), (2, 96, 160), (3, 33, 47)]
    side = math.isqrt(model.pos_embed.shape[1] - 1)
    grids = [(1, side, side), (2, side + 1, side + 1), (3, max(1, side // 2), side), (1, side, side + 3)]
    return [(batch, h * model.patch_size, w * model.patch_size) for batch, h, w in grids]
