"""DINO: student and teacher of one architecture, cross-entropy between the teacher's centered, sharpened
softmax and the student's softmax over all pairs of different views ("Emerging Properties in Self-Supervised
Vision Transformers", Algorithm 1), and the variants of its ablations (Tables 7, 14 and 15)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from fastdino_kernels import prototype_loss, sinkhorn_knopp
from torch import Tensor

from fastdino.config import Config
from fastdino.methods.byol import Regression
from fastdino.methods.method import (
    LossOutput,
    Method,
    cross_entropy_of_pairs,
    embedding_model,
    entropy,
    follow,
    predictor,
    teacher_of,
    views_of,
)
from fastdino.methods.mocov2 import Contrast
from fastdino.models import MultiCropModel, build_student_teacher
from fastdino.models.projector import EmbeddingModel, Projector
from fastdino.models.vit import init_linear
from fastdino.switches import projector_widths, queue_length, uses_predictor


class DINO(Method):
    """Cross-entropy over prototypes. Targets are softmax((t - c) / u) of the teacher's logits t with the
    center c; for u = 0 the largest t - c alone; or Sinkhorn-Knopp's, which take no center.
    """

    student: MultiCropModel
    teacher: MultiCropModel
    signs = ("teacher_entropy", "kl")
    center: Tensor

    def __init__(self, config: Config):
        super().__init__()
        switches, model, loss = config.method, config.model, config.loss
        self.student, self.teacher = build_student_teacher(config)
        if uses_predictor(config):
            self.student.head.predictor = dino_predictor(config)
        self.student_temp, self.center_momentum = loss.student_temp, loss.center_momentum
        self.centers, self.one_hot = switches.teacher_op == "center", loss.teacher_temp == 0
        self.iterations = switches.sinkhorn_iterations if switches.teacher_op == "sinkhorn" else 1
        self.parts = 1 if switches.sk_joint else 2  # of the teacher's rows, each balanced by itself
        self.communicates = not self.centers
        self.statistics_size = model.out_dim if self.centers else 0
        self.register_buffer("center", torch.zeros(model.out_dim))

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
            teacher_z, teacher_weight = self.teacher([global_crops])  # [2B, D], [K, D]
        student_z, student_weight = self.student(views_of(global_crops, local_crops))  # [V*B, D], [K, D]
        if freeze_last_layer:
            student_weight = student_weight.detach()
        if self.centers and not self.one_hot:
            out = prototype_loss(
                student_z,
                student_weight,
                teacher_z,
                teacher_weight,
                self.center,
                student_temp=self.student_temp,
                teacher_temp=teacher_temp,
            )
            signs = {"teacher_entropy": out.teacher_entropy, "kl": out.kl}
            return LossOutput(out.loss, out.batch_center, signs)
        with torch.no_grad():
            teacher_logits = F.linear(teacher_z, teacher_weight)  # [2B, K]
            targets = self.targets(teacher_logits, teacher_temp)
            h = entropy(targets)
            mean = teacher_logits.float().mean(0) if self.centers else self.center[:0]
        logits = F.linear(student_z, student_weight)  # [V*B, K]
        loss = cross_entropy_of_pairs(logits, targets, self.student_temp)
        return LossOutput(loss, mean, {"teacher_entropy": h, "kl": loss.detach() - h})

    def targets(self, logits: Tensor, temp: float | Tensor) -> Tensor:
        """The teacher's logits [2B, K] -> one-hot rows or those of Sinkhorn-Knopp over all processes, [2B, K]
        in fp32.
        """
        if self.centers:
            best = (logits.float() - self.center).argmax(-1, keepdim=True)
            return torch.zeros_like(logits, dtype=torch.float32).scatter_(1, best, 1.0)
        parts = [sinkhorn_knopp(x, temp=temp, n_iters=self.iterations) for x in logits.chunk(self.parts)]
        return torch.cat(parts)

    def update(self, statistics: Tensor, skip: Tensor) -> None:
        """Equation 4: c <- m c + (1 - m) mean of the teacher's logits over the global batch."""
        if self.centers:
            follow(self.center, statistics, self.center_momentum, skip)


class RegressionDINO(Regression):
    """DINO with the mean square error of normalised bottleneck features, the teacher's centered before."""

    def __init__(self, config: Config):
        super().__init__(*bottleneck_models(config), center_momentum=config.loss.center_momentum)


class ContrastDINO(Contrast):
    """DINO with MoCo's loss on normalised bottleneck features: no prototypes, no center."""

    def __init__(self, config: Config):
        super().__init__(
            *bottleneck_models(config), temp=config.loss.student_temp, length=queue_length(config)
        )


def bottleneck_models(config: Config) -> tuple[EmbeddingModel, EmbeddingModel]:
    """Student and teacher that end where DINO's bottleneck does."""
    student = embedding_model(config, partial(bottleneck_head, config))
    teacher = teacher_of(student)
    if uses_predictor(config):
        student.head.predictor = dino_predictor(config)
    return student, teacher


def bottleneck_head(config: Config, width: int) -> Projector:
    model = config.model
    head = Projector(projector_widths(config, width), use_bn=model.use_bn_in_head, act=model.head_act)
    return head.apply(init_linear)


def dino_predictor(config: Config) -> torch.nn.Module:
    """As the head: its activation, batch norm if that has it, its initial weights."""
    model = config.model
    layers = predictor(config, model.bottleneck_dim, use_bn=model.use_bn_in_head, act=model.head_act)
    return layers.apply(init_linear)
