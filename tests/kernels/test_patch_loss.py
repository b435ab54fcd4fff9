"""The loss on masked patches against iBOT's definition: views, then images, then masked patches."""

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import backend
from fastdino_kernels.patch_loss import patch_loss
from torch import Tensor

TEMPS = dict(student_temp=0.1, teacher_temp=0.04)
VIEWS, IMAGES, PATCHES = 2, 3, 7


def ibot(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, mask: Tensor) -> Tensor:
    """z, y [V, B, N, D], mask [V, B, N]: the mean over masked patches, then over images, then over views."""
    of_views = []
    for student, teacher, masks in zip(z, y, mask, strict=True):
        of_images = []
        for s, t, m in zip(student, teacher, masks, strict=True):
            p = ((F.linear(t, wt) - c) / 0.04).softmax(-1)
            loss = -(p * (F.linear(s, w) / 0.1).log_softmax(-1)).sum(-1)
            of_images.append((loss * m).sum() / m.sum().clamp(min=1))
        of_views.append(torch.stack(of_images).mean())
    return torch.stack(of_views).mean()


def selected(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum(-1, keepdim=True).expand_as(mask)[mask]
    return patch_loss(z[mask], w, y[mask], wt, c, row_weight=1 / (VIEWS * IMAGES * count), **TEMPS).loss


def problem(k: int = 1100, d: int = 8):
    g = torch.Generator().manual_seed(k)
    z, y = (F.normalize(torch.randn(VIEWS, IMAGES, PATCHES, d, generator=g), dim=-1) for _ in "zy")
    w, wt = (F.normalize(torch.randn(k, d, generator=g), dim=1) for _ in "ww")
    mask = torch.rand(VIEWS, IMAGES, PATCHES, generator=g) < 0.5
    mask[1, 2] = False  # an image without a masked patch counts as one, with a loss of 0
    return z, w, y, wt, 0.3 * torch.randn(k, generator=g), mask


def loss_and_grads(function, z: Tensor, w: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    z, w = z.detach().requires_grad_(), w.detach().requires_grad_()
    loss = function(z, w, *rest)
    loss.backward()
    assert z.grad is not None and w.grad is not None
    return loss.detach(), z.grad, w.grad


def test_against_the_definition(library: None, poisoned: None) -> None:
    *inputs, mask = problem()
    oracle = loss_and_grads(ibot, *(x.double() for x in inputs), mask)
    eager = loss_and_grads(ibot, *inputs, mask)
    for kind in ("auto", "reference"):
        with backend(kind):
            kernel = loss_and_grads(selected, *inputs, mask)
        for value, base, truth in zip(kernel, eager, oracle, strict=True):
            bound = 2 * (base.double() - truth).abs().max() + 1.2e-7 * truth.abs().max()
            assert (value.double() - truth).abs().max() <= bound


def test_without_weights_it_is_the_mean(library: None) -> None:
    z, w, y, wt, c, mask = problem()
    out = patch_loss(z[mask], w, y[mask], wt, c, **TEMPS)
    log_q = (F.linear(z[mask], w).double() / 0.1).log_softmax(-1)
    log_p = ((F.linear(y[mask], wt).double() - c) / 0.04).log_softmax(-1)
    p = log_p.exp()
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss.double(), -(p * log_q).sum(-1).mean(), **close)
    torch.testing.assert_close(out.kl.double(), (p * (log_p - log_q)).sum(-1).mean(), **close)
    torch.testing.assert_close(out.teacher_entropy.double(), -(p * log_p).sum(-1).mean(), **close)
    torch.testing.assert_close(out.batch_center, F.linear(y[mask], wt).mean(0), **close)
    torch.testing.assert_close(out.kl, out.loss - out.teacher_entropy, **close)


def test_gradcheck_through_the_reference() -> None:
    z, w, y, wt, c, _ = (x.double() for x in problem(k=5, d=3))
    rows = patch_loss(z[0, 0], w, y[0, 0], wt, c, **TEMPS)
    assert rows.loss.dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda z, w: patch_loss(z, w, y[0, 0], wt, c, **TEMPS).loss,
        (z[0, 0].requires_grad_(), w.requires_grad_()),
    )


def test_compiles_without_graph_breaks_for_any_number_of_patches(library: None) -> None:
    z, w, y, wt, c, _ = problem(k=300)
    z, y = z.flatten(0, 2), y.flatten(0, 2)

    def step(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return 2 * patch_loss(z, w, y, wt, c, **TEMPS).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 11, 8):
        expected = loss_and_grads(step, z[:rows], w, y[:rows])
        for a, b in zip(loss_and_grads(compiled, z[:rows], w, y[:rows]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


BAD = [
    (dict(student_z=torch.zeros(8)), ValueError, r"student_z: expected shape \[R, D\], got \[8\]"),
    (dict(teacher_z=torch.zeros(7, 4)), ValueError, r"teacher_z: expected shape \[8, 4\], got \[7, 4\]"),
    (
        dict(student_z=torch.zeros(0, 4), teacher_z=torch.zeros(0, 4)),
        ValueError,
        "z: expected at least one row",
    ),
    (dict(row_weight=torch.ones(4)), ValueError, r"row_weight: expected shape \[8\], got \[4\]"),
    (dict(row_weight=2.0), TypeError, "row_weight: expected a tensor, got float"),
    (dict(teacher_temp=0), ValueError, "teacher_temp: expected a temperature > 0"),
]


@pytest.mark.parametrize("change,kind,message", BAD, ids=[message for _, _, message in BAD])
def test_errors_name_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    arguments = dict(
        student_z=torch.zeros(8, 4),
        student_weight=torch.zeros(6, 4),
        teacher_z=torch.zeros(8, 4),
        teacher_weight=torch.zeros(6, 4),
        center=torch.zeros(6),
    )
    with pytest.raises(kind, match=message):
        patch_loss(**{**arguments, **TEMPS, **change})
