"""Linear classification of frozen features (DINO paper, section 4.2 and appendix F.2; official
``eval_linear.py``).

One linear layer on features of dimension D, weights N(0, 0.01) and biases 0 at the start, cross-entropy,
SGD with momentum 0.9 and no weight decay; the rate lr * batch / 256 falls to 0 on a cosine, epoch by epoch.
Layers for several learning rates are trained side by side on the same features: their logits are one product,
and each takes the steps that it would take alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.data.sampler import permutation
from fastdino.engine import checkpoint, parallel
from fastdino.engine.parallel import World
from fastdino.engine.schedules import cosine
from fastdino.evaluation.features import Progress, evaluating, in_threads
from fastdino.evaluation.training import Record, Sample, hits, linear_crop, on_device
from fastdino.interop.files import WeightsError, find_checkpoint, read_pickle

MOMENTUM = 0.9


class ProbeFeatures(nn.Module):
    """Images to the features a linear layer is trained on, [B, D].

    Of a ViT the [CLS] tokens of the last ``n`` blocks, each after the final norm, deepest last: D = n * dim.
    With ``avgpool`` (n = 1 only) the mean patch token as well, its channels between those of [CLS] as in the
    official code: cls 0, mean 0, cls 1, mean 1, ... A backbone with ``probe_features(images, n)`` decides
    for itself.
    """

    def __init__(self, backbone: nn.Module, n: int = 4, avgpool: bool = False) -> None:
        super().__init__()
        self.backbone, self.n, self.avgpool = backbone, n, avgpool
        self.own: Callable[[Tensor, int], Tensor] | None = getattr(backbone, "probe_features", None)
        if avgpool and self.own is not None:
            raise ValueError("--avgpool_patchtokens: expected false, this network has no [CLS] token")
        if avgpool and n != 1:
            raise ValueError(f"--avgpool_patchtokens: expected --n_last_blocks 1 with it, got {n}")
        depth = getattr(backbone, "depth", n)
        if self.own is None and n > depth:
            raise ValueError(f"--n_last_blocks: the network has {depth} blocks, got {n}")
        if self.own is None and (n > 1 or avgpool) and not hasattr(backbone, "get_intermediate_layers"):
            raise ValueError(
                f"--n_last_blocks: a network without get_intermediate_layers has one output, got {n}"
            )

    def forward(self, images: Tensor) -> Tensor:
        if self.own is not None:
            return self.own(images, self.n)
        if self.n == 1 and not self.avgpool:
            return self.backbone(images)
        layers = self.backbone.get_intermediate_layers(images, self.n)  # type: ignore[operator]
        if not self.avgpool:
            return torch.cat([tokens[:, 0] for tokens in layers], dim=-1)
        return torch.stack((layers[0][:, 0], layers[0][:, 1:].mean(1)), dim=-1).flatten(1)


# ----------------------------------------------------------------------------------------------- the features


class Batch(NamedTuple):
    """A process's part of one global batch; it may be empty."""

    features: Tensor  # [b, D] float32 on the device
    labels: Tensor  # [b] int64 on the device


class Source(Protocol):
    steps: int
    """Batches of an epoch, the same number on every process."""

    def epoch(self, epoch: int) -> Iterator[Batch]: ...


@dataclass
class Live:
    """Features of fresh random crops in every epoch, as in the official code."""

    network: nn.Module
    paths: Sequence[str]
    labels: Tensor  # [n] int64
    world: World
    batch: int  # images of all processes
    image_size: int = 224
    seed: int = 0
    dtype: torch.dtype = torch.float32
    num_threads: int = 0
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps = -(-len(self.paths) // self.batch)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        order = permutation(self.seed, epoch, len(self.paths))
        mine = [
            range(start + self.world.rank, min(start + self.batch, len(order)), self.world.size)
            for start in range(0, len(order), self.batch)
        ]
        samples = ([Sample(self.paths[order[p]], self.seed, epoch, p) for p in part] for part in mine)
        for part, features in zip(mine, self._features(samples), strict=True):
            yield Batch(features, self.labels[order[list(part)]].to(self.world.device))

    def views(self, number: int, progress: Progress | None = None) -> Tensor:
        """Features of ``number`` random crops of each image of this process, those of the first epochs on
        images in order: float32 [number, n, D] on the CPU. Makes a `Cached` source.
        """
        mine = range(self.world.rank, len(self.paths), self.world.size)
        size = max(1, self.batch // self.world.size)
        batches = (
            [Sample(self.paths[p], self.seed, view, p) for p in mine[start : start + size]]
            for view in range(number)
            for start in range(0, len(mine), size)
        )
        parts: list[Tensor] = []
        for features in self._features(batches):
            parts.append(features.cpu())
            if progress is not None:
                progress(sum(map(len, parts)), number * len(mine))
        return torch.cat(parts).view(number, len(mine), -1)

    def _features(self, samples: Iterable[Sequence[Sample]]) -> Iterator[Tensor]:
        device = self.world.device
        for crops in in_threads(lambda s: linear_crop(s, self.image_size), samples, self.num_threads):
            with (
                evaluating(self.network),
                torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32),
            ):
                features = self.network(on_device(crops, device)).float() if crops else torch.empty(0, 0)
            yield features.to(device)


@dataclass
class Cached:
    """Features computed once and kept, a process those of its share of the images, drawn in a new order in
    every epoch. Epoch e takes view ``e % views``. Not the official protocol, which draws new crops.
    """

    features: Tensor  # [views, n, D] float32, the images of this process
    labels: Tensor  # [n] int64
    world: World
    batch: int  # images of all processes
    images: int  # of all processes
    seed: int = 0
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps = -(-self.images // self.batch)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        view = self.features[epoch % len(self.features)]
        for part in np.array_split(permutation(self.seed, epoch, len(self.labels)), self.steps):
            rows = torch.tensor(part)
            yield Batch(view[rows].to(self.world.device), self.labels[rows].to(self.world.device))


# ------------------------------------------------------------------------------------------------- the layers


@dataclass
class Heads:
    """H linear layers with C outputs, and the momentum of their gradients."""

    weight: Tensor  # [H, C, D]
    bias: Tensor  # [H, C]
    weight_momentum: Tensor = field(init=False)
    bias_momentum: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight_momentum, self.bias_momentum = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    @classmethod
    def start(cls, number: int, classes: int, width: int, seed: int, device: torch.device) -> Heads:
        """All layers with the same weights, drawn from N(0, 0.01)."""
        drawn = 0.01 * torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))
        weight = drawn.to(device).repeat(number, 1, 1)  # [H, C, D]
        return cls(weight, torch.zeros(number, classes, device=device))

    def logits(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, H, C]."""
        product = features @ self.weight.flatten(0, 1).T
        return product.view(len(features), *self.bias.shape) + self.bias

    def step(self, batch: Batch, rates: Tensor) -> Tensor:
        """One SGD step of each layer with its rate [H] on the batches of all processes together.

        Returns the sum over this process's images of the cross-entropy before it: [H].
        """
        heads, classes, width = self.weight.shape
        grads = self.weight.new_zeros(heads * classes * (width + 1) + 1)
        weight_grad, bias_grad = grads[:-1].split([self.weight.numel(), self.bias.numel()])
        loss = grads.new_zeros(heads)
        if len(batch.labels):
            log_p = self.logits(batch.features).log_softmax(dim=2)
            at = batch.labels[:, None, None].expand(-1, heads, 1)
            loss = -log_p.gather(2, at)[..., 0].sum(0)
            error = log_p.exp_().scatter_add_(2, at, torch.full_like(log_p[..., :1], -1.0))  # [b, H, C]
            weight_grad.view(-1, width).copy_(error.flatten(1).T @ batch.features)
            bias_grad.copy_(error.sum(0).flatten())
            grads[-1] = len(batch.labels)
        parallel.sum_(grads)
        self.weight_momentum.mul_(MOMENTUM).add_(weight_grad.view_as(self.weight) / grads[-1])
        self.bias_momentum.mul_(MOMENTUM).add_(bias_grad.view_as(self.bias) / grads[-1])
        self.weight.sub_(self.weight_momentum * rates[:, None, None])
        self.bias.sub_(self.bias_momentum * rates[:, None])
        return loss


def accuracy(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in percent of one layer [C, D], [C] on this process's features [m, D] and all others'.

    Works block by block on the layer's device.
    """
    total = torch.zeros(3, dtype=torch.int64, device=weight.device)
    for rows, truth in zip(features.split(4096), labels.split(4096), strict=True):
        rows, truth = rows.to(weight.device), truth.to(weight.device)
        total += torch.cat([hits(rows @ weight.T + bias, truth), total.new_tensor([len(truth)])])
    top1, top5, number = parallel.sum_(total).tolist()
    return 100.0 * top1 / number, 100.0 * top5 / number


@dataclass
class Trained:
    """What a training measured: one entry per epoch in ``history``, and the best layer."""

    history: list[dict[str, Any]]
    """``epoch`` (from 1), ``loss`` [H] and, where it was evaluated, ``top1`` and ``top5`` [H] in percent."""
    best: dict[str, Any]
    """``top1``, ``top5`` and ``epoch`` of the best, and which of the layers it was (``head``)."""
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]

    def best_of(self, head: int) -> tuple[float, float, int]:
        """Top-1, top-5 and epoch of the best evaluation of one layer, the earliest of equals."""
        seen = [entry for entry in self.history if "top1" in entry]
        entry = max(seen, key=lambda e: e["top1"][head])
        return entry["top1"][head], entry["top5"][head], entry["epoch"]


@torch.no_grad()
def train_linear(
    source: Source,
    held_out: Tensor,
    labels: Tensor,
    *,
    num_labels: int,
    lrs: Sequence[float],
    batch: int,
    epochs: int,
    world: World,
    val_freq: int = 1,
    seed: int = 0,
    root: Path | None = None,
    settings: dict[str, Any] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Trained:
    """Train one layer per learning rate in ``lrs`` (for 256 images) and evaluate them every ``val_freq``
    epochs and after the last.

    ``held_out`` float [m, D] and ``labels`` [m] are this process's share. With a ``root`` the state after
    every epoch is kept there, and a run that finds one goes on from it: the result is the same to the bit.
    ``on_step(done, all)`` and ``on_epoch(entry of the history)`` are told how far it is.
    """
    if held_out.ndim != 2 or len(held_out) != len(labels):
        raise ValueError(
            f"held_out, labels: expected [m, D] and [m], got {list(held_out.shape)} and {list(labels.shape)}"
        )
    heads = Heads.start(len(lrs), num_labels, held_out.shape[1], seed, world.device)
    trained = Trained([], {"top1": -1.0}, heads.weight[0].clone(), heads.bias[0].clone())
    record = Record(root, settings or {}, world)
    _restore(record, heads, trained)
    base = torch.tensor(lrs, device=world.device) * (batch / 256)  # [H]
    try:
        for epoch in range(len(trained.history), epochs):
            rates = base * cosine(epoch, base=1.0, final=0.0, total=epochs)
            loss = torch.zeros(len(lrs) + 1, dtype=torch.float64, device=world.device)
            for done, part in enumerate(source.epoch(epoch), start=1):
                loss[:-1] += heads.step(part, rates)
                loss[-1] += len(part.labels)
                if on_step is not None:
                    on_step(epoch * source.steps + done, epochs * source.steps)
            parallel.sum_(loss)
            entry: dict[str, Any] = {"epoch": epoch + 1, "loss": _finite(loss[:-1] / loss[-1])}
            if epoch % val_freq == 0 or epoch == epochs - 1:
                _evaluate(heads, held_out, labels, entry, trained)
            trained.history.append(entry)
            record.save(epoch + 1, *_state(heads, trained))
            if on_epoch is not None:
                on_epoch(entry)
    finally:
        record.close()
    return trained


def _evaluate(
    heads: Heads, held_out: Tensor, labels: Tensor, entry: dict[str, Any], trained: Trained
) -> None:
    """Accuracies of all layers into ``entry``, and the best layer so far into ``trained``."""
    pairs = [accuracy(w, b, held_out, labels) for w, b in zip(heads.weight, heads.bias, strict=True)]
    entry["top1"], entry["top5"] = [top1 for top1, _ in pairs], [top5 for _, top5 in pairs]
    head = max(range(len(pairs)), key=lambda i: pairs[i][0])
    if pairs[head][0] > trained.best["top1"]:
        trained.best = {"top1": pairs[head][0], "top5": pairs[head][1], "epoch": entry["epoch"], "head": head}
        trained.weight, trained.bias = heads.weight[head].clone(), heads.bias[head].clone()


def _state(heads: Heads, trained: Trained) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    model = {"weight": heads.weight, "bias": heads.bias}
    model |= {"best.weight": trained.weight, "best.bias": trained.bias}
    momentum = {"weight": heads.weight_momentum, "bias": heads.bias_momentum}
    return model, momentum, {"history": trained.history, "best": trained.best}


def _restore(record: Record, heads: Heads, trained: Trained) -> None:
    found = record.load()
    if found is None:
        return
    model, momentum, meta = found
    heads.weight.copy_(model["weight"])
    heads.bias.copy_(model["bias"])
    heads.weight_momentum.copy_(momentum["weight"])
    heads.bias_momentum.copy_(momentum["bias"])
    trained.weight.copy_(model["best.weight"])
    trained.bias.copy_(model["best.bias"])
    trained.history, trained.best = meta["history"], meta["best"]


def _finite(values: Iterable[Tensor]) -> list[float | None]:
    """Numbers for JSON, which has no infinity."""
    return [value if math.isfinite(value) else None for value in map(float, values)]


def load_linear(path: Path) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and biases [C] of a linear layer, on the CPU.

    From a folder that `train_linear` has written or one of its checkpoints (the best layer), or an official
    ``.pth`` or ``.pth.tar`` file (``state_dict``: ``module.linear.weight`` and ``.bias``). Raises OSError,
    WeightsError or CheckpointError naming the file.
    """
    if path.is_dir():
        model, _, _ = checkpoint.load(find_checkpoint(path))
        names = ("best.weight", "best.bias")
    else:
        contents = read_pickle(path)
        state = contents.get("state_dict", contents) if isinstance(contents, dict) else {}
        model = {str(name).removeprefix("module."): value for name, value in state.items()}
        names = ("linear.weight", "linear.bias")
    weight, bias = (model.get(name) for name in names)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.shape[:1] != bias.shape:
        raise WeightsError(f"{path}: not a linear layer: expected {names[0]} [C, D] and {names[1]} [C]")
    return weight.float(), bias.float()
