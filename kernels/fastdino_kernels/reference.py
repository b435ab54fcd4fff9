"""Eager oracles: the specification of every operation, on any device and in float64 as well.

Nothing here is tuned. Each function is written from the formula in its docstring, is differentiated by
autograd, and is what the fast backends are tested against; it also answers where no fast backend exists.

Rows are view-major: row ``v * B + b`` belongs to view ``v`` of image ``b``. The student sees all ``V`` views,
the teacher the first ``G = n_global`` of them. Symbols: ``K`` prototypes, ``D`` bottleneck width, ``s`` and
``u`` the student's and the teacher's temperature, ``c`` the center, ``m`` the teacher's momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


class PrototypeLoss(NamedTuple):
    """Result of :func:`fastdino_kernels.prototype_loss`; only ``loss`` carries a gradient."""

    loss: Tensor  # [] fp32
    batch_center: Tensor  # [K] fp32, mean of the raw teacher logits over all rows
    teacher_entropy: Tensor  # [] fp32, mean entropy of the teacher's targets in nats
    kl: Tensor  # [] fp32, loss - teacher_entropy = mean KL(teacher || student)


class MatchedLoss(NamedTuple):
    """Result of ``region_loss`` and ``patch_loss``; only ``loss`` carries a gradient."""

    loss: Tensor  # [] fp32
    batch_center: Tensor  # [K] fp32, mean of the raw teacher logits over all rows
    teacher_entropy: Tensor  # [] fp32, mean entropy over all teacher rows in nats, used or not
    kl: Tensor  # [] fp32, loss - sum_r w_r (entropies of r's targets) = weighted sum of KL(target || student)


class DinoLoss(NamedTuple):
    """Result of :func:`fastdino_kernels.dino_loss`; only ``loss`` carries a gradient."""

    loss: Tensor  # [] fp32
    batch_center: Tensor  # [K] fp32, mean of the raw teacher logits over all rows
    teacher_entropy: Tensor  # [] fp32, mean entropy of the teacher's targets in nats
    kl: Tensor  # [] fp32, loss - teacher_entropy = mean KL(teacher || student)


class InfoNCE(NamedTuple):
    """Result of :func:`fastdino_kernels.info_nce`; only ``loss`` carries a gradient."""

    loss: Tensor  # [] fp32
    accuracy: Tensor  # [] fp32, fraction of queries closer to their key than to all of the queue


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
        entropy = -(p * log_p).masked_fill(p == 0, 0).sum(-1).mean()
        batch_center = raw.mean(0)  # [K]
    x = _upcast(student_logits) / student_temp  # [V*B, K]
    x, p = (
        x.unflatten(0, (-1, p.shape[0] // n_global)),
        p.unflatten(0, (n_global, -1)),
    )  # [V, B, K], [G, B, K]
    views, images = x.shape[:2]
    own = range(n_global)  # a view is not paired with itself
    others = [sum((p[g] for g in own if g != v), torch.zeros_like(p[0])) for v in own]
    target = torch.stack(others + (views - n_global) * [p.sum(0)])  # [V, B, K]
    n_pairs = torch.full((views, 1), float(n_global), dtype=x.dtype, device=x.device)
    n_pairs[:n_global] -= 1
    weight = 1.0 / (n_global * (views - 1) * images)
    rows_loss = torch.where(n_pairs > 0, n_pairs * x.logsumexp(-1) - (target * x).sum(-1), 0)  # [V, B]
    loss = weight * rows_loss.sum()
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


def soft_cross_entropy(logits: Tensor, target: Tensor, *, temp: float | Tensor) -> Tensor:
    """``-sum_k target_k log softmax(logits / temp)_k`` of each row: [R, K], [R, K] -> [R].

    A term with target 0 is 0 whatever the logit.
    """
    target = target.detach()
    log_p = F.log_softmax(_upcast(logits) / temp, dim=-1)  # [R, K]
    return -(target * log_p).masked_fill(target == 0, 0).sum(-1)


def sinkhorn_columns(logits: Tensor, temp: float | Tensor, columns: Tensor | None = None) -> Tensor:
    """Logarithm of each prototype's sum over the samples: logits [R, K] -> [K].

    Without ``columns`` of ``exp(logits / temp)``; with them, after prototype k was divided by
    ``exp(columns_k)`` (where that is not 0) and each sample then by its sum, relative to the same logits.
    """
    x = _upcast(logits) / temp  # [R, K]
    if columns is not None:
        x = x - (x - columns.masked_fill(columns == -torch.inf, 0)).logsumexp(1, keepdim=True)
    return x.logsumexp(0)


def sinkhorn_targets(logits: Tensor, temp: float | Tensor, columns: Tensor) -> Tensor:
    """Samples normalised to 1 after prototype k was divided by ``exp(columns_k)``: [R, K], [K] -> [R, K]."""
    return (_upcast(logits) / temp - columns.masked_fill(columns == -torch.inf, 0)).softmax(1)


def sinkhorn_knopp(logits: Tensor, *, temp: float | Tensor, n_iters: int = 3) -> Tensor:
    """``Q = exp(logits / temp)``, each prototype divided by its sum, then each sample, ``n_iters`` times.

    Args: logits [R, K] of all processes. Returns: [R, K], rows sum to 1 (Caron et al. 2020, section 3.1). A
        prototype whose logits are all -inf keeps its zeros.
    """
    x = _upcast(logits.detach()) / temp  # [R, K], logarithm of Q
    for _ in range(n_iters):
        columns = x.logsumexp(0)
        x = (x - columns.masked_fill(columns == -torch.inf, 0)).log_softmax(1)
    return x.exp()


def info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temp: float | Tensor) -> InfoNCE:
    """``-log(e^(q.k / temp) / (e^(q.k / temp) + sum_j e^(q.n_j / temp)))``, mean over the queries.

    He et al. 2020, eq. 1. Args: query [R, D]; key [R, D], the positives; queue [D, Q], the negatives n_j in
        its columns.
    """
    positive = (_upcast(query) * _upcast(key.detach())).sum(1, keepdim=True)  # [R, 1]
    negative = _upcast(_matmul_t(query, queue.detach().t()))  # [R, Q]
    logits = torch.cat([positive, negative], 1) / temp
    loss = F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))
    closer = positive[:, 0] > negative.amax(1)
    return InfoNCE(loss, closer.to(positive.dtype).mean())


def matched_loss(
    student_z: Tensor,
    student_weight: Tensor,
    teacher_z: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    match: Tensor,
    *,
    row_weight: Tensor | None = None,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> MatchedLoss:
    """Weighted cross-entropy of student row ``r`` with the teacher rows ``match[r]``.

    ``p_t = softmax((W' y_t - c) / u)`` and ``x_r = W z_r / s``; ``loss = - sum_r w_r sum_g sum_k p_tk log
    softmax(x_r)_k`` with ``t = match[r, g]``, over the entries that are not negative. Without ``row_weight``
    every such entry counts the same: ``w_r = 1 / their number``. A row without an entry contributes nothing.

    Args: student_z [R, D], student_weight [K, D], teacher_z [T, D], teacher_weight [K, D], center [K], match
        int64 [R, G] with negative numbers for no teacher row, row_weight [R].
    """
    x = _upcast(_matmul_t(student_z, student_weight)) / student_temp  # [R, K]
    with torch.no_grad():
        raw = _upcast(_matmul_t(teacher_z, teacher_weight))  # [T, K]
        batch_center = _upcast(teacher_weight) @ _upcast(teacher_z).mean(0)  # [K]
        log_p = F.log_softmax((raw - center) / teacher_temp, dim=-1)
        p = log_p.exp()
        entropy = -(p * log_p).masked_fill(p == 0, 0).sum(-1)  # [T]
        valid = match >= 0  # [R, G]
        if row_weight is None:
            row_weight = (1 / valid.sum().clamp(min=1).to(x.dtype)).expand(len(match))
        row_weight = row_weight.to(x.dtype)
        target = torch.zeros_like(x)
        for rows, present in zip(match.clamp(min=0).T, valid.T, strict=True):
            target += torch.where(present[:, None], p[rows], 0)
        used = torch.where(valid, entropy[match.clamp(min=0)], 0).sum(1)  # [R]
    n = valid.sum(1)
    rows_loss = torch.where(n > 0, n * x.logsumexp(-1) - (target * x).sum(-1), 0)  # [R]
    loss = (row_weight * rows_loss).sum()
    return MatchedLoss(loss, batch_center, entropy.mean(), loss.detach() - (row_weight * used).sum())


def normalize_weight(weight_v: Tensor, weight_g: Tensor) -> Tensor:
    """``g_k v_k / |v_k|`` (Salimans & Kingma 2016): weight_v [K, D], weight_g [K, 1] -> [K, D]."""
    return weight_v * (weight_g / torch.linalg.vector_norm(weight_v, dim=1, keepdim=True))


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """``teacher <- m teacher + (1 - m) student``, tensor by tensor, in the teacher's dtype.

    A momentum of 1 changes no byte."""
    for t, s in zip(teacher, student, strict=True):
        if isinstance(momentum, Tensor):
            m = momentum.to(t)
            t.copy_(torch.where(m == 1, t, m * t + (1 - m) * s.to(t.dtype)))
        elif momentum != 1:
            t.mul_(momentum).add_((1 - momentum) * s.to(t.dtype))


def norm(grad: Tensor | None, device: torch.device) -> Tensor:
    """Euclidean norm in float64, 0-dim; 0 without a gradient."""
    if grad is None:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.linalg.vector_norm(grad, dtype=torch.float64)


def square_sum(grad: Tensor | None, device: torch.device) -> Tensor:
    """Sum of the squares in float64, 0-dim; 0 without a gradient."""
    if grad is None:
        return torch.zeros((), dtype=torch.float64, device=device)
    return grad.double().square().sum()


Norm = TypeVar("Norm", float, Tensor)


def clip_coefficient(norm: Norm, max_norm: float) -> Norm:
    """``min(1, max_norm / (norm + 1e-6))``, the official clipping; 1 where max_norm is 0 or norm is NaN."""
    if isinstance(norm, Tensor):
        coefficient = max_norm / (norm + 1e-6)
        return torch.where((coefficient < 1) & (max_norm > 0), coefficient, 1.0)
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


def put(x: Tensor, value: Tensor, frozen: Tensor | None) -> None:
    """``x <- value``, unless ``frozen``: then no byte changes. None means not frozen."""
    x.copy_(value if frozen is None else torch.where(frozen, x, value))


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
    grad_factor: float | Tensor = 1.0,
    frozen: Tensor | None = None,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019, algorithm 2) on ``grad_factor * grad``, none if ``frozen``.

    ``step`` counts the steps before this one."""
    m, v, direction = _adam(grad * grad_factor, exp_avg, exp_avg_sq, step, betas, eps)
    new = (1 - lr * weight_decay) * param - lr * direction
    for x, value in ((param, new), (exp_avg, m), (exp_avg_sq, v), (step, step + 1)):
        put(x, value, frozen)


@torch.no_grad()
def lars_(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    momentum: float,
    eta: float | None,
    grad_factor: float | Tensor = 1.0,
    frozen: Tensor | None = None,
) -> None:
    """One LARS step with momentum on ``grad_factor * grad``, nothing if ``frozen``.

    ``u = g + wd p``, scaled by ``eta |p| / |u|`` (1 where that is 0 or not finite); for tensors of one
    dimension ``u = g``. Then ``b <- momentum b + u``, ``p <- p - lr b``. Without ``eta`` this is SGD, and
    ``u = g + wd p`` for all."""
    update = grad * grad_factor
    if param.ndim != 1 or eta is None:
        update = update + weight_decay * param
    if param.ndim != 1 and eta is not None:
        scale = eta * torch.linalg.vector_norm(param) / torch.linalg.vector_norm(update)
        update = update * torch.where((scale > 0) & torch.isfinite(scale), scale, 1.0)
    new = momentum * buffer + update
    put(param, param - lr * new, frozen)
    put(buffer, new, frozen)


@torch.no_grad()
def lamb_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
    adapt: bool = True,
    grad_factor: float | Tensor = 1.0,
    frozen: Tensor | None = None,
) -> None:
    """One LAMB step (You et al. 2020, algorithm 2) on ``grad_factor * grad``, nothing if ``frozen``.

    ``u = adam direction + wd p``, ``p <- p - lr r u`` with ``r = |p| / |u|`` (1 where either is 0, or without
    ``adapt``). ``step`` counts the steps before this one."""
    m, v, direction = _adam(grad * grad_factor, exp_avg, exp_avg_sq, step, betas, eps)
    update = direction + weight_decay * param
    p_norm, u_norm = torch.linalg.vector_norm(param), torch.linalg.vector_norm(update)
    ratio = torch.where((p_norm > 0) & (u_norm > 0) & adapt, p_norm / u_norm, 1.0)
    new = param - lr * ratio * update
    for x, value in ((param, new), (exp_avg, m), (exp_avg_sq, v), (step, step + 1)):
        put(x, value, frozen)


def _adam(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """New moments and the direction ``m_hat / (sqrt(v_hat) + eps)``, bias corrections in float64."""
    beta1, beta2 = betas
    n = step.double() + 1
    m = exp_avg + (1 - beta1) * (grad - exp_avg)
    v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    return m, v, m / (1 - beta1**n) / ((v / (1 - beta2**n)).sqrt() + eps)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _matmul_t(z: Tensor, weight: Tensor) -> Tensor:
    """``z @ weight.T`` in the wider of both dtypes, or in autocast's."""
    dtype = torch.promote_types(z.dtype, weight.dtype)
    return F.linear(z.to(dtype), weight.to(dtype))
