"""Figures of the DINO paper (Caron et al. 2021) by protocol, figure and network, to be set beside ours.

On ImageNet unless a dataset is named. Networks are called as in `fastdino.evaluation.command.network_name`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DINO = ("vit_small/16", "vit_small/8", "vit_base/16", "vit_base/8", "resnet50")


def _row(*values: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(_DINO, values, strict=True) if value is not None}


_FIGURES: dict[tuple[str, str, str], tuple[str, dict[str, float]]] = {
    # (protocol, dataset, figure): (where, values)
    ("knn", "", "top1_k20"): ("Table 2", _row(74.5, 78.3, 76.1, 77.4, 67.5)),
    ("linear", "", "top1"): ("Table 2", _row(77.0, 79.7, 78.2, 80.1, 75.3)),
    ("logistic", "", "top1"): ("Table 10", _row(75.7, None, None, None, 72.1)),
    ("finetune", "", "top1"): ("Table 6", _row(81.5, None, 82.8, None, None)),
    ("retrieval", "roxford5k", "mAP_medium"): ("Table 3", _row(41.8, None, None, None, 35.4)),
    ("retrieval", "roxford5k", "mAP_hard"): ("Table 3", _row(13.7, None, None, None, 11.1)),
    ("retrieval", "rparis6k", "mAP_medium"): ("Table 3", _row(63.1, None, None, None, 55.9)),
    ("retrieval", "rparis6k", "mAP_hard"): ("Table 3", _row(34.4, None, None, None, 27.5)),
    ("copydetection", "", "mAP"): ("Table 4", _row(None, None, 81.7, 85.5, None)),
    ("davis", "", "JF"): ("Table 5", _row(61.8, 69.9, 62.3, 71.4, None)),
    ("davis", "", "J"): ("Table 5", _row(60.2, 66.6, 60.7, 67.9, None)),
    ("davis", "", "F"): ("Table 5", _row(63.4, 73.1, 63.9, 74.9, None)),
    ("jaccard", "", "jaccard_60"): ("Figure 4", _row(45.9, 44.7, None, None, None)),
    ("throughput", "", "img_s_fp32"): ("Table 1, one V100", _row(1007, 180, 312, 63, 1237)),
}


def paper_figure(
    protocol: str, figure: str, network: str | None, settings: Mapping[str, Any]
) -> tuple[float, str] | None:
    """The paper's value and the table it stands in, None where it has none for this network."""
    for dataset in {str(settings.get("dataset", "")), ""}:
        where, values = _FIGURES.get((protocol, dataset, figure), ("", {}))
        if network in values:
            return values[network], where
    return None
