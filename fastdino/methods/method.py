"""What the step knows of a method, and what methods share: models, pairs of views, signs of collapse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastdino_kernels import soft_cross_entropy
from torch import Tensor, nn

from fastdino.config import Config
from fastdino.models import MultiCropModel, build_backbone
from fastdino.models.projector import EmbeddingModel, Projector, mlp


class LossOutput(NamedTuple):
    """``loss`` (0-dim, differentiable), ``statistics`` [S], which the step averages over the global batch and
    hands to :meth:`Method.update`, and detached 0-dim ``signs`` by name, for the logs.
    """

    loss: Tensor
    statistics: Tensor
    signs: dict[str, Tensor]


class Method(nn.Module):
    """A student, its teacher, if any, and a loss; knows nothing of optimizers and loops.

    Teachers stay in training mode as in the official code: batch normalisation uses batch statistics, and
    there is no stochastic depth. Parameters of a teacher are named as those of the student that they follow;
    a student may have more.
    """

    student: MultiCropModel | EmbeddingModel
    teacher: MultiCropModel | EmbeddingModel | None
    signs: tuple[str, ...] = ()
    """What shows a collapse, by name in the logs."""
    statistics_size: int = 0
    """S."""
    evaluated: str = "teacher"
    """Whose backbone is the result of training."""
    communicates: bool = False
    """Whether forward or update exchange tensors between processes: all of them have to take part."""

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        *,
        teacher_temp: float | Tensor,
        freeze_last_layer: bool,
        use_queue: float | Tensor = 1.0,
    ) -> LossOutput:
        """Loss of ``global_crops`` [2B, C, H, W] and ``local_crops`` [N*B, C, h, w], both view-major.

        While the last layer is frozen its gradient is not even computed: no gradient means no optimizer step
        for it. ``use_queue`` is 0 before a queue that starts late has started, then 1.
        """
        raise NotImplementedError

    def update(self, statistics: Tensor, skip: Tensor) -> None:
        """What changes once per optimizer step besides the weights; nothing if ``skip`` [] bool."""


@torch.no_grad()
def follow(center: Tensor, mean: Tensor, momentum: float, skip: Tensor) -> None:
    """Equation 4 of DINO, in place: c <- m c + (1 - m) mean; unless ``skip`` [] bool."""
    moved = center.lerp(mean.to(center.dtype), 1.0 - momentum)
    center.copy_(torch.where(skip, center, moved))


def views_of(global_crops: Tensor, local_crops: Tensor | None) -> list[Tensor]:
    return [global_crops] if local_crops is None else [global_crops, local_crops]


def embedding_model(config: Config, head: Callable[[int], Projector]) -> EmbeddingModel:
    """A student that ends in ``head(width of the backbone)``."""
    backbone = build_backbone(
        config.model,
        drop_path_rate=config.model.drop_path_rate,
        img_size=config.crops.global_crops_size,
    )
    return EmbeddingModel(backbone, head(backbone.embed_dim))


def teacher_of(student: EmbeddingModel) -> EmbeddingModel:
    """Its copy, without stochastic depth and gradients."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.backbone.drop_path_rate = 0.0
    return teacher


def predictor(config: Config, width: int, *, use_bn: bool, act: str, last_bias: bool = True) -> nn.Module:
    """MLP [R, width] -> [R, width] with one hidden layer."""
    widths = (width, config.method.predictor_hidden_dim, width)
    return mlp(widths, use_bn=use_bn, act=act, last_bias=last_bias)


def cross_entropy_of_pairs(logits: Tensor, targets: Tensor, temp: float | Tensor) -> Tensor:
    """Mean over images and pairs of a target view and another view of ``-sum targets log softmax(logits /
    temp)``; ``logits`` [V*B, K], ``targets`` [2B, K].
    """
    first, second = targets.chunk(2)
    images = len(first)
    both = first + second if len(logits) > 2 * images else None
    total = logits.new_zeros((), dtype=torch.float32)
    for view, part in enumerate(logits.split(images)):
        target = (second, first)[view] if view < 2 else both
        assert target is not None
        total = total + soft_cross_entropy(part, target, temp=temp).mean()
    return total / number_of_pairs(len(logits) // images)


def number_of_pairs(views: int) -> int:
    """Pairs of one of two target views with one of ``views`` others."""
    return 2 * (views - 1)


def entropy(targets: Tensor) -> Tensor:
    """Mean entropy of rows [R, K] that are distributions, in nats."""
    return torch.special.entr(targets).sum(-1).mean()


def spread(unit: Tensor) -> Tensor:
    """Of rows [R, D] of length 1: sqrt(D) times the mean standard deviation of their entries, 1 for rows
    spread evenly over the sphere, 0 if all are the same.
    """
    return math.sqrt(unit.shape[1]) * unit.std(0, correction=0).mean()


def normalised(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
