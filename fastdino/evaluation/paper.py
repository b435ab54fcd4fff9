"""Figures of the papers by protocol, figure and network, to be set beside ours: those of DINO (Caron et al.
2021) and of EsViT (Li et al. 2021, arXiv 2106.09785).

On ImageNet unless a benchmark or another training set is named. Networks are called as in
`fastdino.evaluation.command.network_name`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NETWORKS = ("vit_small/16", "vit_small/8", "vit_base/16", "vit_base/8", "resnet50")
_ESVIT = ("swin_tiny_w7", "swin_small_w7", "swin_base_w7", "swin_small_w14", "swin_base_w14")


def _row(*values: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(_NETWORKS, values, strict=True) if value is not None}


def _esvit(*values: float) -> dict[str, float]:
    return dict(zip(_ESVIT, values, strict=True))


_FIGURES: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {
    # (protocol, benchmark or share of the training set, figure): {where: values}
    ("knn", "", "top1_k20"): {
        "Table 2": _row(74.5, 78.3, 76.1, 77.4, 67.5),
        "EsViT": _esvit(75.7, 77.7, 78.9, 79.1, 79.3),
    },
    ("knn", "10%", "top1_k20"): {"Table 10": _row(69.1, None, None, None, 59.3)},
    ("knn", "1%", "top1_k20"): {"Table 10": _row(61.3, None, None, None, 47.2)},
    ("linear", "", "top1"): {
        "Table 2": _row(77.0, 79.7, 78.2, 80.1, 75.3),
        "EsViT": _esvit(78.1, 79.5, 80.4, 80.8, 81.3),
    },
    ("logistic", "", "top1"): {"Table 10": _row(75.7, None, None, None, 72.1)},
    ("logistic", "10%", "top1"): {"Table 10": _row(72.2, None, None, None, 67.8)},
    ("logistic", "1%", "top1"): {"Table 10": _row(64.5, None, None, None, 55.1)},
    ("finetune", "", "top1"): {"Table 6": _row(81.5, None, 82.8, None, None)},
    ("retrieval", "roxford5k", "mAP_medium"): {"Table 3": _row(41.8, None, None, None, 35.4)},
    ("retrieval", "roxford5k", "mAP_hard"): {"Table 3": _row(13.7, None, None, None, 11.1)},
    ("retrieval", "rparis6k", "mAP_medium"): {"Table 3": _row(63.1, None, None, None, 55.9)},
    ("retrieval", "rparis6k", "mAP_hard"): {"Table 3": _row(34.4, None, None, None, 27.5)},
    ("copydetection", "", "mAP"): {"Table 4": _row(None, None, 81.7, 85.5, None)},
    ("davis", "", "JF"): {"Table 5": _row(61.8, 69.9, 62.3, 71.4, None)},
    ("davis", "", "J"): {"Table 5": _row(60.2, 66.6, 60.7, 67.9, None)},
    ("davis", "", "F"): {"Table 5": _row(63.4, 73.1, 63.9, 74.9, None)},
    ("jaccard", "voc12", "jaccard_60"): {"Figure 4": _row(45.9, 44.7, None, None, None)},
    ("throughput", "", "img_s_fp32"): {
        "Table 1, one V100": _row(1007, 180, 312, 63, 1237),
        "EsViT, one V100": _esvit(808, 467, 297, 383, 254),
    },
}


def paper_figure(
    protocol: str, figure: str, network: str | None, settings: Mapping[str, Any]
) -> tuple[float, str] | None:
    """The paper's value and where it stands, None where it has none for this network on these data."""
    data = str(settings.get("dataset") or settings.get("subset") or "")
    for where, values in _FIGURES.get((protocol, data, figure), {}).items():
        if network in values:
            return values[network], where
    return None
