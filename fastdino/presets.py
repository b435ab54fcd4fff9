"""Presets: named functions returning the flags in which a run differs from the defaults.

The runs of the paper differ from the defaults of its published code; what its text leaves open (fp32, no
clipping, min_lr, crop scales) follows what the authors told about them. They ran on 16 GPUs x 64 images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def demo() -> dict[str, Any]:
    """A small ViT on the demo images: learns in minutes on two CPU cores."""
    # Images this small leave little that two crops share, so the teacher is sharp (the signal that
    # student_temp / teacher_temp amplifies must outgrow the noise of the crops), the head normalises over the
    # batch, and crops overlap. Strong weight decay keeps the attention from settling on a few patches.
    return {
        "arch": "vit_tiny",
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 8,
        "drop_path_rate": 0.0,
        "out_dim": 1024,
        "use_bn_in_head": True,
        "head_hidden_dim": 256,
        "bottleneck_dim": 64,
        "teacher_temp": 0.018,
        "warmup_teacher_temp": 0.018,
        "momentum_teacher": 0.995,
        "global_crops_size": 48,
        "local_crops_size": 24,
        "local_crops_number": 2,
        "local_crops_scale": (0.2, 0.5),
        "batch_size_per_gpu": 32,
        "epochs": 60,
        "warmup_epochs": 1,
        "freeze_last_layer": 0,
        "lr": 0.016,
        "min_lr": 1e-5,
        "weight_decay": 0.1,
        "eval_every": 8,
        "log_every": 25,
    }


def _paper() -> dict[str, Any]:
    """What all ViT-S/16 runs of the paper share."""
    return {
        "batch_size": 1024,
        "norm_last_layer": False,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "clip_grad": 0.0,
        "min_lr": 1e-5,
        "precision": "fp32",
    }


def _multi_crop(local_crops: int) -> dict[str, Any]:
    return {
        "global_crops_scale": (0.25, 1.0),
        "local_crops_scale": (0.05, 0.25),
        "local_crops_number": local_crops,
    }


def paper_100() -> dict[str, Any]:
    """ViT-S/16, 2x224 + 10x96, 100 epochs. Paper: k-NN 70.9, linear 74.6."""
    return {**_paper(), **_multi_crop(10)}


def paper_300() -> dict[str, Any]:
    """ViT-S/16, 2x224 + 10x96, 300 epochs. Paper: k-NN 72.8, linear 76.1."""
    return {**paper_100(), "epochs": 300}


def paper_800() -> dict[str, Any]:
    """ViT-S/16, 2x224 + 10x96, 800 epochs. Paper: k-NN 74.5, linear 77.0."""
    return {**paper_100(), "epochs": 800}


def table8_2x224() -> dict[str, Any]:
    """Table 8, no local crops, 100 epochs. Paper: linear 67.8, 15.3 h on 16 V100, 9.3 GB each."""
    return {**_paper(), "global_crops_scale": (0.14, 1.0), "local_crops_number": 0}


def table8_2x224_2x96() -> dict[str, Any]:
    """Table 8, 2 local crops, 100 epochs. Paper: linear 71.5, 17.0 h on 16 V100, 10.5 GB each."""
    return {**_paper(), **_multi_crop(2)}


def table8_2x224_6x96() -> dict[str, Any]:
    """Table 8, 6 local crops, 100 epochs. Paper: linear 73.8, 20.3 h on 16 V100, 12.9 GB each."""
    return {**_paper(), **_multi_crop(6)}


def table8_2x224_10x96() -> dict[str, Any]:
    """Table 8, 10 local crops, 100 epochs. Paper: linear 74.6, 24.2 h on 16 V100, 15.4 GB each."""
    return {**_paper(), **_multi_crop(10)}


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "demo": demo,
    "paper-100": paper_100,
    "paper-300": paper_300,
    "paper-800": paper_800,
    "table8-2x224": table8_2x224,
    "table8-2x224-2x96": table8_2x224_2x96,
    "table8-2x224-6x96": table8_2x224_6x96,
    "table8-2x224-10x96": table8_2x224_10x96,
}
