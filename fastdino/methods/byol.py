"""BYOL (Grill et al. 2020, arXiv 2006.07733): predict the teacher's embedding of another view."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastdino.config import Config
from fastdino.methods.method import (
    LossOutput,
    Method,
    embedding_model,
    follow,
    normalised,
    number_of_pairs,
    predictor,
    spread,
    teacher_of,
    views_of,
)
from fastdino.models.projector import EmbeddingModel, Projector
from fastdino.switches import projector_widths, uses_predictor


class Regression(Method):
    """Square distance of normalised embeddings, ``|s - t|^2 = 2 - 2 cos(s, t)``, mean over images and pairs.

    Before its normalisation the teacher's embedding loses ``center``, an average of earlier ones, which with
    ``center_momentum`` 1 stays zero.
    """

    student: EmbeddingModel
    teacher: EmbeddingModel
    signs = ("spread",)
    center: Tensor

    def __init__(self, student: EmbeddingModel, teacher: EmbeddingModel, *, center_momentum: float):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.center_momentum = center_momentum
        width = student.head.out_dim
        self.statistics_size = width if center_momentum < 1 else 0
        self.register_buffer("center", torch.zeros(width))

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        *,
        teacher_temp: float | Tensor,
        freeze_last_layer: bool,
        use_queue: float | Tensor = 1.0,
    ) -> LossOutput:
        with torch.no_grad():
            embedded = self.teacher([global_crops])  # [2B, D]
            targets = normalised(embedded - self.center)
        outputs = normalised(self.student(views_of(global_crops, local_crops)))  # [V*B, D]
        loss = 2 - 2 * mean_cosine(outputs, targets)
        mean = embedded.mean(0)[: self.statistics_size]
        return LossOutput(loss, mean, {"spread": spread(normalised(embedded))})

    def update(self, statistics: Tensor, skip: Tensor) -> None:
        if self.statistics_size:
            follow(self.center, statistics, self.center_momentum, skip)


class BYOL(Regression):
    """Projector d -> 4096 -> 256 and predictor 256 -> 4096 -> 256 with batch norm and without biases of the
    last layers; no center.
    """

    evaluated = "student"

    def __init__(self, config: Config):
        student = embedding_model(config, partial(projector, config))
        teacher = teacher_of(student)
        if uses_predictor(config):
            width = student.head.out_dim
            student.head.predictor = predictor(config, width, use_bn=True, act="relu", last_bias=False)
        super().__init__(student, teacher, center_momentum=1.0)


def projector(config: Config, width: int) -> Projector:
    return Projector(projector_widths(config, width), last_bias=False)


def mean_cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over images and pairs of different views of the product of ``outputs`` [V*B, D] and ``targets``
    [2B, D].
    """
    images = len(targets) // 2
    y, t = outputs.unflatten(0, (-1, images)), targets.unflatten(0, (2, images))
    products = torch.einsum("vbd,gbd->vg", y, t)
    return (products.sum() - products.trace()) / (images * number_of_pairs(len(y)))
