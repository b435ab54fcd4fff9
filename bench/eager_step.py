"""The rival of ``bench/step.py``: a DINO step as the official code organises it, re-implemented in plain
eager PyTorch.

One backbone pass per resolution, attention through an explicit N x N softmax, logits of all K prototypes, 2V
- 2 separate cross-entropies, per-parameter clipping that reads every norm on the host, ``torch.optim.AdamW``,
a Python loop for the EMA. Two of its parts can be replaced by ours, for the rows of the waterfall.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.data.loader import Crops
from fastdino.engine.optim import parameter_groups
from fastdino.engine.schedules import Hyper
from fastdino.methods.dino import DINO


class EagerStep:
    """Trains ``method``'s own parameters, so that both sides start from the same weights and can be
    compared.

    ``packed``: the backbone passes are the method's own, all crops in one. ``fused_loss``: so is everything
    up to the loss. ``dtype`` is the type of the products, under autocast; fp16 with a GradScaler.
    """

    def __init__(
        self,
        method: DINO,
        hyper: Hyper,
        *,
        clip: float,
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
        fused_loss: bool = False,
    ):
        self.method, self.hyper, self.clip, self.dtype = method, hyper, clip, dtype
        self.packed, self.fused_loss = packed, fused_loss
        self.student, self.teacher, self.center = method.student, method.teacher, method.center[None]
        self.device = method.center.device
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student), lr=hyper.lr)
        self.optimizer.param_groups[0]["weight_decay"] = hyper.weight_decay
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def __call__(self, crops: Crops) -> float:
        """One step; the loss, for which it waits."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, batch_center = self._fused_loss(crops) if self.fused_loss else self._loss(crops)
        value = loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for p in self.student.parameters():
            if p.grad is not None:
                coefficient = self.clip / (p.grad.norm(2).item() + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        m = self.hyper.momentum
        with torch.no_grad():
            self.center.lerp_(batch_center.float(), 0.1)
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.mul_(m).add_((1 - m) * q)
        return value

    def _fused_loss(self, crops: Crops) -> tuple[Tensor, Tensor]:
        out = self.method(
            crops.global_, crops.local, teacher_temp=self.hyper.teacher_temp, freeze_last_layer=False
        )
        return out.loss, out.statistics

    def _loss(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """The loss, and the teacher's logits averaged over the batch."""
        groups = [crops.global_] if crops.local is None else [crops.global_, crops.local]
        views = 2 * sum(len(x) for x in groups) // len(crops.global_)
        with torch.no_grad():
            target = self._logits(self.teacher, groups[:1])
        students = (self._logits(self.student, groups) / 0.1).chunk(views)
        teachers = ((target - self.center) / self.hyper.teacher_temp).softmax(dim=-1).detach().chunk(2)
        total, terms = target.new_zeros(()), 0
        for i, q in enumerate(teachers):
            for v, student in enumerate(students):
                if v != i:
                    total = total + torch.sum(-q * F.log_softmax(student, dim=-1), dim=-1).mean()
                    terms += 1
        return total / terms, target.mean(dim=0)

    def _logits(self, model: Any, groups: list[Tensor]) -> Tensor:
        backbone, head = model.backbone, model.head
        features = backbone(groups) if self.packed else torch.cat([vit_features(backbone, x) for x in groups])
        v, g = head.last_layer.weight_v, head.last_layer.weight_g
        return F.linear(F.normalize(head.mlp(features), dim=-1), v * (g / v.norm(dim=1, keepdim=True)))


def vit_features(vit: Any, images: Tensor) -> Tensor:
    """[B, C, H, W] -> [CLS] features [B, D], by plain operations on the parameters of ``vit``."""
    batch, _, height, width = images.shape
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(batch, -1, -1), x], dim=1) + vit.interpolate_pos_encoding(
        height, width
    )
    for block in vit.blocks:
        x = x + _attention(block.attn, block.norm1(x))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return vit.norm(x)[:, 0]


def _attention(attn: Any, x: Tensor) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, dim // attn.num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
