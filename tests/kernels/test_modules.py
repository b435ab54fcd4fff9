"""The official class: center, schedule, subclasses, compilation (values are checked in test_adapters.py)."""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels import backend, dino_loss
from fastdino_kernels.adapters import dinov2, lightly
from fastdino_kernels.modules import DINOLoss
from torch import Tensor

K, B, VIEWS = 29, 2, 4


def outputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(VIEWS * B, K, generator=g), torch.randn(2 * B, K, generator=g)


def make() -> DINOLoss:
    return DINOLoss(K, VIEWS, 0.04, 0.07, 2, 4)


def test_the_center_used_is_the_one_before_the_update() -> None:
    loss, (x, t) = make(), outputs()
    loss.center += 0.5
    expected = dino_loss(x, t, torch.full((K,), 0.5), student_temp=0.1, teacher_temp=0.07).loss
    assert torch.equal(loss(x, t, 3), expected)
    torch.testing.assert_close(loss.center, 0.45 + 0.1 * t.mean(0, keepdim=True))


def test_backward_after_the_center_moved() -> None:
    x, t = outputs()
    early, late = x.clone().requires_grad_(), x.clone().requires_grad_()
    make()(early, t, 0).backward()
    loss = make()
    value = loss(late, t, 0)
    loss(x, t, 0)
    value.backward()
    assert early.grad is not None and late.grad is not None and torch.equal(early.grad, late.grad)


def test_update_center_alone_and_in_subclasses() -> None:
    x, t = outputs()
    whole, alone = make(), make()
    whole(x, t, 0)
    alone.update_center(t.requires_grad_())
    torch.testing.assert_close(whole.center, alone.center)
    assert not alone.center.requires_grad

    class Still(DINOLoss):
        def update_center(self, teacher_output: Tensor) -> None:
            assert teacher_output is t

    still = Still(K, VIEWS, 0.04, 0.07, 2, 4)
    still(x, t, 0)
    assert (still.center == 0).all()


def test_schedule() -> None:
    assert make().teacher_temp_schedule == pytest.approx([0.04, 0.07, 0.07, 0.07])
    assert DINOLoss(K, 2, 0.02, 0.07, 1, 2).teacher_temp_schedule == [0.02, 0.07]
    assert DINOLoss(K, 2, 0.02, 0.07, 0, 2).teacher_temp_schedule == [0.07, 0.07]
    assert DINOLoss(K, 2, 0.03, 0.07, 3, 3).teacher_temp_schedule == pytest.approx([0.03, 0.05, 0.07])


def test_an_official_checkpoint_loads() -> None:
    loss = make()
    loss.load_state_dict({"center": torch.full((1, K), 2.0)})
    assert (loss.center == 2).all()


@pytest.mark.parametrize("name", ["official", "lightly", "dinov2"])
@pytest.mark.parametrize("kind", ["auto", "reference"])
def test_compiles_without_graph_breaks(name: str, kind: str) -> None:
    x, t = outputs()
    if name == "official":
        plain, arguments = (make(), make()), (x, t, 1)
    elif name == "lightly":
        plain, arguments = (
            (lightly.DINOLoss(K), lightly.DINOLoss(K)),
            (list(t.chunk(2)), list(x.chunk(VIEWS))),
        )
    else:
        plain, arguments = (dinov2.DINOLoss(K), dinov2.DINOLoss(K)), (x.chunk(VIEWS), t.softmax(-1).chunk(2))
    compiled = torch.compile(plain[0], fullgraph=True, backend="aot_eager")
    with backend(kind):
        for _ in range(2):
            torch.testing.assert_close(compiled(*arguments), plain[1](*arguments))
            torch.testing.assert_close(plain[0].center, plain[1].center)
