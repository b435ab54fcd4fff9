"""What a run looks at while it trains: k-NN accuracy of the teacher on held-out images, and pictures for the
report.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastdino.config import EvalConfig
from fastdino.data.manifest import Manifest, build_manifest
from fastdino.evaluation.features import extract_features, raw_pixel_features
from fastdino.evaluation.knn import knn_classify


class Monitor:
    """k-NN of a backbone: labelled training images are the memory bank, ``eval_data_path`` holds the queries.

    If ``eval_data_path`` itself holds ``train/`` and ``val/``, these are bank and queries (official layout).
    ``clean`` takes the manifest of a folder and leaves out what cannot be read. Raises ValueError, before any
    model exists, when labels are missing or a query class has no bank image.
    """

    def __init__(
        self,
        config: EvalConfig,
        crop_size: int,
        training: Manifest,
        device: torch.device,
        clean: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    ):
        self.config, self.training, self.device = config, training, device
        self.size = config.eval_image_size or crop_size
        self.active = config.eval_data_path is not None
        if config.eval_data_path is None:
            return
        root = config.eval_data_path  # a folder, or what else --data_path takes
        train, val = Path(root, "train"), Path(root, "val")
        pair = train.is_dir() and val.is_dir()
        try:
            bank = clean(build_manifest(train)) if pair else training
            queries = clean(build_manifest(val if pair else root))
        except (ValueError, OSError) as error:
            raise ValueError(str(error).replace("--data_path", "--eval_data_path", 1)) from error
        if bank.labels is None or queries.labels is None:
            raise ValueError(
                f"--eval_data_path {root}: k-NN needs class folders for queries and memory bank, "
                f"but {'the memory bank' if bank.labels is None else 'the query folder'} has no labels; "
                "give the folder that holds train/ and val/"
            )
        unknown = sorted(set(queries.class_names) - set(bank.class_names))
        if unknown:
            raise ValueError(
                f"--eval_data_path {root}: classes {unknown[:5]} have no images in the memory bank; "
                "give the folder that holds train/ and val/"
            )
        chosen = np.arange(len(bank))
        if len(bank) > config.eval_bank_size:
            chosen = np.sort(np.random.default_rng(0).permutation(len(bank))[: config.eval_bank_size])
        of_bank = {name: index for index, name in enumerate(bank.class_names)}
        self.bank_paths = [bank.paths[i] for i in chosen.tolist()]
        self.bank_labels = torch.from_numpy(bank.labels[chosen])
        self.query_paths = list(queries.paths)
        self.query_labels = torch.tensor([of_bank[queries.class_names[label]] for label in queries.labels])

    def _score(self, bank: torch.Tensor, queries: torch.Tensor) -> dict[str, float]:
        result = knn_classify(bank, self.bank_labels, queries, self.query_labels, self.config.nb_knn)
        return {str(k): top1 for k, (top1, _) in result.items()}

    def knn(
        self, backbone: nn.Module, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Top-1 in percent by number of neighbours; ``progress`` is told (done, total) after each batch."""
        features = [
            extract_features(backbone, paths, image_size=self.size, device=self.device, progress=progress)
            for paths in (self.bank_paths, self.query_paths)
        ]
        return self._score(*features)

    def raw_pixels(self) -> dict[str, float]:
        """The same with the pixels of the small image as features."""
        return self._score(*(raw_pixel_features(paths, 32) for paths in (self.bank_paths, self.query_paths)))

    def pictures(self, n: int) -> list[str]:
        """``n`` images spread over the held-out set, or over the training set where there is none."""
        paths = self.query_paths if self.active else self.training.paths
        return [paths[i] for i in np.linspace(0, len(paths) - 1, min(n, len(paths))).astype(int)]
