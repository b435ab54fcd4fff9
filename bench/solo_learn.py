"""The DALI pipeline of another library as a rival: `solo/data/dali_dataloader.py` of a checkout of
github.com/vturrisi/solo-learn, which is not part of this one (`--solo_learn PATH`).

Its readers, augmentations and iterator are its own; only the list of crops and their probabilities, which its
configuration files would hold, are ours: those of DINO. Its colours are not exact (hue in YIQ, contrast about
128), nor is its blur.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from fastdino.config import CropConfig

MODULE = "solo.data.dali_dataloader"


def load(path: Path) -> ModuleType:
    """That module of a checkout. SystemExit when ``path`` is no such checkout."""
    file = path / (MODULE.replace(".", "/") + ".py")
    if not file.is_file():
        raise SystemExit(
            f"--solo_learn {path}: expected a checkout of vturrisi/solo-learn, found no {MODULE} in it"
        )
    # What it needs for training alone (Lightning, omegaconf, timm, torchvision) is replaced by names that
    # nothing here uses.
    stand_ins: dict[str, dict[str, Any]] = {
        "lightning": {},
        "lightning.pytorch": {"LightningDataModule": object},
        "omegaconf": {"DictConfig": dict},
        "timm": {},
        "timm.data": {},
        "timm.data.constants": {
            "IMAGENET_DEFAULT_MEAN": (0.485, 0.456, 0.406),
            "IMAGENET_DEFAULT_STD": (0.229, 0.224, 0.225),
        },
        "solo": {"__path__": [str(path / "solo")]},
        "solo.data": {"__path__": [str(path / "solo" / "data")]},
        "solo.utils": {"__path__": []},
        "solo.utils.misc": {"omegaconf_select": None},
    }
    before = {name: sys.modules.pop(name) for name in stand_ins if name in sys.modules}
    for name, attributes in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        return importlib.import_module(MODULE)
    finally:
        for name in [n for n in sys.modules if n in stand_ins or n.startswith("solo.")]:
            del sys.modules[name]
        sys.modules.update(before)


class Words(dict[str, Any]):
    """A dictionary whose items are attributes too, as configurations are there."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def augmentation(view: int, crops: CropConfig) -> Words:
    """DINO's, in the words of its configuration."""
    low, high = crops.global_crops_scale if view < 2 else crops.local_crops_scale
    blur = (1.0, 0.1)[view] if view < 2 else 0.5
    return Words(
        crop_size=crops.global_crops_size if view < 2 else crops.local_crops_size,
        rrc=Words(enabled=True, crop_min_scale=low, crop_max_scale=high),
        color_jitter=Words(prob=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
        grayscale=Words(prob=0.2),
        gaussian_blur=Words(prob=blur),
        solarization=Words(prob=0.2 if view == 1 else 0.0),
        equalization=Words(prob=0.0),
        horizontal_flip=Words(prob=0.5),
    )


class AllCrops:
    """From images to the list of their crops; called while its graph is built."""

    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, images: Any) -> list[Any]:
        return [transform(images) for transform in self.transforms]


def batches(
    checkout: Path, folder: Path, crops: CropConfig, *, batch: int, threads: int, gpu: bool
) -> Iterator[list[Tensor]]:
    """All crops of batch after batch of the files in ``folder``, without end."""
    solo = load(checkout)
    views = range(2 + crops.local_crops_number)
    device = "gpu" if gpu else "cpu"
    transforms = [
        solo.build_transform_pipeline_dali("imagenet", augmentation(view, crops), device) for view in views
    ]
    builder = solo.PretrainPipelineBuilder(
        folder, batch, device, AllCrops(transforms), num_threads=threads, no_labels=True
    )
    pipeline = builder.pipeline(
        batch_size=batch, num_threads=threads, device_id=0 if gpu else None, seed=builder.seed
    )
    pipeline.build()
    loader = solo.PretrainWrapper(
        model_batch_size=batch,
        model_rank=0,
        model_device="cuda:0" if gpu else "cpu",
        dataset_size=len(os.listdir(folder)),
        pipelines=pipeline,
        output_map=[f"crop{view}" for view in views] + ["label"],
        reader_name="Reader",
        last_batch_policy=solo.LastBatchPolicy.DROP,
        auto_reset=True,
    )
    while True:
        for _, made, _ in loader:
            yield made
