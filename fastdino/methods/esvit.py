"""EsViT (Li et al. 2021, arXiv 2106.09785): DINO on whole views, and the same between regions of the views,
each of which is compared with the region of the teacher's view that is most like it.

Regions are the normalised tokens of a Swin or the patch tokens of a ViT after the last block, or the places
of a ResNet's last map. They have a head and a center of their own; temperatures and schedules are those of
the views. The loss is the mean of both losses, as in the published code (the paper adds them), each a mean
over all pairs of a teacher's view with another view.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from fastdino_kernels import match_regions, prototype_loss, region_loss
from torch import Tensor

from fastdino.config import Config, ModelConfig
from fastdino.methods.dino import DINO
from fastdino.methods.method import LossOutput, Method, follow, views_of
from fastdino.models import Backbone, DINOHead, MultiCropModel, build_backbone, build_head
from fastdino.switches import matches_regions


class Features(NamedTuple):
    """Of V views of B images, view-major; regions by view, then by image: R = B (N_0 + ... + N_(V-1))."""

    view_z: Tensor
    """[V*B, D], what the prototypes of the views see."""
    region_z: Tensor
    """[R, D], what those of the regions see."""
    regions: Tensor
    """[R, C], from the backbone."""
    numbers: list[int]
    """N_v, regions of each view."""


class DenseModel(MultiCropModel):
    """Backbone and two heads; parameters are named ``backbone.*``, ``head.*`` and ``head_dense.*``."""

    def __init__(self, backbone: Backbone, head: DINOHead, head_dense: DINOHead) -> None:
        super().__init__(backbone, head)
        self.head_dense = head_dense

    def features(self, crops: Sequence[Tensor], images: int) -> Features:
        """Of batches of crops, [n * images, C, H, W] for the n views of one size."""
        views, maps = self.backbone.forward_regions(crops)
        regions = torch.cat([part.flatten(0, 1) for part in maps])
        numbers = [part.shape[1] for part in maps for _ in range(len(part) // images)]
        view_z, region_z = self.head.bottleneck(views), self.head_dense.bottleneck(regions)
        return Features(view_z, region_z, regions, numbers)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Prototypes of views and of regions, [K, D] each."""
        return self.head.weight(), self.head_dense.weight()


def dense_model(model: ModelConfig, *, drop_path_rate: float = 0.0, img_size: int = 224) -> DenseModel:
    """Backbone with two fresh heads."""
    backbone = build_backbone(model, drop_path_rate=drop_path_rate, img_size=img_size)
    heads = [build_head(model, backbone.embed_dim) for _ in range(2)]
    return DenseModel(backbone, *heads)


class EsViT(Method):
    """Losses of whole views and of regions."""

    student: DenseModel
    teacher: DenseModel
    signs = ("teacher_entropy", "kl", "region_entropy", "region_kl")
    center: Tensor
    center_grid: Tensor

    def __init__(self, config: Config):
        super().__init__()
        model, loss = config.model, config.loss
        img_size = config.crops.global_crops_size
        self.student = dense_model(model, drop_path_rate=model.drop_path_rate, img_size=img_size)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.backbone.drop_path_rate = 0.0
        self.student_temp, self.center_momentum = loss.student_temp, loss.center_momentum
        self.statistics_size = 2 * model.out_dim
        self.register_buffer("center", torch.zeros(model.out_dim))
        self.register_buffer("center_grid", torch.zeros(model.out_dim))

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        *,
        teacher_temp: float | Tensor,
        freeze_last_layer: bool,
        use_queue: float | Tensor = 1.0,
    ) -> LossOutput:
        images = len(global_crops) // 2
        with torch.no_grad():
            teacher = self.teacher.features([global_crops], images)
            teacher_weights = self.teacher.weights()
        student = self.student.features(views_of(global_crops, local_crops), images)
        weights = self.student.weights()
        if freeze_last_layer:
            weights = weights[0].detach(), weights[1].detach()
        view = prototype_loss(
            student.view_z,
            weights[0],
            teacher.view_z,
            teacher_weights[0],
            self.center,
            student_temp=self.student_temp,
            teacher_temp=teacher_temp,
        )
        region = region_loss(
            student.region_z,
            weights[1],
            teacher.region_z,
            teacher_weights[1],
            self.center_grid,
            match_regions(student.regions, teacher.regions, student.numbers),
            student_temp=self.student_temp,
            teacher_temp=teacher_temp,
        )
        signs = {
            "teacher_entropy": view.teacher_entropy,
            "kl": view.kl,
            "region_entropy": region.teacher_entropy,
            "region_kl": region.kl,
        }
        means = torch.cat([view.batch_center, region.batch_center])
        return LossOutput((view.loss + region.loss) / 2, means, signs)

    def update(self, statistics: Tensor, skip: Tensor) -> None:
        """Both centers follow the means of the teacher's logits over the global batch, as DINO's does."""
        for center, mean in zip((self.center, self.center_grid), statistics.chunk(2), strict=True):
            follow(center, mean, self.center_momentum, skip)


def esvit(config: Config) -> Method:
    """EsViT, or without regions what is left of it, DINO."""
    return EsViT(config) if matches_regions(config) else DINO(config)
