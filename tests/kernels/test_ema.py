"""EMA and clipping of lists of tensors."""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels import clip_grad_per_tensor_, ema_update_, grad_square_sums
from fastdino_kernels.ema import grad_norms
from torch import Tensor

SIZES = [(3,), (257, 129), (), (1, 1, 5), (0, 4), (20000,)]
CPU = torch.device("cpu")


def tensors(seed: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(device, dtype) for s in SIZES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_ema_update(device: torch.device, dtype: torch.dtype) -> None:
    teacher, student = tensors(0, device=device), tensors(1, dtype, device)
    expected = [0.996 * t.double() + 0.004 * s.double() for t, s in zip(teacher, student, strict=True)]
    ema_update_(teacher, student, 0.996)
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t.double(), e, rtol=2e-7, atol=2e-7)


def test_types_and_layouts_mix_in_one_call(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    student = [torch.randn(6, 40, generator=g).to(device, dtype) for dtype in kinds]
    student += [torch.randn(6, 40, generator=g).to(device).T, torch.randn(40, 6, generator=g).to(device)]
    teacher = [torch.randn(x.shape, generator=g).to(device) for x in student]
    teacher[2], teacher[4] = teacher[2].bfloat16(), teacher[4].T.contiguous().T
    expected = [0.9 * t.double() + 0.1 * s.double() for t, s in zip(teacher, student, strict=True)]
    ema_update_(teacher, student, torch.tensor(0.9, device=device))
    for t, e in zip(teacher, expected, strict=True):
        tolerance = 0.02 if t.dtype == torch.bfloat16 else 3e-7
        torch.testing.assert_close(t.double(), e, rtol=tolerance, atol=tolerance)


def test_every_half_precision_number_is_read_exactly(device: torch.device) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).to(device)
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = bits.view(dtype), torch.zeros(2**16, device=device)
        ema_update_([teacher], [student], 0.0)
        assert torch.equal(teacher.isnan(), student.isnan())
        ok = ~student.isnan()
        assert torch.equal(teacher[ok], student[ok].float())


def test_a_momentum_of_one_changes_no_byte(device: torch.device) -> None:
    student = torch.full((50,), float("nan"), device=device)
    teacher = torch.full((50,), -0.0, device=device)
    for momentum in (1.0, torch.tensor(1.0, device=device)):
        ema_update_([teacher], [student], momentum)
        assert teacher.signbit().all() and not teacher.isnan().any()


def test_ema_of_other_layouts(device: torch.device) -> None:
    teacher, student = torch.zeros(4, 6, device=device).T, torch.randn(6, 4, device=device)
    ema_update_([teacher], [student], 0.0)
    assert torch.equal(teacher, student)
    both = torch.zeros(4, 6, device=device).T, torch.randn(4, 6, device=device).T
    ema_update_([both[0]], [both[1]], 0.0)
    assert torch.equal(*both)


def test_parameters_are_taken_and_empty_lists(device: torch.device) -> None:
    student = torch.nn.Parameter(torch.randn(100, device=device))
    teacher = torch.randn(100, device=device)
    ema_update_([teacher], [student], 0.0)
    assert torch.equal(teacher, student)
    ema_update_([], [], 0.5)


def test_norms(device: torch.device) -> None:
    big, small = 1e30 * torch.ones(9000, device=device), 1e-30 * torch.ones(9000, device=device)
    half = torch.full((33,), 300.0, dtype=torch.float16, device=device)
    grads: list[Tensor | None] = [*tensors(0, device=device), None, big, small, half, half.bfloat16()]
    norms = grad_norms(grads, grad_scale=4.0)
    truth = [0.0 if g is None else g.double().norm().item() / 4 for g in grads]
    assert norms.device == big.device and norms.dtype == torch.float32
    torch.testing.assert_close(norms.cpu(), torch.tensor(truth), rtol=2e-7, atol=0)
    assert torch.equal(grad_norms(grads, torch.tensor(4.0, device=device)), norms)
    assert len(grad_norms([])) == 0 and grad_norms([None])[0] == 0


def test_norms_see_every_bad_element(device: torch.device) -> None:
    bad = torch.ones(8500, device=device)
    for i, value in ((0, "nan"), (31, "inf"), (32, "-inf"), (8191, "nan"), (8192, "inf"), (8499, "nan")):
        bad[i] = float(value)
        assert not grad_norms([bad])[0].isfinite()
        bad[i] = 1.0
    assert grad_norms([bad])[0].isfinite()


def test_norms_do_not_depend_on_the_number_of_threads(library: object, threads: None) -> None:
    grads = [*tensors(0), 1e30 * torch.ones(40000)]
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(grad_norms(grads))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_square_sums_add_up_over_shards(device: torch.device) -> None:
    whole = [*tensors(3, device=device), torch.full((9, 7), 0.5, dtype=torch.float64, device=device)]
    whole.append(torch.full((5, 3), 3e20, device=device))  # whose square exceeds fp32
    parts = [
        [x.reshape(-1)[: x.numel() // 3] for x in whole],
        [x.reshape(-1)[x.numel() // 3 :] for x in whole],
    ]
    sums = [grad_square_sums([None, *part]) for part in parts]
    assert all(x.dtype == torch.float64 and x.device == whole[0].device and x[0] == 0 for x in sums)
    expected = torch.stack([x.double().square().sum() for x in whole])
    torch.testing.assert_close((sums[0] + sums[1])[1:], expected, rtol=1e-12, atol=0)
    whole[0].view(-1)[-1] = float("inf")
    assert grad_square_sums(whole).isfinite().tolist() == [False] + [True] * (len(whole) - 1)
    assert len(grad_square_sums([])) == 0 and grad_square_sums([None]).tolist() == [0.0]


@pytest.mark.parametrize("scale", ["float", "tensor"])
def test_clipping_is_the_official_loop(device: torch.device, scale: str) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    params = [torch.nn.Parameter(torch.zeros(s, device=device)) for s in SIZES]
    params += [torch.nn.Parameter(torch.zeros(9, 7, dtype=kind, device=device)) for kind in kinds]
    grads = tensors(3, device=device) + [0.5 * torch.ones(9, 7, dtype=kind, device=device) for kind in kinds]
    for p, g in zip(params, grads, strict=True):
        p.grad = 8 * g
    params.insert(2, torch.nn.Parameter(torch.zeros(2, device=device)))
    grad_scale = 8.0 if scale == "float" else torch.tensor(8.0, device=device)
    norms = clip_grad_per_tensor_(params, 2.0, grad_scale=grad_scale)
    assert params[2].grad is None and norms[2] == 0
    kept = [i for i in range(len(params)) if i != 2]
    for i, g in zip(kept, grads, strict=True):
        norm = g.double().norm()
        torch.testing.assert_close(norms[i].double(), norm, rtol=1e-6, atol=0)
        factor = 2.0 / (norm + 1e-6)
        expected = (g.double() * factor if factor < 1 else g.double()).to(g.dtype)
        torch.testing.assert_close(params[i].grad, expected, rtol=torch.finfo(g.dtype).eps + 1e-6, atol=0)
    before = [params[i].grad.clone() for i in kept]
    clip_grad_per_tensor_(params, 0.0)
    assert all(torch.equal(params[i].grad, x) for i, x in zip(kept, before, strict=True))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="student: expected 1 tensors"):
        ema_update_([torch.ones(1)], [], 0.5)
    with pytest.raises(ValueError, match=r"student\[0\]: expected \[1\] on cpu, got \[2\] on cpu"):
        ema_update_([torch.ones(1)], [torch.ones(2)], 0.5)
    with pytest.raises(ValueError, match="momentum: expected a number in"):
        ema_update_([torch.ones(1)], [torch.ones(1)], -0.1)
    with pytest.raises(ValueError, match="max_norm: expected a number >= 0"):
        clip_grad_per_tensor_([], -1.0)
