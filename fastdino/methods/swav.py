"""SwAV (Caron et al. 2020, arXiv 2006.09882): one network; the code of each global view, balanced over the
prototypes by Sinkhorn-Knopp, is predicted from the other views."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from fastdino_kernels import sinkhorn_knopp
from torch import Tensor, nn

from fastdino.config import Config
from fastdino.engine import parallel
from fastdino.methods.method import (
    LossOutput,
    Method,
    cross_entropy_of_pairs,
    embedding_model,
    entropy,
    normalised,
    views_of,
)
from fastdino.methods.queue import Queue
from fastdino.models.projector import EmbeddingModel, Projector
from fastdino.switches import projector_widths, prototypes, queue_length


class SwAV(Method):
    """Head d -> 2048 -> 128 with batch norm; prototypes of length 1 without weight norm, which each update
    normalises (as the official code does before each forward pass).

    With a queue, codes are balanced over earlier embeddings of that view as well, once they fill it.
    """

    student: EmbeddingModel
    teacher: None
    signs = ("teacher_entropy", "kl")
    evaluated = "student"
    communicates = True

    def __init__(self, config: Config):
        super().__init__()
        self.teacher = None
        switches = config.method
        self.student = embedding_model(config, partial(projector, config))
        self.temp, self.epsilon = config.loss.student_temp, switches.epsilon
        self.iterations, self.width = switches.sinkhorn_iterations, self.student.head.out_dim
        layer = nn.Linear(self.width, prototypes(config), bias=False)
        self.student.head.add_module("last_layer", layer)
        with torch.no_grad():
            self.prototypes.copy_(normalised(self.prototypes))
        length = queue_length(config)
        # A column holds both views of an image.
        self.queue = Queue(torch.zeros(2 * self.width, length)) if length else None
        self.started = torch.tensor(False)

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        *,
        teacher_temp: float | Tensor,
        freeze_last_layer: bool,
        use_queue: float | Tensor = 1.0,
    ) -> LossOutput:
        weight = self.prototypes.detach() if freeze_last_layer else self.prototypes  # [K, D]
        embedded = normalised(self.student(views_of(global_crops, local_crops)))  # [V*B, D]
        logits = F.linear(embedded, weight)  # [V*B, K]
        with torch.no_grad():
            both = logits[: len(global_crops)].chunk(2)
            codes = [self.codes(view, scores, weight) for view, scores in enumerate(both)]
            targets = torch.cat(codes)  # [2B, K]
            h = entropy(targets)
        if self.queue is not None:
            self.started = torch.as_tensor(use_queue, device=embedded.device) > 0
            self.queue.add(torch.cat(embedded[: len(global_crops)].chunk(2), dim=1))
        loss = cross_entropy_of_pairs(logits, targets, self.temp)
        return LossOutput(loss, embedded.new_zeros(0), {"teacher_entropy": h, "kl": loss.detach() - h})

    @property
    def prototypes(self) -> nn.Parameter:
        """[K, D]."""
        return self.student.get_parameter("head.last_layer.weight")

    def codes(self, view: int, logits: Tensor, weight: Tensor) -> Tensor:
        """Codes of a global view, [B, K] in fp32, balanced over all processes."""
        rows = logits
        if self.queue is not None:
            columns = self.queue.columns.unflatten(0, (2, -1))[view]  # [D, Q]
            mine = columns.chunk(parallel.size(), 1)[parallel.rank()]
            earlier = F.linear(mine.T, weight)  # [Q / processes, K]
            # Several copies of the batch are balanced as one is: without a decision on the host.
            copies = logits.repeat(len(earlier) // len(logits), 1)
            rows = torch.cat([torch.where(self.queue.full, earlier, copies), logits])
        return sinkhorn_knopp(rows, temp=self.epsilon, n_iters=self.iterations)[-len(logits) :]

    @torch.no_grad()
    def update(self, statistics: Tensor, skip: Tensor) -> None:
        self.prototypes.copy_(torch.where(skip, self.prototypes, normalised(self.prototypes)))
        if self.queue is not None:
            self.queue.update(skip | ~self.started)


def projector(config: Config, width: int) -> Projector:
    return Projector(projector_widths(config, width))
