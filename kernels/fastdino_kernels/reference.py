"""Eager oracles: the specification of every operation, on any device and in float64 as well.

Nothing here is tuned. Each function is written from the formula in its docstring, is differentiated by
autograd, and is what the fast backends are tested against; it also answers where no fast backend exists.

Rows are view-major: row ``v * B + b`` belongs to view ``v`` of image ``b``. The student sees all ``V`` views,
the teacher the first ``G = n_global`` of them. Symbols: ``K`` prototypes, ``D`` bottleneck width, ``s`` and
``u`` the student's and the teacher's temperature, ``c`` the center, ``m`` the teacher's momentum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PrototypeLoss(NamedTuple):
    """Result of :func:`fastdino_kernels.prototype_loss`; only ``loss`` carries a gradient."""

    loss: Tensor  # [] fp32
    batch_center: Tensor  # [K] fp32, mean of the raw teacher logits over all rows
    teacher_entropy: Tensor  # [] fp32, mean entropy of the teacher's targets in nats
    kl: Tensor  # [] fp32, loss - teacher_entropy = mean KL(teacher || student)


class DinoLoss(NamedTuple):
    """Result of :func:`fastdino_kernels.dino_loss`; only ``loss`` carries a gradient."""

    loss: Tensor  # [] fp32
    batch_center: Tensor  # [K] fp32, mean of the raw teacher logits over all rows
    teacher_entropy: Tensor  # [] fp32, mean entropy of the teacher's targets in nats
    kl: Tensor  # [] fp32, loss - teacher_entropy = mean KL(teacher || student)


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    n_global: int = 2,
) -> DinoLoss:
    """Cross-entropy of each teacher view with each other student view (Caron et al. 2021, eq. 1-4).

    ``p_g = softmax((t_g - c) / u)`` and ``x_v = student_v / s``; the loss is the mean of ``-sum_k p_gk log
    softmax(x_v)_k`` over the images and the ``G (V - 1)`` pairs ``g != v``. Cross-entropy is linear in its
    target, so the targets of one
    student view are added up first: ``loss = w sum_v (n_v logsumexp(x_v) - x_v . sum_{g != v} p_g)``, ``w = 1
        / (pairs B)``.

    Args: student_logits [V*B, K], teacher_logits [G*B, K] (no gradient flows into it), center [K] as it was
        before this step.
    """
    with torch.no_grad():
        raw = _upcast(teacher_logits.detach())  # [G*B, K]
        log_p = F.log_softmax((raw - center) / teacher_temp, dim=-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1).mean()
        batch_center = raw.mean(0)  # [K]
    x = _upcast(student_logits) / student_temp  # [V*B, K]
    k = x.shape[-1]
    x, p = (
        x.unflatten(0, (-1, p.shape[0] // n_global)),
        p.unflatten(0, (n_global, -1)),
    )  # [V, B, K], [G, B, K]
    views, images = x.shape[:2]
    target = p.sum(0).expand(views, images, k)  # [V, B, K]
    target = torch.cat([target[:n_global] - p, target[n_global:]])  # a view is not paired with itself
    n_pairs = torch.full((views, 1), float(n_global), dtype=x.dtype, device=x.device)
    n_pairs[:n_global] -= 1
    weight = 1.0 / (n_global * (views - 1) * images)
    loss = weight * (n_pairs * x.logsumexp(-1) - (target * x).sum(-1)).sum()
    return DinoLoss(loss, batch_center, entropy, loss.detach() - entropy)


def prototype_loss(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    n_global: int = 2,
) -> PrototypeLoss:
    """:func:`dino_loss` of the logits ``student_z @ student_weight.T`` and ``teacher_z @ teacher_weight.T``.

    Args: student_z [V*B, D], student_weight [K, D], teacher_z [G*B, D], teacher_weight [K, D], center [K].
    """
    student_logits = _matmul_t(student_z, student_weight)  # [V*B, K]
    with torch.no_grad():
        teacher_logits = _matmul_t(teacher_z, teacher_weight)  # [G*B, K]
        batch_center = _upcast(teacher_weight) @ _upcast(teacher_z).mean(0)  # [K]
    out = dino_loss(
        student_logits, teacher_logits, center,
        student_temp=student_temp, teacher_temp=teacher_temp, n_global=n_global,
    )  # fmt: skip
    return PrototypeLoss(out.loss, batch_center, out.teacher_entropy, out.kl)


def normalize_weight(weight_v: Tensor, weight_g: Tensor) -> Tensor:
    """``g_k v_k / |v_k|`` (Salimans & Kingma 2016): weight_v [K, D], weight_g [K, 1] -> [K, D]."""
    return weight_v * (weight_g / torch.linalg.vector_norm(weight_v, dim=1, keepdim=True))


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """``teacher <- m teacher + (1 - m) student``, tensor by tensor, in the teacher's dtype."""
    for t, s in zip(teacher, student, strict=True):
        t.mul_(momentum).add_((1 - momentum) * s.to(t.dtype))


@torch.no_grad()
def grad_norms(grads: Sequence[Tensor | None], grad_scale: float = 1.0) -> Tensor:
    """Norm of each gradient divided by ``grad_scale``, fp32 [n], summed in double; 0 for a missing one."""
    norms = [
        0.0 if g is None else torch.linalg.vector_norm(g, dtype=torch.float64).item() / grad_scale
        for g in grads
    ]
    return torch.tensor(norms, dtype=torch.float32)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """``min(1, max_norm / (norm + 1e-6))``, the official clipping; 1 where max_norm is 0."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_factor: float = 1.0,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019, algorithm 2) on ``grad_factor * grad``; first step: 1."""
    beta1, beta2 = betas
    grad = grad * grad_factor
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _matmul_t(z: Tensor, weight: Tensor) -> Tensor:
    """``z @ weight.T`` in the wider of both dtypes, or in autocast's."""
    dtype = torch.promote_types(z.dtype, weight.dtype)
    return F.linear(z.to(dtype), weight.to(dtype))
