"""Backbones, projection head, and the student-teacher pair built from a configuration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor, nn

from fastdino.config import Config, ModelConfig, backbone_family
from fastdino.models.head import DINOHead
from fastdino.models.resnet import ResNet, standard_resnet
from fastdino.models.swin import SwinTransformer, standard_swin
from fastdino.models.timm_model import TimmBackbone
from fastdino.models.vit import VisionTransformer, standard_vit, vit_base, vit_small, vit_tiny

__all__ = [
    "Backbone",
    "DINOHead",
    "MultiCropModel",
    "ResNet",
    "SwinTransformer",
    "TimmBackbone",
    "VisionTransformer",
    "build_backbone",
    "build_head",
    "build_model",
    "build_student_teacher",
    "vit_base",
    "vit_small",
    "vit_tiny",
]


Backbone: TypeAlias = VisionTransformer | ResNet | SwinTransformer | TimmBackbone


class MultiCropModel(nn.Module):
    """Backbone and head; parameters are named ``backbone.*`` and ``head.*``."""

    def __init__(self, backbone: Backbone, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Crops, [B, C, H, W] or a sequence of such -> bottleneck features [sum of B, D] and prototypes
        [K, D], whose products are the logits, see the head.
        """
        return self.head.bottleneck(self.backbone(crops)), self.head.weight()


def build_backbone(model: ModelConfig, *, drop_path_rate: float = 0.0, img_size: int = 224) -> Backbone:
    """The backbone a configuration describes; ConfigError or ValueError naming what does not fit.

    ``img_size`` is that of position embeddings, where there are any; a ResNet has no stochastic depth.
    """
    family = backbone_family(model.arch)
    if family == "resnet":
        return standard_resnet(model.arch, in_chans=model.in_chans)
    if family == "swin":
        return standard_swin(model.arch, in_chans=model.in_chans, drop_path_rate=drop_path_rate)
    if family == "timm":
        return TimmBackbone(model.arch, img_size, model.in_chans, drop_path_rate)
    return standard_vit(
        model.arch,
        img_size=img_size,
        patch_size=model.patch_size,
        in_chans=model.in_chans,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        drop_path_rate=drop_path_rate,
    )


def build_model(model: ModelConfig, *, drop_path_rate: float = 0.0, img_size: int = 224) -> MultiCropModel:
    """Backbone with a fresh projection head."""
    backbone = build_backbone(model, drop_path_rate=drop_path_rate, img_size=img_size)
    return MultiCropModel(backbone, build_head(model, backbone.embed_dim))


def build_head(model: ModelConfig, width: int) -> DINOHead:
    """A fresh projection head for features of ``width``."""
    return DINOHead(
        width,
        model.out_dim,
        use_bn=model.use_bn_in_head,
        norm_last_layer=model.norm_last_layer,
        nlayers=model.head_layers,
        hidden_dim=model.head_hidden_dim,
        bottleneck_dim=model.bottleneck_dim,
        act=model.head_act,
    )


def build_student_teacher(config: Config) -> tuple[MultiCropModel, MultiCropModel]:
    """Student and teacher with equal weights; the teacher has no stochastic depth and takes no gradients."""
    img_size = config.crops.global_crops_size
    student = build_model(config.model, drop_path_rate=config.model.drop_path_rate, img_size=img_size)
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.backbone.drop_path_rate = 0.0
    return student, teacher
