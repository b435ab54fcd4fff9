"""Presets: what a run changes, and what the paper reports of it, as data.

A preset is another one, its base, with the flags that its row of the paper says; one without a base changes
the defaults. The runs of the paper differ from the defaults of its published code; what its text leaves open
(fp32, no clipping, min_lr, crop scales, which rows had 6 or 10 local crops) follows what the authors told
about them, or what agreeing figures imply. They ran on 16 GPUs x 64 images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """``figure`` says which row it is and what the paper reports; ``delta`` are flags changed in ``base``."""

    figure: str
    base: str | None = None
    delta: dict[str, Any] = field(default_factory=dict)


def flags(name: str) -> dict[str, Any]:
    """Everything that preset ``name`` and its bases set."""
    preset = PRESETS[name]
    return {**({} if preset.base is None else flags(preset.base)), **preset.delta}


def _sweep(
    name: str, title: str, base: str, rows: Mapping[str, tuple[str, dict[str, Any]]]
) -> dict[str, Preset]:
    """``name-key`` for every row: key -> (figure of the paper, delta)."""
    return {
        f"{name}-{key}": Preset(f"{title} {key}. Paper: {figure}.", base, delta)
        for key, (figure, delta) in rows.items()
    }


# Images this small leave little that two crops share, so the teacher is sharp (the signal that student_temp /
# teacher_temp amplifies must outgrow the noise of the crops), the head normalises over the batch, and crops
# overlap. Strong weight decay keeps the attention from settling on a few patches.
_DEMO = {
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

# CIFAR-10 from scratch against the clock (bench/speedrun.py): images of 32 pixels, enlarged so that the blur,
# made for large ones, leaves something of them.
_CIFAR10 = {
    **_DEMO,
    "teacher_temp": 0.02,
    "warmup_teacher_temp": 0.02,
    "momentum_teacher": 0.99,
    "local_crops_number": 4,
    "batch_size_per_gpu": 64,
    "epochs": 6,
    "lr": 0.01,
    "weight_decay": 0.04,
    "weight_decay_end": 0.04,
    "eval_every": 1,
    "eval_bank_size": 10000,
    "nb_knn": (20,),
    "prescan": "off",
    "cache_decoded": "on",
    "logger": "none",
    "report": False,
    "log_every": 50,
}

# What all ViT-S/16 runs of the paper share.
_PAPER = {
    "batch_size": 1024,
    "norm_last_layer": False,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 30,
    "clip_grad": 0.0,
    "min_lr": 1e-5,
    "precision": "fp32",
    "global_crops_scale": (0.25, 1.0),
    "local_crops_scale": (0.05, 0.25),
    "local_crops_number": 10,
}
_NO_MULTI_CROP = {"global_crops_scale": (0.14, 1.0), "local_crops_number": 0}
_SIX_LOCAL = {"global_crops_scale": (0.25, 1.0), "local_crops_number": 6}
_DECAY = {"weight_decay": 0.05, "weight_decay_end": 0.05}
_SWAV = {"teacher": "copy", "teacher_op": "sinkhorn", "local_crops_number": 6}
# ResNet-50 with the large batches of BYOL and SwAV: LARS, as good as no weight decay.
_RESNET = {
    "arch": "resnet50",
    "epochs": 300,
    "precision": "fp32",
    "optimizer": "lars",
    "lr": 0.3,
    "weight_decay": 1e-6,
    "weight_decay_end": 1e-6,
    "clip_grad": 0.0,
    "batch_size": 4096,
}
_RESNET_CROPS = {
    "global_crops_scale": (0.14, 1.0),
    "local_crops_scale": (0.05, 0.14),
    "local_crops_number": 6,
    "min_lr": 0.0048,
}

# 100 epochs with 6 local crops, to which the sweeps of the appendix compare.
_A = "table8-2x224-6x96"

PRESETS: dict[str, Preset] = {
    "demo": Preset("A small ViT on the demo images: learns in minutes on two CPU cores.", None, _DEMO),
    "cifar10-cpu": Preset("CIFAR-10 on one CPU core: python -m bench.speedrun.", None, _CIFAR10),
    "cifar10-speedrun": Preset(
        "CIFAR-10 against the clock on one GPU: python -m bench.speedrun.",
        "cifar10-cpu",
        {
            "embed_dim": 192,
            "depth": 6,
            "num_heads": 3,
            "out_dim": 4096,
            "head_hidden_dim": 1024,
            "bottleneck_dim": 128,
            "batch_size_per_gpu": 256,
            "epochs": 60,
            "warmup_epochs": 5,
            "lr": 0.004,
            "eval_every": 5,
            "eval_bank_size": 50000,
            "cuda_graph": True,
        },
    ),
    "paper-100": Preset("ViT-S/16, 2x224 + 10x96, 100 epochs. Paper: k-NN 70.9, linear 74.6.", None, _PAPER),
    "paper-300": Preset(
        "ViT-S/16, 2x224 + 10x96, 300 epochs. Paper: k-NN 72.8, linear 76.1.", "paper-100", {"epochs": 300}
    ),
    "paper-800": Preset(
        "ViT-S/16, 2x224 + 10x96, 800 epochs. Paper: k-NN 74.5, linear 77.0.", "paper-100", {"epochs": 800}
    ),
}

# -- tables and figures of the paper's main part, and of its appendix B ------------------------------------

PRESETS |= {
    "table8-2x224": Preset(
        "Table 8, no local crops, 100 epochs. Paper: linear 67.8, 15.3 h on 16 V100, 9.3 GB each.",
        "paper-100",
        _NO_MULTI_CROP,
    ),
    "table8-2x224-2x96": Preset(
        "Table 8, 2 local crops, 100 epochs. Paper: linear 71.5, 17.0 h on 16 V100, 10.5 GB each.",
        "paper-100",
        {"local_crops_number": 2},
    ),
    "table8-2x224-6x96": Preset(
        "Table 8, 6 local crops, 100 epochs. Paper: linear 73.8, 20.3 h on 16 V100, 12.9 GB each.",
        "paper-100",
        {"local_crops_number": 6},
    ),
    "table8-2x224-10x96": Preset(
        "Table 8, 10 local crops, 100 epochs. Paper: linear 74.6, 24.2 h on 16 V100, 15.4 GB each.",
        "paper-100",
    ),
}
PRESETS |= {
    f"{name}-300": Preset(
        f"Table 8, {crops} local crops, 300 epochs. Paper: linear {linear}, {hours} h on 16 V100.",
        name,
        {"epochs": 300},
    )
    for name, crops, linear, hours in (
        ("table8-2x224", "no", 72.5, 45.9),
        ("table8-2x224-2x96", "2", 74.5, 51.0),
        ("table8-2x224-6x96", "6", 75.9, 60.9),
        ("table8-2x224-10x96", "10", 76.1, 72.6),
    )
}
PRESETS |= _sweep(
    "table7",
    "Table 7, row",
    "paper-300",
    {
        "1": ("DINO, k-NN 72.8, linear 76.1", {}),
        "2": ("no momentum, k-NN 0.1, linear 0.1", {"teacher": "copy"}),
        "3": ("Sinkhorn-Knopp, k-NN 72.2, linear 76.0", {"teacher_op": "sinkhorn"}),
        "4": ("no multi-crop, k-NN 67.9, linear 72.5", _NO_MULTI_CROP),
        "5": ("MSE, k-NN 52.6, linear 62.4", {"loss": "mse"}),
        "6": ("predictor, k-NN 71.8, linear 75.6", {"predictor": "on"}),
        "7": ("BYOL, k-NN 66.6, linear 71.4", {**_NO_MULTI_CROP, "method": "byol", **_DECAY}),
        "8": ("MoCo-v2, k-NN 62.0, linear 71.6", {**_NO_MULTI_CROP, "method": "mocov2", **_DECAY}),
        "9": ("SwAV, k-NN 64.7, linear 71.8", _SWAV),
    },
)
PRESETS["swav-dino"] = Preset("SwAV as the paper ran it on a ViT: table 7, row 9.", "table7-9")
PRESETS |= _sweep(
    "table9",
    "Table 9, batch",
    "table8-2x224",
    {
        "128": ("k-NN 57.9", {"batch_size": 128}),
        "256": ("k-NN 59.1", {"batch_size": 256}),
        "512": ("k-NN 59.6", {"batch_size": 512}),
        "1024": ("k-NN 59.9", {}),
    },
)
PRESETS |= {
    "table13-mocov2-vit": Preset("Table 13, MoCo-v2. Paper: linear 71.6, k-NN 62.0.", "table7-8"),
    "table13-byol-vit": Preset("Table 13, BYOL. Paper: linear 71.4, k-NN 66.6.", "table7-7"),
    "table13-swav-vit": Preset("Table 13, SwAV. Paper: linear 71.8, k-NN 64.7.", "table7-9"),
    "table13-dino-vit": Preset("Table 13, DINO. Paper: linear 76.1, k-NN 72.8.", "table7-1"),
    "table13-mocov2-rn50": Preset(
        "Table 13, MoCo-v2, ResNet-50. Paper: linear 71.1, k-NN 62.9.",
        None,
        {
            **_RESNET,
            "method": "mocov2",
            "optimizer": "sgd",
            "lr": 0.03,
            "min_lr": 0.0,
            "warmup_epochs": 0,
            "weight_decay": 1e-4,
            "weight_decay_end": 1e-4,
            "batch_size": 256,
            "global_crops_scale": (0.2, 1.0),
            "local_crops_number": 0,
        },
    ),
    "table13-byol-rn50": Preset(
        "Table 13, BYOL, ResNet-50. Paper: linear 72.7, k-NN 65.4.",
        None,
        {
            **_RESNET,
            "method": "byol",
            "momentum_teacher": 0.99,
            "min_lr": 0.0,
            "global_crops_scale": (0.08, 1.0),
            "local_crops_number": 0,
        },
    ),
    "table13-swav-rn50": Preset(
        "Table 13, SwAV, ResNet-50. Paper: linear 74.1, k-NN 65.4.",
        None,
        {**_RESNET, **_RESNET_CROPS, "method": "swav"},
    ),
    "table13-dino-rn50": Preset(
        "Table 13, DINO, ResNet-50. Paper: linear 74.5, k-NN 65.6.",
        None,
        {
            **_RESNET,
            **_RESNET_CROPS,
            "batch_size": 4080,  # 80 GPUs x 51
            "batch_size_per_gpu": 51,
            "out_dim": 60000,
            "norm_last_layer": False,
            "use_bn_in_head": True,
            "head_layers": 2,
            "head_hidden_dim": 4096,
            "teacher_temp": 0.07,
            "warmup_teacher_temp_epochs": 50,
        },
    ),
    "table14-1": Preset("Table 14, row 1, DINO. Paper: linear 76.1.", "table7-1"),
    "table14-2": Preset("Table 14, row 2, MSE. Paper: linear 62.4.", "table7-5"),
    "table14-3": Preset("Table 14, row 3, predictor. Paper: linear 75.6.", "table7-6"),
    "table14-4": Preset("Table 14, row 4, no multi-crop. Paper: linear 72.5.", "table7-4"),
    "table14-5": Preset("Table 14, row 5, MoCo-v2. Paper: linear 71.4.", "table7-8"),
    "table14-6": Preset("Table 14, row 6, MoCo-v2 + 6x96. Paper: linear 73.4.", "table7-8", _SIX_LOCAL),
    "table14-7": Preset("Table 14, row 7, BYOL. Paper: linear 71.4.", "table7-7"),
    "table14-8": Preset(
        "Table 14, row 8, BYOL without predictor. Paper: linear 0.1.", "table7-7", {"predictor": "off"}
    ),
    "table14-9": Preset(
        "Table 14, row 9, MSE, no multi-crop. Paper: linear 52.6.", "table7-5", _NO_MULTI_CROP
    ),
    "table14-10": Preset("Table 14, row 10, BYOL + 6x96. Paper: linear 64.8.", "table7-7", _SIX_LOCAL),
    "table15-1": Preset("Table 15, row 1, momentum, centering. Paper: linear 76.1.", "table7-1"),
    "table15-2": Preset(
        "Table 15, row 2, momentum, softmax over the batch. Paper: linear 75.8.",
        "table7-1",
        {"teacher_op": "softmax_batch"},
    ),
    "table15-3": Preset("Table 15, row 3, momentum, Sinkhorn-Knopp. Paper: linear 76.0.", "table7-3"),
    "table15-4": Preset("Table 15, row 4, no momentum, centering. Paper: linear 0.1.", "table7-2"),
    "table15-5": Preset(
        "Table 15, row 5, no momentum, softmax over the batch. Paper: linear 72.2.",
        "table7-2",
        {"teacher_op": "softmax_batch"},
    ),
    "table15-6": Preset(
        "Table 15, row 6, no momentum, Sinkhorn-Knopp (SwAV). Paper: linear 71.8.", "table7-9"
    ),
}
PRESETS |= _sweep(
    "fig5",
    "Figure 5,",
    "paper-300",
    {f"patch-{n}": ("plotted", {} if n == 16 else {"patch_size": n}) for n in (16, 8, 5)},
)
PRESETS |= _sweep(
    "fig6",
    "Figure 6, teacher:",
    "paper-300",
    {
        "copy": ("k-NN 0.1", {"teacher": "copy"}),
        "prev-iter": ("k-NN 0.1", {"teacher": "prev_iter"}),
        "prev-epoch": ("k-NN 66.6", {"teacher": "prev_epoch"}),
        "momentum": ("k-NN 72.8", {}),
    },
)
_BLUNT = {"teacher_temp": 0.1, "warmup_teacher_temp_epochs": 0}
PRESETS |= _sweep(
    "fig7",
    "Figure 7,",
    "paper-100",
    {
        "no-centering": ("entropy falls to 0, and KL with it", {"center_momentum": 1.0}),
        "no-sharpening": ("entropy rises to ln K, and KL falls to 0", _BLUNT),
        "neither": ("not plotted", {"center_momentum": 1.0, **_BLUNT}),
    },
)

# -- sweeps of the appendix --------------------------------------------------------------------------------

_K4096 = {"out_dim": 4096}
PRESETS |= _sweep(
    "appendix-head-bn",
    "Appendix C, batch norm in the head",
    _A,
    {"off": ("k-NN 69.7", {}), "on": ("k-NN 68.6", {"use_bn_in_head": True})},
)
PRESETS |= _sweep(
    "appendix-layers",
    "Appendix C, layers of the head, K = 4096,",
    _A,
    {
        "2-bottleneck": ("k-NN 62.2", {**_K4096, "head_layers": 1}),
        "3-bottleneck": ("k-NN 68.0", {**_K4096, "head_layers": 2}),
        "4-bottleneck": ("k-NN 69.3", _K4096),
        "1-no-bottleneck": ("k-NN 61.6", {**_K4096, "bottleneck_dim": 0, "head_layers": 1}),
        "2-no-bottleneck": ("k-NN 62.9", {**_K4096, "bottleneck_dim": 0, "head_layers": 2}),
        "3-no-bottleneck": ("k-NN 0.1", {**_K4096, "bottleneck_dim": 0}),
        "4-no-bottleneck": ("k-NN 0.1", {**_K4096, "bottleneck_dim": 0, "head_layers": 4}),
    },
)
PRESETS |= _sweep(
    "appendix-k",
    "Appendix C, K =",
    _A,
    {
        "1024": ("k-NN 67.8", {"out_dim": 1024}),
        "4096": ("k-NN 69.3", _K4096),
        "16384": ("k-NN 69.2", {"out_dim": 16384}),
        "65536": ("k-NN 69.7", {}),
        "262144": ("k-NN 69.1", {"out_dim": 262144}),
    },
)
PRESETS |= _sweep(
    "appendix-act",
    "Appendix C, activation of the head",
    _A,
    {"gelu": ("k-NN 69.7", {}), "relu": ("k-NN 68.9", {"head_act": "relu"})},
)
PRESETS |= _sweep(
    "appendix-center-momentum",
    "Appendix D, momentum of the center",
    _A,
    {
        "0": ("k-NN 69.1", {"center_momentum": 0.0}),
        "0.9": ("k-NN 69.7", {}),
        "0.99": ("k-NN 69.4", {"center_momentum": 0.99}),
        "0.999": ("k-NN 0.1", {"center_momentum": 0.999}),
    },
)
PRESETS |= _sweep(
    "appendix-teacher-temp",
    "Appendix D, temperature of the teacher",
    _A,
    {
        text: (f"k-NN {knn}", {"teacher_temp": float(text), "warmup_teacher_temp_epochs": 0})
        for text, knn in (("0", 43.9), ("0.02", 66.7), ("0.04", 69.6), ("0.06", 68.7), ("0.08", 0.1))
    }
    | {"0.04-0.07": ("k-NN 69.7", {})},
)
PRESETS |= _sweep(
    "appendix-epochs",
    "Appendix D, epochs",
    "paper-100",
    {
        "100": ("k-NN 70.9", {}),
        "300": ("k-NN 72.8", {"epochs": 300}),
        "800": ("k-NN 74.5", {"epochs": 800}),
    },
)
PRESETS |= _sweep(
    "appendix-scale",
    "Appendix E, local crops up to, global crops from",
    _A,
    {
        f"{s}": (f"k-NN {knn}", {"global_crops_scale": (s, 1.0), "local_crops_scale": (0.05, s)})
        for s, knn in ((0.08, 65.6), (0.16, 68.0), (0.24, 69.7), (0.32, 69.8), (0.48, 69.5))
    },
)
PRESETS |= _sweep(
    "appendix-heads",
    "Appendix, attention heads",
    "paper-300",
    {
        "6": ("k-NN 72.8, 1007 images/s", {}),
        "8": ("k-NN 73.1, 971 images/s", {"num_heads": 8}),
        "12": ("k-NN 73.7, 927 images/s", {"num_heads": 12}),
        "16": ("k-NN 73.8, 860 images/s", {"num_heads": 16}),
    },
)
PRESETS |= {
    f"appendix-multicrop-{name}": Preset(f"Appendix E, {name}. Paper: {figure}.", base, delta)
    for name, figure, base, delta in (
        ("byol-2x224", "k-NN 66.6, linear 71.4", "table7-7", {}),
        ("byol-2x224-6x96", "k-NN 59.8, linear 64.8", "table7-7", _SIX_LOCAL),
        ("swav-2x224", "k-NN 60.5, linear 68.5", "table7-9", _NO_MULTI_CROP),
        ("swav-2x224-6x96", "k-NN 64.7, linear 71.8", "table7-9", {}),
        ("mocov2-2x224", "k-NN 62.0, linear 71.6", "table7-8", {}),
        ("mocov2-2x224-6x96", "k-NN 65.4, linear 73.4", "table7-8", _SIX_LOCAL),
        ("dino-2x224", "k-NN 67.9, linear 72.5", "table7-4", {}),
        ("dino-2x224-6x96", "k-NN 72.7, linear 75.9", "paper-300", {"local_crops_number": 6}),
    )
}

# -- EsViT -------------------------------------------------------------------------------------------------

# Crops and precision are the defaults. 16 GPUs, 32 for Swin-S and 64 for Swin-B with window 14. Some began as
# the -view of their name, without regions: after that many epochs, see fastdino.interop.official.
_ESVIT = {
    "method": "esvit",
    "arch": "swin_tiny_w7",
    "epochs": 300,
    "batch_size": 512,
    "batch_size_per_gpu": 32,
    "norm_last_layer": False,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 30,
}
_T = "esvit-swin-t-w7"
_SMALL = {"drop_path_rate": 0.2, "arch": "swin_small_w7"}
_SMALL_14 = {**_SMALL, "arch": "swin_small_w14", "batch_size_per_gpu": 16}
_BASE = {"drop_path_rate": 0.2, "arch": "swin_base_w7"}
_BASE_14 = {**_BASE, "arch": "swin_base_w14", "batch_size_per_gpu": 8, "norm_last_layer": True}
PRESETS[_T] = Preset("EsViT, Swin-T, window 7. Paper: linear 78.1, k-NN 75.7.", None, _ESVIT)
PRESETS |= {
    f"esvit-swin-{name}": Preset(f"EsViT, {title}. Paper: {figure}.", _T, delta)
    for name, title, figure, delta in (
        ("s-w7", "Swin-S, window 7", "linear 79.5, k-NN 77.7", _SMALL),
        ("b-w7", "Swin-B, window 7, views alone for 200 epochs", "linear 80.4, k-NN 78.9", _BASE),
        (
            "t-w14",
            "Swin-T, window 14, views alone for 200 epochs",
            "linear 78.7, k-NN 77.0",
            {"arch": "swin_tiny_w14"},
        ),
        ("s-w14", "Swin-S, window 14, views alone for 180 epochs", "linear 80.8, k-NN 79.1", _SMALL_14),
        ("b-w14", "Swin-B, window 14, views alone for 200 epochs", "linear 81.3, k-NN 79.3", _BASE_14),
    )
}
PRESETS |= {
    f"esvit-swin-{name}-view": Preset(
        f"EsViT, {title}, views alone. Paper: {figure}.",
        f"esvit-swin-{name}",
        {"use_dense_prediction": False, **({"norm_last_layer": False} if name == "b-w14" else {})},
    )
    for name, title, figure in (
        ("t-w7", "Swin-T, window 7", "linear 77.0, k-NN 74.2"),
        ("s-w7", "Swin-S, window 7", "linear 79.2, k-NN 76.8"),
        ("b-w7", "Swin-B, window 7", "linear 79.6, k-NN 77.7"),
        ("t-w14", "Swin-T, window 14", "linear 77.9, k-NN 75.5"),
        ("s-w14", "Swin-S, window 14", "linear 79.4, k-NN 77.3"),
        ("b-w14", "Swin-B, window 14", "linear 80.5, k-NN 78.3"),
    )
}
