"""Files in the official layout, written from its description without the code under test."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DEPTH, PATCH, SIDE, K, BOTTLENECK = 12, 16, 14, 12, 256


def backbone_shapes(dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + SIDE**2, dim),
        "patch_embed.proj.weight": (dim, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(DEPTH):
        for name, shape in (
            ("norm1.weight", (dim,)),
            ("norm1.bias", (dim,)),
            ("attn.qkv.weight", (3 * dim, dim)),
            ("attn.qkv.bias", (3 * dim,)),
            ("attn.proj.weight", (dim, dim)),
            ("attn.proj.bias", (dim,)),
            ("norm2.weight", (dim,)),
            ("norm2.bias", (dim,)),
            ("mlp.fc1.weight", (4 * dim, dim)),
            ("mlp.fc1.bias", (4 * dim,)),
            ("mlp.fc2.weight", (dim, 4 * dim)),
            ("mlp.fc2.bias", (dim,)),
        ):
            shapes[f"blocks.{i}.{name}"] = shape
    return shapes | {"norm.weight": (dim,), "norm.bias": (dim,)}


def head_shapes(dim: int, hidden: int, batch_norm: bool) -> dict[str, tuple[int, ...]]:
    linears = [(hidden, dim), (hidden, hidden), (BOTTLENECK, hidden)]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (rows, columns) in enumerate(linears):
        at = i * (3 if batch_norm else 2)
        shapes |= {f"mlp.{at}.weight": (rows, columns), f"mlp.{at}.bias": (rows,)}
        if batch_norm and i < 2:
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"mlp.{at + 1}.{name}"] = (rows,)
            shapes[f"mlp.{at + 1}.num_batches_tracked"] = ()
    return shapes | {"last_layer.weight_g": (K, 1), "last_layer.weight_v": (K, BOTTLENECK)}


def tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (
            name,
            torch.tensor(seed)
            if name.endswith("tracked")
            else torch.randn(shape, generator=generator) * 0.02,
        )
        for name, shape in shapes.items()
    )


def with_prefix(prefix: str, state: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, value) for name, value in state.items())


def training_file(
    *,
    optimizer: str = "adamw",
    batch_norm: bool = False,
    norm_last_layer: bool = True,
    frozen: bool = False,
    full_size: bool = False,
) -> dict[str, Any]:
    """What the official script saves after an epoch; narrower, by flags of ours, unless ``full_size``."""
    dim, hidden = (192, 2048) if full_size else (48, 32)
    shapes = {f"backbone.{k}": v for k, v in backbone_shapes(dim).items()}
    shapes |= {f"head.{k}": v for k, v in head_shapes(dim, hidden, batch_norm).items()}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    trained = [
        name
        for name in shapes
        if not name.endswith(buffers) and not (norm_last_layer and name.endswith("weight_g"))
    ]
    decayed = [name for name in trained if not name.endswith(".bias") and len(shapes[name]) > 1]
    plain = [name for name in trained if name not in decayed]
    generator = torch.Generator().manual_seed(9)
    state: dict[int, dict[str, Any]] = {}
    for number, name in enumerate(decayed + plain):
        if frozen and "last_layer" in name:
            continue
        moments = [torch.randn(shapes[name], generator=generator) for _ in range(2)]
        state[number] = {
            "adamw": {"step": torch.tensor(1251.0), "exp_avg": moments[0], "exp_avg_sq": moments[1].square()},
            "sgd": {"momentum_buffer": moments[0]},
            "lars": {"mu": moments[0]},
        }[optimizer]
    settings: dict[str, Any] = {
        "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.04, "amsgrad": False, "fused": None},
        "sgd": {"momentum": 0.9, "dampening": 0, "weight_decay": 0.04, "nesterov": False},
        "lars": {"weight_decay": 0.04, "momentum": 0.9, "eta": 0.001, "weight_decay_filter": None},
    }[optimizer]
    numbers = list(range(len(trained)))
    # The script sets learning rate and weight decay from NumPy arrays.
    groups = [
        {
            "lr": np.float64(1.5e-4),
            **settings,
            "weight_decay": np.float64(0.0401),
            "params": numbers[: len(decayed)],
        },
        {"lr": np.float64(1.5e-4), **settings, "weight_decay": 0.0, "params": numbers[len(decayed) :]},
    ]
    args = argparse.Namespace(
        arch="vit_tiny",
        patch_size=PATCH,
        out_dim=K,
        norm_last_layer=norm_last_layer,
        use_bn_in_head=batch_norm,
        use_fp16=True,
        optimizer=optimizer,
        global_crops_scale=(0.4, 1.0),
        local_crops_scale=[0.05, 0.25],
        local_crops_number=10,
        data_path="/imagenet/train",
        epochs=300,
        lr=0.001,
        seed=3,
        gpu=0,
        rank=0,
        world_size=16,
        dist_backend="nccl",
    )
    if not full_size:
        args.embed_dim, args.head_hidden_dim = dim, hidden
    return {
        "student": with_prefix("module.", tensors(shapes, 1)),
        "teacher": with_prefix("module." if batch_norm else "", tensors(shapes, 2)),
        "optimizer": {"state": state, "param_groups": groups},
        "epoch": 1,
        "args": args,
        "dino_loss": OrderedDict(center=torch.randn(1, K, generator=generator)),
        "fp16_scaler": {
            "scale": 32768.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 17,
        },
    }


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, with equal types, order and dtypes (a NumPy number counts as the Python number)."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, argparse.Namespace):
        assert_same(vars(a), vars(b), where)
    elif isinstance(a, dict):
        assert type(a) is type(b) and list(a) == list(b), f"{where}: {list(a)} / {list(b)}"
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b and (type(a) is type(b) or isinstance(a, np.generic)), f"{where}: {a!r} / {b!r}"


@pytest.fixture
def layout() -> Any:
    """The helpers of this file as one object: conftest modules cannot be imported by tests."""
    return argparse.Namespace(
        training_file=training_file,
        backbone=lambda seed=2, dim=192: tensors(backbone_shapes(dim), seed),
        assert_same=assert_same,
        with_prefix=with_prefix,
    )
