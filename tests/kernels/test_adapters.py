"""The losses of other code bases against their definitions: loops over views and patches, in float64."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fastdino_kernels import modules
from fastdino_kernels.adapters import dinov2, lightly, solo_learn
from torch import Tensor

K, B, S, M = 37, 3, 0.1, 0.9  # prototypes, images, student temperature, center momentum


@pytest.fixture(params=["cpu", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "triton":
        yield request.getfixturevalue("triton_device")
    else:
        yield torch.device("cpu")


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cross_entropy(p: Tensor, x: Tensor) -> Tensor:
    """Of one pair of rows, or of several: [..., K], [..., K] -> [...]."""
    return -(p * (x / S).log_softmax(-1)).sum(-1)


def targets(t: Tensor, center: Tensor, u: float) -> Tensor:
    return ((t - center) / u).softmax(-1)


def loss_and_grads(loss: Callable[..., Tensor], *students: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in students]
    value = loss(*leaves)
    (3 * value).backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for value, truth in zip(got, expected, strict=True):
        scale = truth.abs().max().item()
        torch.testing.assert_close(value.double().cpu(), truth.double(), rtol=0, atol=tolerance * scale)


# ----------------------------------------------------------------------------------------- DINO's definition


def dino(x: Tensor, t: Tensor, center: Tensor, u: float, views: int) -> Tensor:
    students, teachers = x.chunk(views), targets(t, center, u).chunk(2)
    pairs = [(p, y) for g, p in enumerate(teachers) for v, y in enumerate(students) if g != v]
    return torch.stack([cross_entropy(p, y).mean() for p, y in pairs]).mean()


@pytest.mark.parametrize("kind", ["official", "solo_learn"])
def test_dino_over_epochs(device: torch.device, kind: str) -> None:
    views = 4
    if kind == "official":
        loss = modules.DINOLoss(K, views, 0.03, 0.07, 3, 6, student_temp=S, center_momentum=M).to(device)
    else:
        loss = solo_learn.DINOLoss(K, 0.03, 0.07, 3, 6, num_large_crops=views).to(device)
    assert loss.teacher_temp_schedule == pytest.approx([0.03, 0.05, 0.07, 0.07, 0.07, 0.07])
    center = torch.zeros(1, K, dtype=torch.float64)
    for epoch, u in enumerate((0.03, 0.05, 0.07, 0.07)):
        x, t = logits(views * B, K, seed=epoch), logits(2 * B, K, seed=100 + epoch)
        if kind == "official":
            got = loss_and_grads(lambda x, t=t, e=epoch: loss(x, t.to(device), e), x.to(device))
        else:
            loss.epoch = epoch
            got = loss_and_grads(lambda x, t=t: loss(x, t.to(device)), x.to(device))
        same(got, loss_and_grads(lambda x, t=t, c=center, u=u: dino(x, t.double(), c, u, views), x.double()))
        center = M * center + (1 - M) * t.double().mean(0, keepdim=True)
        same([loss.center], [center])
    assert list(loss.state_dict()) == ["center"] and loss.center.shape == (1, K)
    assert loss.center.dtype == torch.float32 and not loss.center.requires_grad


# --------------------------------------------------------------------------------------------------- lightly


def lightly_loss(teachers: list[Tensor], students: list[Tensor], center: Tensor, u: float) -> Tensor:
    pairs = [(p, x) for g, p in enumerate(teachers) for v, x in enumerate(students) if g != v]
    return torch.stack([cross_entropy(targets(p, center, u), x).mean() for p, x in pairs]).mean()


@pytest.mark.parametrize("n_teacher,n_student", [(2, 5), (2, 2), (1, 2), (3, 4), (2, 1), (3, 2), (4, 1)])
def test_lightly_over_steps(device: torch.device, n_teacher: int, n_student: int) -> None:
    loss = lightly.DINOLoss(K, center_momentum=M).to(device)
    center = torch.zeros(1, 1, K, dtype=torch.float64)
    buffer = loss.center
    for step in range(3):
        teachers = [logits(B, K, seed=10 * step + g) for g in range(n_teacher)]
        students = [logits(B, K, seed=10 * step + 5 + v) for v in range(n_student)]
        given = [t.to(device) for t in teachers]
        got = loss_and_grads(lambda *x, t=given: loss(t, list(x)), *(x.to(device) for x in students))
        wide, c = [t.double() for t in teachers], center[0]
        expected = loss_and_grads(
            lambda *x, t=wide, c=c: lightly_loss(t, list(x), c, 0.04), *(x.double() for x in students)
        )
        same(got, expected)
        center = M * center + (1 - M) * torch.stack(wide).mean((0, 1), keepdim=True)
        same([loss.center], [center])
    assert list(loss.state_dict()) == ["center"] and loss.center.shape == (1, 1, K)
    assert buffer is loss.center  # references to the buffer see the update


def test_lightly_backward_after_the_center_moved() -> None:
    loss = lightly.DINOLoss(K, teacher_temp=0.1)
    loss.center += logits(1, 1, K)
    before = loss.center.clone()
    t, x = [logits(B, K, seed=i) for i in (1, 2)], logits(B, K, seed=3).requires_grad_()
    value = loss(t, [x, x])
    loss(t, [x.detach()] * 2)
    value.backward()
    expected = loss_and_grads(
        lambda x: lightly_loss([y.double() for y in t], [x, x], before[0].double(), 0.1) / 3,
        x.detach().double(),
    )
    assert x.grad is not None
    same([x.grad], expected[1:])


def test_lightly_temperatures() -> None:
    loss = lightly.DINOLoss(K, warmup_teacher_temp=0.02, teacher_temp=0.06, warmup_teacher_temp_epochs=3)
    t, x = [logits(B, K, seed=i) for i in (1, 2)], [logits(B, K, seed=i) for i in (3, 4)]
    asked = [
        (dict(), 0.06),
        (dict(epoch=0), 0.02),
        (dict(epoch=1), 0.04),
        (dict(epoch=7), 0.06),
        (dict(teacher_temp=0.1), 0.1),
        (dict(teacher_temp=0.1, epoch=0), 0.1),
        (dict(teacher_temp=torch.tensor(0.3)), 0.3),
    ]
    for arguments, u in asked:
        loss.center.zero_()
        torch.testing.assert_close(loss(t, x, **arguments), lightly_loss(t, x, torch.zeros(K), u))
    assert lightly.DINOLoss(K, warmup_teacher_temp_epochs=0).teacher_temp_schedule.shape == (0,)


def test_lightly_update_center_alone() -> None:
    loss = lightly.DINOLoss(K)
    t = logits(2, B, K)
    loss.update_center(t)
    torch.testing.assert_close(loss.center, 0.1 * t.mean((0, 1), keepdim=True))


# ---------------------------------------------------------------------------------------------------- DINOv2


def sinkhorn(x: Tensor, u: float, n: int) -> Tensor:
    q = (x.double() / u).exp()
    for _ in range(n):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def dinov2_loss(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    return torch.stack([cross_entropy(p, x).mean() for x in students for p in teachers]).sum()


def test_dinov2_class_token_over_steps(device: torch.device) -> None:
    """As in its training loop: local crops meet both teachers, global crops the other one, twice the rows."""
    loss = dinov2.DINOLoss(K, student_temp=S, center_momentum=M).to(device)
    assert list(loss.state_dict()) == ["center"] and loss.center.shape == (1, K)
    center = torch.zeros(1, K, dtype=torch.float64)
    previous = None
    for step, u in enumerate((0.04, 0.05, 0.07)):
        t = logits(2 * B, K, seed=step)
        if previous is not None:
            center = M * center + (1 - M) * previous.double().mean(0, keepdim=True)
        p = loss.softmax_center_teacher(t.to(device), teacher_temp=u)
        same([loss.center], [center])  # moved by the step before, not yet by this one
        truth = targets(t.double(), center, u)
        same([p], [truth])
        assert p.dtype == torch.float32 and not p.requires_grad
        p = p.view(2, B, K)
        loss.update_center(t.to(device))
        previous = t
        local = [logits(B, K, seed=50 + v) for v in range(4)]
        got = loss_and_grads(lambda *x, p=p: loss(list(x), p), *(x.to(device) for x in local))
        wide = list(truth.view(2, B, K))
        same(got, loss_and_grads(lambda *x, w=wide: dinov2_loss(list(x), w), *(x.double() for x in local)))
        both = logits(2 * B, K, seed=99)
        got = loss_and_grads(lambda x, p=p: loss([x], [p.flatten(0, 1)]), both.to(device))
        same(got, loss_and_grads(lambda x, w=truth: dinov2_loss([x], [w]), both.double()))
    loss.apply_center_update()
    loss.apply_center_update()  # nothing is left to apply
    center = M * center + (1 - M) * previous.double().mean(0, keepdim=True)
    same([loss.center], [center])


def test_dinov2_chunks_of_one_tensor() -> None:
    loss = dinov2.DINOLoss(K)
    p = loss.softmax_center_teacher(logits(2 * B, K), 0.04).view(2, B, K)
    x = logits(4 * B, K, seed=1).double()
    got = loss_and_grads(lambda x: loss(x.chunk(4), p), x.float())
    same(got, loss_and_grads(lambda x: dinov2_loss(list(x.chunk(4)), list(p.double())), x))


@pytest.mark.parametrize("n", [1, 3])
def test_dinov2_sinkhorn(device: torch.device, n: int) -> None:
    x = logits(2 * B, K)
    same(
        [dinov2.DINOLoss(K).sinkhorn_knopp_teacher(x.to(device), 0.07, n_iterations=n)],
        [sinkhorn(x, 0.07, n)],
    )
    count = torch.tensor([2 * B], device=device)
    got = dinov2.iBOTPatchLoss(K).sinkhorn_knopp_teacher(
        x.to(device), teacher_temp=0.07, n_masked_patches_tensor=count, n_iterations=n
    )
    same([got], [sinkhorn(x, 0.07, n)])
    assert count == 2 * B
    huge = dinov2.DINOLoss(K).sinkhorn_knopp_teacher((1e4 * x).to(device), 0.07)
    assert huge.isfinite().all()


def ibot(x: Tensor, p: Tensor, mask: Tensor) -> Tensor:
    """x, p [B, N, K]: mean over the images of the mean over their masked patches."""
    total = x.new_zeros(())
    for b in range(len(x)):
        masked = [n for n in range(x.shape[1]) if mask[b, n]]
        for n in masked:
            total = total + cross_entropy(p[b, n], x[b, n]) / len(masked)
    return total / len(x)


MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)


def test_ibot_over_steps(device: torch.device) -> None:
    loss = dinov2.iBOTPatchLoss(K, student_temp=S, center_momentum=M).to(device)
    assert list(loss.state_dict()) == ["center"] and loss.center.shape == (1, 1, K)
    center = torch.zeros(1, 1, K, dtype=torch.float64)
    mask = MASK.to(device)
    for step, u in enumerate((0.04, 0.05, 0.07)):
        t, x = logits(B, 5, K, seed=step), logits(B, 5, K, seed=20 + step)
        p = loss.softmax_center_teacher(t.to(device), u)
        truth = targets(t.double(), center, u)
        same([p, loss.center], [truth, center])
        expected = loss_and_grads(lambda x, p=truth: ibot(x, p, MASK), x.double())
        same(loss_and_grads(lambda x, p=p: loss(x, p, mask), x.to(device)), expected)

        got = loss_and_grads(lambda x, p=p: loss.forward_masked(x[mask], p[mask], mask), x.to(device))
        same(got, expected)
        padding = logits(2, K, seed=77).to(device)
        weight = 1 / MASK.sum(-1, keepdim=True).clamp(min=1).expand_as(MASK)[MASK].to(device)
        got = loss_and_grads(
            lambda x, p=p, w=weight, y=padding: loss.forward_masked(
                torch.cat([x[mask], y]),
                torch.cat([p[mask], y.softmax(-1)]),
                mask,
                n_masked_patches=4,
                masks_weight=w,
            ),
            x.to(device),
        )
        same(got, expected)
        got = loss_and_grads(
            lambda x, p=p, w=weight: loss.forward_masked(x[mask], p[mask], mask, masks_weight=2 * w),
            x.to(device),
        )
        same(got, [2 * y for y in expected])
        loss.update_center(t.to(device))
        center = M * center + (1 - M) * t.double().mean((0, 1))
    loss.apply_center_update()
    same([loss.center], [center])


def test_ibot_center_from_the_masked_patches_alone() -> None:
    """The training loop passes [1, M, K]."""
    loss = dinov2.iBOTPatchLoss(K)
    t = logits(1, 6, K)
    loss.update_center(t)
    assert loss.softmax_center_teacher(t, 0.04).shape == (1, 6, K)
    assert loss.softmax_center_teacher(t[0], 0.04).shape == (1, 6, K)
    torch.testing.assert_close(loss.center, 0.1 * t.mean(1, keepdim=True))


def test_ibot_without_masked_patches() -> None:
    loss = dinov2.iBOTPatchLoss(K)
    x = torch.empty(0, K, requires_grad=True)
    value = loss.forward_masked(x, torch.empty(0, K), torch.zeros(B, 5, dtype=torch.bool))
    value.backward()
    assert value == 0 and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_logits(device: torch.device, dtype: torch.dtype) -> None:
    """Losses and centers are fp32, gradients in the dtype of the logits."""
    x, t = logits(2 * B, K, dtype=dtype), 300 * logits(2 * B, K, seed=1, dtype=dtype)
    eps = torch.finfo(dtype).eps
    loss = dinov2.DINOLoss(K).to(device)
    p = loss.softmax_center_teacher(t.to(device), 0.04)
    value, grad = loss_and_grads(lambda x: loss([x], [p]), x.to(device))
    same([value, grad], loss_and_grads(lambda x: dinov2_loss([x], [p.double().cpu()]), x.double()), 2 * eps)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    loss.update_center(t.to(device))
    loss.apply_center_update()
    same([loss.center], [0.1 * t.double().mean(0, keepdim=True)])
    assert loss.center.dtype == torch.float32


# ----------------------------------------------------------------------------------------------- all of them

SIGNATURES = {
    modules.DINOLoss: (
        "out_dim, ncrops, warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs, "
        "student_temp=0.1, center_momentum=0.9",
        "student_output, teacher_output, epoch",
    ),
    solo_learn.DINOLoss: (
        "num_prototypes, warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, num_epochs, "
        "student_temp=0.1, num_large_crops=2, center_momentum=0.9",
        "student_output, teacher_output",
    ),
    lightly.DINOLoss: (
        "output_dim=65536, warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_temp_epochs=30, "
        "student_temp=0.1, center_momentum=0.9, center_mode='mean'",
        "teacher_out, student_out, teacher_temp=None, epoch=None",
    ),
    dinov2.DINOLoss: (
        "out_dim, student_temp=0.1, center_momentum=0.9",
        "student_output_list, teacher_out_softmaxed_centered_list",
    ),
    dinov2.iBOTPatchLoss: (
        "patch_out_dim, student_temp=0.1, center_momentum=0.9",
        "student_patch_tokens, teacher_patch_tokens, student_masks_flat",
    ),
}


def signature(function: Callable[..., object]) -> str:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return ", ".join(p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in parameters)


@pytest.mark.parametrize("kind", SIGNATURES, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_signatures_copies_and_checkpoints(kind: type[torch.nn.Module]) -> None:
    constructor, forward = SIGNATURES[kind]
    assert signature(kind.__init__) == constructor and signature(kind.forward) == forward
    arguments = {
        modules.DINOLoss: (K, 2, 0.04, 0.04, 0, 1),
        solo_learn.DINOLoss: (K, 0.04, 0.04, 0, 1),
    }.get(kind, (K,))
    loss = kind(*arguments)
    loss.center += 1.5
    again = kind(*arguments)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.center, loss.center) and torch.equal(copy.deepcopy(loss).center, loss.center)
    assert not list(loss.parameters())


def test_method_signatures_of_dinov2() -> None:
    for kind, first in ((dinov2.DINOLoss, "teacher_output"), (dinov2.iBOTPatchLoss, "teacher_patch_tokens")):
        assert signature(kind.softmax_center_teacher) == f"{first}, teacher_temp"
        assert signature(kind.update_center) == signature(kind.reduce_center_update) == first
        assert signature(kind.apply_center_update) == ""
    assert signature(dinov2.DINOLoss.sinkhorn_knopp_teacher) == "teacher_output, teacher_temp, n_iterations=3"
    assert list(inspect.signature(dinov2.iBOTPatchLoss.sinkhorn_knopp_teacher).parameters)[1:] == [
        "teacher_output",
        "teacher_temp",
        "n_masked_patches_tensor",
        "n_iterations",
    ]
    assert signature(dinov2.iBOTPatchLoss.forward_masked) == (
        "student_patch_tokens_masked, teacher_patch_tokens_masked, student_masks_flat, "
        "n_masked_patches=None, masks_weight=None"
    )


PROCESS = """
import sys
import torch, torch.distributed as dist
from fastdino_kernels import modules
from fastdino_kernels.adapters import dinov2, lightly, solo_learn

rank, folder, K, B = int(sys.argv[1]), sys.argv[2], 37, 3
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
state = {}
def logits(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + rank))

official = modules.DINOLoss(K, 2, 0.04, 0.04, 0, 1)
solo = solo_learn.DINOLoss(K, 0.04, 0.04, 0, 1)
light = lightly.DINOLoss(K)
for step in range(2):
    x, t = logits(2 * B, K, seed=10), logits(2 * B, K, seed=20 + 10 * step)
    official(x, t, 0), solo(x, t), light(list(t.chunk(2)), list(x.chunk(2)))
cls, patch = dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)
for step in range(2):
    t = logits(2 * B, K, seed=20 + 10 * step)
    cls.softmax_center_teacher(t, 0.04), patch.softmax_center_teacher(t[None], 0.04)
    cls.update_center(t), patch.update_center(t[None])
assert cls.reduce_handle is not None and not cls.updated
cls.apply_center_update(), patch.apply_center_update()
for name, loss in dict(official=official, solo=solo, lightly=light, cls=cls, patch=patch).items():
    state[name] = loss.center.flatten()
rows = 2 * B + rank  # processes need not hold equally many masked patches
t = torch.randn(rows, K, generator=torch.Generator().manual_seed(50 + rank))
state["sinkhorn"] = cls.sinkhorn_knopp_teacher(t[:2 * B], 0.07)
state["sinkhorn_patch"] = patch.sinkhorn_knopp_teacher(t, 0.07, n_masked_patches_tensor=torch.tensor([rows]))
assert "triton" not in sys.modules  # CPU tensors need none of it
torch.save(state, f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    center = torch.zeros(K, dtype=torch.float64)
    for step in range(2):
        both = torch.cat([logits(2 * B, K, seed=20 + 10 * step + rank) for rank in range(2)])
        center = M * center + (1 - M) * both.double().mean(0)
    for name in ("official", "solo", "lightly", "cls", "patch"):
        for result in results:
            same([result[name]], [center])
    t = [logits(2 * B + rank, K, seed=50 + rank) for rank in range(2)]
    whole = sinkhorn(torch.cat([t[0][: 2 * B], t[1][: 2 * B]]), 0.07, 3)
    same([r["sinkhorn"] for r in results], list(whole.chunk(2)))
    whole = sinkhorn(torch.cat(t), 0.07, 3)
    same([r["sinkhorn_patch"] for r in results], [whole[: 2 * B], whole[2 * B :]])


TEACHER, STUDENT = logits(B, K), logits(B, K, seed=1)
LIGHT = lightly.DINOLoss(K)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: lightly.DINOLoss(K, center_mode="median"),
        ValueError,
        "center_mode: expected 'mean', got 'median'",
    ),
    (lambda: LIGHT([TEACHER], [STUDENT]), ValueError, "two different views"),
    (
        lambda: LIGHT(TEACHER, [STUDENT, STUDENT]),
        TypeError,
        "teacher_out: expected a list of tensors, one per view, got Tensor",
    ),
    (lambda: LIGHT([TEACHER, TEACHER], []), ValueError, "student_out: expected at least one view"),
    (
        lambda: LIGHT([TEACHER, TEACHER], [STUDENT, STUDENT[:2]]),
        ValueError,
        r"student_out\[1\]: expected shape \[3, 37\], got \[2, 37\]",
    ),
    (
        lambda: LIGHT([TEACHER[:, :4]], [STUDENT, STUDENT]),
        ValueError,
        r"teacher_out\[0\]: expected shape \[B, 37\]",
    ),
    (
        lambda: LIGHT([TEACHER, TEACHER.clone().requires_grad_()], [STUDENT, STUDENT]),
        ValueError,
        r"teacher_out\[1\]: .*not require grad",
    ),
    (
        lambda: LIGHT([TEACHER, TEACHER], [STUDENT, STUDENT], teacher_temp=0.0),
        ValueError,
        "teacher_temp: expected a temperature > 0",
    ),
    (
        lambda: modules.DINOLoss(K, 2, 0.04, 0.07, 9, 5),
        ValueError,
        "warmup_teacher_temp_epochs: expected 0 to 5",
    ),
    (
        lambda: modules.DINOLoss(K, 2, 0.04, 0.07, 0, 5)(STUDENT, TEACHER, 0),
        ValueError,
        "teacher_logits: expected n_global",
    ),
    (
        lambda: modules.DINOLoss(K, 3, 0.04, 0.07, 0, 5)(STUDENT[:2], TEACHER[:2], 0),
        ValueError,
        r"student_output: .*ncrops \* B",
    ),
    (
        lambda: modules.DINOLoss(K, 2, 0.04, 0.07, 0, 5)(STUDENT[:2], TEACHER[:2], 5),
        IndexError,
        "epoch: expected 0 to 4, got 5",
    ),
    (
        lambda: solo_learn.DINOLoss(K, 0.04, 0.07, 0, 5, num_large_crops=3)(STUDENT, TEACHER),
        ValueError,
        "student_output: expected num_large_crops",
    ),
    (
        lambda: dinov2.DINOLoss(K)([STUDENT[:2]], [TEACHER]),
        ValueError,
        r"student_output_list\[0\]: expected shape \[3, 37\]",
    ),
    (
        lambda: dinov2.DINOLoss(K)([STUDENT], []),
        ValueError,
        "teacher_out_softmaxed_centered_list: expected at least one",
    ),
    (lambda: dinov2.DINOLoss(K)([], [TEACHER]), ValueError, "student_output_list: expected at least one"),
    (
        lambda: dinov2.DINOLoss(K).softmax_center_teacher(TEACHER[:, :4], 0.04),
        ValueError,
        "teacher_output: expected",
    ),
    (lambda: dinov2.DINOLoss(K).update_center(TEACHER[0]), ValueError, "teacher_output: expected"),
    (
        lambda: dinov2.iBOTPatchLoss(K).softmax_center_teacher(TEACHER[None, :, :4], 0.04),
        ValueError,
        r"teacher_patch_tokens: expected shape \[..., 37\]",
    ),
    (lambda: dinov2.iBOTPatchLoss(K).update_center(TEACHER), ValueError, "teacher_patch_tokens: expected"),
    (
        lambda: dinov2.iBOTPatchLoss(K)(STUDENT[None], TEACHER[None], MASK),
        ValueError,
        "student_masks_flat: expected",
    ),
    (
        lambda: dinov2.iBOTPatchLoss(K).forward_masked(STUDENT, TEACHER, MASK, masks_weight=torch.ones(2)),
        ValueError,
        "masks_weight: expected 3 weights",
    ),
    (
        lambda: dinov2.iBOTPatchLoss(K).forward_masked(STUDENT, TEACHER[:2], MASK),
        ValueError,
        "teacher_patch_tokens_masked: expected",
    ),
]


@pytest.mark.parametrize("call,kind,message", BAD, ids=[message for _, _, message in BAD])
def test_errors_name_the_argument(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
