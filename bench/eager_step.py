"""The rival of ``bench/step.py``: a DINO step as the official code organises it, re-implemented in plain
eager PyTorch.

One backbone pass per resolution, attention through an explicit N x N softmax, logits of all K prototypes, 2V
- 2 separate cross-entropies, per-parameter clipping that reads every norm on the host, ``torch.optim.AdamW``,
a Python loop for the EMA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.engine.optim import parameter_groups
from fastdino.methods.dino import DINO


class EagerStep:
    """Trains ``method``'s own parameters, so that both sides start from the same weights and can be
    compared.
    """

    def __init__(
        self,
        method: DINO,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        teacher_temp: float,
        clip: float,
    ):
        self.student, self.teacher, self.center = method.student, method.teacher, method.center[None]
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student), lr=lr)
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        self.momentum, self.teacher_temp, self.clip = momentum, teacher_temp, clip

    def __call__(self, global_crops: Tensor, local_crops: Tensor | None) -> float:
        views = 2 if local_crops is None else 2 + local_crops.shape[0] // (global_crops.shape[0] // 2)
        with torch.no_grad():
            target = _logits(self.teacher, [global_crops])
        groups = [global_crops] if local_crops is None else [global_crops, local_crops]
        output = _logits(self.student, groups)
        loss = self._loss(output, target, views)
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.student.parameters():
            if p.grad is not None:
                coefficient = self.clip / (p.grad.norm(2).item() + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
        self.optimizer.step()
        with torch.no_grad():
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.mul_(self.momentum).add_((1 - self.momentum) * q)
        return value

    def _loss(self, output: Tensor, target: Tensor, views: int) -> Tensor:
        students = (output / 0.1).chunk(views)
        teachers = F.softmax((target - self.center) / self.teacher_temp, dim=-1).detach().chunk(2)
        total, terms = output.new_zeros(()), 0
        for i, q in enumerate(teachers):
            for v, student in enumerate(students):
                if v != i:
                    total = total + torch.sum(-q * F.log_softmax(student, dim=-1), dim=-1).mean()
                    terms += 1
        with torch.no_grad():
            self.center.mul_(0.9).add_(target.mean(dim=0, keepdim=True), alpha=0.1)
        return total / terms


def _logits(model: nn.Module, groups: list[Tensor]) -> Tensor:
    return model.head(torch.cat([_backbone(model.backbone, x) for x in groups]))


def _backbone(vit: nn.Module, images: Tensor) -> Tensor:
    batch, _, height, width = images.shape
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(batch, -1, -1), x], dim=1) + vit.interpolate_pos_encoding(
        height, width
    )
    for block in vit.blocks:
        x = x + _attention(block.attn, block.norm1(x))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return vit.norm(x)[:, 0]


def _attention(attn: nn.Module, x: Tensor) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, dim // attn.num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
