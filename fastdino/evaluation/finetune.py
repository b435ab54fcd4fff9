"""Fine-tuning of the whole network on labels with the recipe of DeiT (Touvron et al. 2021, arXiv 2012.12877),
as for Table 6 of the DINO paper.

A linear classifier on the backbone's feature, AdamW, a warm-up followed by a cosine, and the augmentations of
`randaugment` and `mixup`. DeiT's rate changes from epoch to epoch; here it follows the same curve from step
to step. No moving average of the weights is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdino.data.manifest import Manifest
from fastdino.data.sampler import permutation, steps_per_epoch
from fastdino.engine import parallel
from fastdino.engine.parallel import World
from fastdino.evaluation import mixup
from fastdino.evaluation.features import extract_features, in_threads
from fastdino.evaluation.randaugment import rand_augment
from fastdino.evaluation.training import (
    Record,
    Sample,
    decoded,
    generator,
    hits,
    on_device,
    random_crop,
)

RATE_BATCH = 512
"""The batch that learning rates are given for: the rate is proportional to the batch."""

_NEVER_DECAYED = ("cls_token", "pos_embed", "relative_position_bias_table")


@dataclass(frozen=True)
class Recipe:
    """What a fine-tuning depends on besides images, network and batch; the defaults are DeiT's."""

    epochs: int = 300
    lr: float = 5e-4
    """For a batch of 512."""
    min_lr: float = 1e-5
    """At the end of the cosine, whatever the batch."""
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    """A block's rate is this many times that of the block above it."""
    drop_path: float = 0.1
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    erase: float = 0.25
    """Probability of random erasing."""
    rand_augment: bool = True
    repeats: int = 3
    """Crops of an image in the epochs it is in; the number of images of an epoch shrinks accordingly."""
    head_scale: float = 0.001
    """Of the new classifier's weights at the start, N(0, 0.02) otherwise."""


# As the authors gave them (github.com/facebookresearch/dino, issues 81, 144 and 171). CIFAR's rate rises to
# min_lr, which they left as it is.
RECIPES = {
    "imagenet": Recipe(),
    "cifar": Recipe(epochs=1000, lr=5e-6, erase=0.0),
    "inat": Recipe(lr=5e-5),
}


def learning_rate(epoch: float, recipe: Recipe, batch: int) -> float:
    """Rate at a time in epochs, for a global ``batch``: linear from ``warmup_lr``, then on the cosine that
    began at time 0.
    """
    top = recipe.lr * batch / RATE_BATCH
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr + (top - recipe.warmup_lr) * epoch / recipe.warmup_epochs
    return recipe.min_lr + 0.5 * (top - recipe.min_lr) * (1 + math.cos(math.pi * epoch / recipe.epochs))


# ----------------------------------------------------------------------------------------------- the network


class Classifier(nn.Module):
    """Images [B, 3, S, S] to logits [B, classes]: the backbone's feature through a new linear layer."""

    def __init__(self, backbone: nn.Module, width: int, classes: int, head_scale: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.head.weight.data.mul_(head_scale)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def build_classifier(
    backbone: nn.Module, classes: int, recipe: Recipe, image_size: int, device: torch.device, seed: int
) -> Classifier:
    """The network that is fine-tuned, on ``device``. ``seed`` draws the classifier.

    Raises ValueError where the recipe asks for what the backbone lacks.
    """
    if recipe.layer_decay != 1 and not isinstance(getattr(backbone, "blocks", None), nn.ModuleList):
        raise ValueError(f"--layer_decay: expected 1, {type(backbone).__name__} has no list of blocks")
    if "drop_path_rate" in vars(backbone):  # of a ResNet's class it is a constant
        backbone.drop_path_rate = recipe.drop_path  # type: ignore[assignment]
    elif recipe.drop_path:
        raise ValueError(f"--drop_path: expected 0, {type(backbone).__name__} has no stochastic depth")
    backbone = backbone.to(device)
    with torch.no_grad():
        width = backbone.eval()(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]
    torch.manual_seed(seed)
    return Classifier(backbone, width, classes, recipe.head_scale).to(device)


def layer_scale(name: str, blocks: int, decay: float) -> float:
    """Factor of the rate of a parameter of `Classifier`: 1 for the norm and the classifier, ``decay`` to the
    power of the number of layers above for a block, and one power more for what lies before the first block.
    """
    parts = name.split(".")
    if parts[:2] == ["backbone", "blocks"]:
        return decay ** (blocks - int(parts[2]))
    before = parts[0] == "backbone" and parts[1] in ("cls_token", "pos_embed", "patch_embed")
    return decay ** (blocks + 1) if before else 1.0


def parameter_groups(model: Classifier, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups for AdamW, each with the ``scale`` of its rate. Biases, 1-D tensors, [CLS] and position
    embeddings are not decayed.
    """
    blocks = len(model.backbone.blocks) if recipe.layer_decay != 1 else 0  # type: ignore[arg-type]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim == 1 or name.endswith((".bias", *_NEVER_DECAYED))
            scale = layer_scale(name, blocks, recipe.layer_decay)
            groups.setdefault((scale, plain), []).append(parameter)
    return [
        {"params": group, "scale": scale, "weight_decay": 0.0 if plain else recipe.weight_decay}
        for (scale, plain), group in groups.items()
    ]


# ------------------------------------------------------------------------------------------------ the images


def training_crop(sample: Sample, size: int, recipe: Recipe) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """uint8 [size, size, 3] of a random crop after RandAugment, and the box that is erased from it."""
    rng = generator(sample.seed, sample.epoch, sample.position)
    crop = random_crop(decoded(sample.path), size, rng, Image.Resampling.BICUBIC)
    if recipe.rand_augment:
        crop = rand_augment(crop, rng)
    return np.array(crop), mixup.draw_box(rng, size, recipe.erase)


def epoch_order(seed: int, epoch: int, n: int, repeats: int) -> np.ndarray:
    """Images of an epoch, int64 [n]: those of a fresh permutation, each ``repeats`` times in a row."""
    return np.repeat(permutation(seed, epoch, n)[: -(-n // repeats)], repeats)[:n]


# --------------------------------------------------------------------------------------------------- the run


@dataclass
class FineTuning:
    """A network that is being fine-tuned on labelled images; `run` does all of it.

    ``batch`` counts the images of a step on all processes. With a ``root`` the state after every epoch is
    kept there, and a run that finds one goes on from it: the result is the same to the bit.
    """

    model: Classifier
    train: Manifest
    labels: Tensor  # [n] int64, of train
    test: Manifest
    test_labels: Tensor  # [m] int64
    recipe: Recipe
    world: World
    batch: int
    image_size: int = 224
    dtype: torch.dtype = torch.float32
    num_threads: int = 0
    seed: int = 0
    root: Path | None = None
    settings: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.steps = steps_per_epoch(len(self.train), self.batch)
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = parameter_groups(self.model, self.recipe)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.dtype == torch.float16)
        trained = [parameter for group in groups for parameter in group["params"]]
        self.reducer = parallel.GradientBuckets(trained) if self.world.size > 1 else None
        self.history: list[dict[str, Any]] = []
        """One entry per epoch: ``epoch`` (from 1), ``loss`` and, where it was evaluated, ``top1`` and
        ``top5``."""

    def run(
        self,
        *,
        val_freq: int = 1,
        on_step: Callable[[int, int], None] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Train to the end, evaluating every ``val_freq`` epochs and after the last, and return `history`.

        Raises ValueError when the loss is no longer finite.
        """
        record = Record(self.root, self.settings or {}, self.world)
        self._restore(record)
        epochs = self.recipe.epochs
        try:
            crops = self._crops(len(self.history))
            for epoch in range(len(self.history), epochs):
                self.model.train()
                loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
                for i in range(epoch * self.steps, (epoch + 1) * self.steps):
                    loss += self._step(i, *next(crops))
                    if on_step is not None:
                        on_step(i + 1, epochs * self.steps)
                mean = float(parallel.sum_(loss)) / (self.steps * self.world.size)
                if not math.isfinite(mean):
                    raise ValueError(f"the loss of epoch {epoch + 1} is not finite: try a smaller --lr")
                self._share_buffers()
                entry: dict[str, Any] = {"epoch": epoch + 1, "loss": mean}
                if epoch % val_freq == 0 or epoch == epochs - 1:
                    entry["top1"], entry["top5"] = self.evaluate()
                self.history.append(entry)
                record.save(epoch + 1, *self._state())
                if on_epoch is not None:
                    on_epoch(entry)
        finally:
            record.close()
        return self.history

    def evaluate(self) -> tuple[float, float]:
        """Top-1 and top-5 in percent on the held-out images."""
        mine = slice(self.world.rank, None, self.world.size)
        logits = extract_features(
            self.model,
            self.test.paths[mine],
            image_size=self.image_size,
            device=self.world.device,
            batch_size=max(1, self.batch // self.world.size),
            num_threads=self.num_threads,
            dtype=self.dtype,
        )
        counts = parallel.sum_(hits(logits, self.test_labels[mine]).to(self.world.device))
        top1, top5 = (100.0 * counts.double() / len(self.test)).tolist()
        return top1, top5

    def _crops(self, first_epoch: int) -> Iterator[tuple[Sequence[Any], Tensor]]:
        """What `training_crop` gives for this process's part of each step, and the labels, without a break
        between epochs.
        """
        n, world = len(self.train), self.world

        def orders() -> Iterator[tuple[int, np.ndarray, range]]:
            for epoch in range(first_epoch, self.recipe.epochs):
                order = epoch_order(self.seed, epoch, n, self.recipe.repeats)
                for step in range(self.steps):
                    first = step * self.batch
                    yield epoch, order, range(first + world.rank, first + self.batch, world.size)

        samples = (
            [Sample(self.train.paths[order[p]], self.seed, epoch, p) for p in part]
            for epoch, order, part in orders()
        )
        work = in_threads(
            lambda sample: training_crop(sample, self.image_size, self.recipe), samples, self.num_threads
        )
        for (_, order, part), crops in zip(orders(), work, strict=True):
            yield crops, self.labels[torch.from_numpy(order[list(part)])]

    def _step(self, i: int, crops: Sequence[Any], labels: Tensor) -> Tensor:
        """Update the weights in step ``i``; returns the mean loss of this process's images."""
        device, recipe, classes = self.world.device, self.recipe, self.model.head.out_features
        rng = generator(self.seed, i, self.world.rank, 1)  # one counter more than those of a crop
        noise, depth = rng.integers(2**62, size=2).tolist()
        images = on_device([crop for crop, _ in crops], device)
        if recipe.erase:
            boxes = torch.tensor([box for _, box in crops], device=device)
            images = mixup.erase(images, boxes, torch.Generator(device).manual_seed(noise))
        mixture = mixup.draw_mixture(rng, self.image_size, recipe.mixup, recipe.cutmix)
        images = mixup.mix_images(images, mixture)
        targets = mixup.mix_targets(labels.to(device), classes, mixture.share, recipe.smoothing)

        rate = learning_rate(i / self.steps, recipe, self.batch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad()
        if self.reducer is not None:
            self.reducer.begin(without=())
        torch.manual_seed(depth)  # stochastic depth draws from the default generator
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images)
        loss = nn.functional.cross_entropy(logits.float(), targets)
        self.scaler.scale(loss / self.world.size).backward()
        if self.reducer is not None:
            self.reducer.finish()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _share_buffers(self) -> None:
        """Average over processes what they have measured apart: running statistics of batch norm."""
        for buffer in self.model.buffers() if self.world.size > 1 else ():
            if buffer.is_floating_point():
                parallel.sum_(buffer).div_(self.world.size)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        optimizer = {
            f"{key}.{name}": value
            for parameter, name in self.names.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        return (
            self.model.state_dict(),
            optimizer,
            {"history": self.history, "scaler": self.scaler.state_dict()},
        )

    def _restore(self, record: Record) -> None:
        found = record.load()
        if found is None:
            return
        model, optimizer, meta = found
        self.model.load_state_dict(model)
        by_name = {name: parameter for parameter, name in self.names.items()}
        for flat, value in optimizer.items():
            key, _, name = flat.partition(".")
            parameter = by_name[name]
            place = parameter.device if value.ndim else value.device  # AdamW counts steps on the CPU
            self.optimizer.state[parameter][key] = value.to(place)
        self.scaler.load_state_dict(meta["scaler"])
        self.history = meta["history"]
