"""The eager oracles against the definitions, in float64."""

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import reference
from torch import Tensor


def double_loop(
    student: Tensor, teacher: Tensor, center: Tensor, s: float, u: float, n_global: int
) -> Tensor:
    """The loss as its definition reads: every teacher view against every other student view."""
    images = len(teacher) // n_global
    students = (student / s).split(images)
    targets = ((teacher - center) / u).softmax(-1).split(images)
    terms = []
    for g, p in enumerate(targets):
        for v, x in enumerate(students):
            if g != v:
                terms.append(-(p * x.log_softmax(-1)).sum(-1).mean())
    return torch.stack(terms).mean()


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "views,n_global,images,k", [(10, 2, 3, 33), (2, 2, 1, 5), (3, 1, 2, 7), (5, 4, 2, 16), (2, 1, 1, 1)]
)
def test_dino_loss_is_the_double_loop(views: int, n_global: int, images: int, k: int) -> None:
    x = rand(views * images, k, seed=0).requires_grad_()
    t, c = rand(n_global * images, k, seed=1), rand(k, seed=2)
    out = reference.dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.05, n_global=n_global)
    expected = double_loop(x, t, c, 0.1, 0.05, n_global)
    torch.testing.assert_close(out.loss, expected, rtol=1e-13, atol=1e-13)
    (grad,) = torch.autograd.grad(out.loss, x)
    (expected_grad,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-14)


def test_dino_loss_reports_center_entropy_and_kl() -> None:
    views, images, k = 4, 3, 11
    x, t, c = rand(views * images, k, seed=0), rand(2 * images, k, seed=1), rand(k, seed=2)
    out = reference.dino_loss(x, t, c, student_temp=0.1, teacher_temp=0.5)
    p = ((t - c) / 0.5).softmax(-1)
    torch.testing.assert_close(out.batch_center, t.mean(0))
    torch.testing.assert_close(out.teacher_entropy, torch.distributions.Categorical(probs=p).entropy().mean())
    log_q = (x / 0.1).log_softmax(-1).view(views, images, k)
    kls = [
        F.kl_div(log_q[v], p.view(2, images, k)[g], reduction="batchmean")
        for g in range(2)
        for v in range(views)
        if g != v
    ]
    torch.testing.assert_close(out.kl, torch.stack(kls).mean())


def test_prototype_loss_is_dino_loss_of_the_logits() -> None:
    z, w, y, wt, c = (
        rand(12, 6, seed=0),
        rand(9, 6, seed=1),
        rand(6, 6, seed=2),
        rand(9, 6, seed=3),
        rand(9, seed=4),
    )
    out = reference.prototype_loss(z, w, y, wt, c, student_temp=0.1, teacher_temp=0.04)
    torch.testing.assert_close(out.loss, double_loop(z @ w.T, y @ wt.T, c, 0.1, 0.04, 2))
    torch.testing.assert_close(out.batch_center, (y @ wt.T).mean(0))


def test_gradients_are_those_of_the_functions() -> None:
    z, w = rand(6, 4, seed=0).requires_grad_(), rand(5, 4, seed=1).requires_grad_()
    y, wt, c = rand(4, 4, seed=2), rand(5, 4, seed=3), rand(5, seed=4)

    def loss(z: Tensor, w: Tensor) -> Tensor:
        return reference.prototype_loss(z, w, y, wt, c, student_temp=0.5, teacher_temp=0.3).loss

    assert torch.autograd.gradcheck(loss, (z, w))
    v, g = rand(5, 4, seed=5).requires_grad_(), rand(5, 1, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(reference.normalize_weight, (v, g))


def test_normalize_weight_is_torchs() -> None:
    v, g = rand(5, 4, seed=5), rand(5, 1, seed=6)
    torch.testing.assert_close(reference.normalize_weight(v, g), torch._weight_norm(v, g, 0))


def test_adamw_is_torchs() -> None:
    p = torch.nn.Parameter(rand(7, 3, seed=0))
    q, m, v = p.detach().clone(), torch.zeros(7, 3).double(), torch.zeros(7, 3).double()
    optimizer = torch.optim.AdamW([p], lr=0.01, weight_decay=0.3)
    count = torch.zeros(())
    for step in range(1, 6):
        p.grad = rand(7, 3, seed=step)
        optimizer.step()
        reference.adamw_(
            q,
            2 * p.grad,
            m,
            v,
            count,
            lr=0.01,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.3,
            grad_factor=0.5,
        )
    torch.testing.assert_close(q, p.detach(), rtol=1e-12, atol=1e-12)
    assert count == 5


def test_ema_norms_and_clipping() -> None:
    t, s = rand(5, seed=0), rand(5, seed=1)
    expected = 0.9 * t + 0.1 * s
    reference.ema_update_([t], [s], 0.9)
    torch.testing.assert_close(t, expected)
    cpu = torch.device("cpu")
    norms = [reference.norm(x, cpu) for x in (torch.tensor([3.0, 4.0]), None, torch.tensor([float("nan")]))]
    assert norms[0] == 5 and norms[1] == 0 and norms[2].isnan()
    assert all(norm.dtype == torch.float64 for norm in norms)
    coefficients = [reference.clip_coefficient(norm, 2.0) for norm in norms]
    assert coefficients[0] == 2.0 / (5.0 + 1e-6) and coefficients[1] == coefficients[2] == 1
    assert reference.clip_coefficient(2.0, 1.0) == 1.0 / (2.0 + 1e-6)
    assert reference.clip_coefficient(0.5, 1.0) == 1.0
    assert reference.clip_coefficient(5.0, 0.0) == 1.0
