"""MoCo-v2 (He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297): each view is told apart
from a queue of other images by its likeness to another view of the same image."""

from __future__ import annotations

from functools import partial

import torch
from fastdino_kernels import info_nce
from torch import Tensor

from fastdino.config import Config
from fastdino.methods.method import (
    LossOutput,
    Method,
    embedding_model,
    normalised,
    predictor,
    spread,
    teacher_of,
    views_of,
)
from fastdino.methods.queue import Queue
from fastdino.models.projector import EmbeddingModel, Projector
from fastdino.switches import projector_widths, queue_length, uses_predictor


class Contrast(Method):
    """InfoNCE of every pair of a key (a global view in the teacher) with another view of its image, against
    the keys of both global views of earlier batches.
    """

    student: EmbeddingModel
    teacher: EmbeddingModel
    signs = ("spread", "accuracy")

    def __init__(self, student: EmbeddingModel, teacher: EmbeddingModel, *, temp: float, length: int):
        super().__init__()
        self.student, self.teacher, self.temp = student, teacher, temp
        self.queue = Queue(normalised(torch.randn(length, student.head.out_dim)).T.contiguous())
        self.communicates = True

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
            keys = normalised(self.teacher([global_crops]))  # [2B, D]
        first, second = keys.chunk(2)
        views = normalised(self.student(views_of(global_crops, local_crops))).split(len(first))
        pairs = [(first, v) for v in views[1:]] + [(second, v) for v in (views[0], *views[2:])]
        key, query = (torch.cat(part) for part in zip(*pairs, strict=True))
        out = info_nce(query, key, self.queue.columns, temp=self.temp)
        self.queue.add(keys)
        signs = {"spread": spread(keys), "accuracy": out.accuracy}
        return LossOutput(out.loss, keys.new_zeros(0), signs)

    def update(self, statistics: Tensor, skip: Tensor) -> None:
        self.queue.update(skip)


class MoCoV2(Contrast):
    """As the DINO paper runs it: a head of three layers d -> 2048 -> 2048 -> 256 with batch norm, symmetric
    in the global views.
    """

    evaluated = "student"

    def __init__(self, config: Config):
        student = embedding_model(config, partial(projector, config))
        teacher = teacher_of(student)
        if uses_predictor(config):
            student.head.predictor = predictor(config, student.head.out_dim, use_bn=True, act="relu")
        super().__init__(student, teacher, temp=config.loss.student_temp, length=queue_length(config))


def projector(config: Config, width: int) -> Projector:
    return Projector(projector_widths(config, width))
