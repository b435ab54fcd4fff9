"""LARS against the formula of the official code, written out."""

from __future__ import annotations

import copy

import pytest
import torch
from fastdino_kernels import LARS
from torch import Tensor

SHAPES = [(4, 3), (2, 2), (150, 70), (), (4,), (2,), (0, 5)]  # the second is zero, the sixth has no gradient
CPU = torch.device("cpu")


def parameters(device: torch.device, seed: int = 0) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=g).to(device)) for s in SHAPES]
    with torch.no_grad():
        params[1].zero_()
    return params


def groups_of(params: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.0}]


def set_grads(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        p.grad = None if i == 5 else (scale * torch.randn(p.shape, generator=g)).to(p)


def official_step(value: Tensor, grad: Tensor, buffer: Tensor, decay: float, clip: float) -> None:
    """In float64: clipping, then the optimizer of the official code with lr 0.3."""
    if clip:
        grad = grad * min(1.0, clip / (grad.norm().item() + 1e-6))
    if value.ndim != 1:
        grad = grad + decay * value
        norm, update_norm = value.norm().item(), grad.norm().item()
        grad = grad * (0.001 * norm / update_norm if norm > 0 and update_norm > 0 else 1.0)
    buffer.mul_(0.9).add_(grad)
    value.sub_(0.3 * buffer)


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_update_rule(device: torch.device, clip: float) -> None:
    params = parameters(device)
    teachers = [torch.zeros_like(p) for p in params]
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    lr = torch.tensor(0.3, device=device) if clip else 0.3
    optimizer = LARS(
        groups_of(params),
        lr,
        0.1,
        max_grad_norm=clip,
        teacher_params=teachers,
        low_precision_teacher=copies,
    )
    values = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(x) for x in values]
    averages = [torch.zeros_like(x) for x in values]
    for step in range(4):
        set_grads(params, step, scale=8.0)
        result = optimizer.step(momentum=0.75, grad_scale=8.0)
        norms = [0.0 if p.grad is None else p.grad.double().norm().item() / 8 for p in params]
        torch.testing.assert_close(result.grad_norms.cpu(), torch.tensor(norms), rtol=1e-6, atol=0)
        for i, p in enumerate(params):
            if p.grad is not None:
                official_step(values[i], p.grad.double() / 8, buffers[i], 0.1 * (i < 4), clip)
            averages[i] = 0.75 * averages[i] + 0.25 * values[i]
    for p, t, c, value, average in zip(params, teachers, copies, values, averages, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(t.double(), average, rtol=1e-6, atol=1e-6)
        assert torch.equal(c, t.bfloat16())
    for i in (0, 2, 4):
        buffer = optimizer.state[params[i]]["momentum_buffer"]
        torch.testing.assert_close(buffer.double(), buffers[i], rtol=1e-6, atol=2e-7 * buffers[i].abs().max())
    assert torch.equal(params[5], parameters(device)[5]) and params[5] not in optimizer.state
    assert list(optimizer.state[params[0]]) == ["momentum_buffer"]


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_without_eta_it_is_sgd(device: torch.device, clip: float) -> None:
    mine, theirs = parameters(device), parameters(device)
    groups = [{"params": p[:5], "weight_decay": 0.2} for p in (mine, theirs)]
    rest = [{"params": p[5:], "weight_decay": 0.0} for p in (mine, theirs)]
    teachers = [torch.zeros_like(p) for p in mine]
    averages = [torch.zeros_like(p) for p in mine]
    ours = LARS([groups[0], rest[0]], 0.3, eta=None, max_grad_norm=clip, teacher_params=teachers)
    torchs = torch.optim.SGD([groups[1], rest[1]], 0.3, momentum=0.9)
    for step in range(5):
        set_grads(mine, step, scale=8.0)
        set_grads(theirs, step)
        if step == 2:
            assert mine[2].grad is not None
            mine[2].grad[0, 0] = float("inf")
        norms = torch.stack([0 * p.sum() if p.grad is None else p.grad.norm() for p in theirs]).detach()
        given = norms if step == 4 else None
        result = ours.step(momentum=0.75, grad_scale=8.0, skip=step == 1, norms=given)
        assert bool(result.found_inf) is (step == 2)
        if step in (1, 2):
            continue
        torch.testing.assert_close(result.grad_norms, norms, rtol=1e-6, atol=0)
        for p, norm in zip(theirs, norms.tolist(), strict=True):
            if p.grad is not None and clip:
                p.grad.mul_(min(1.0, clip / (norm + 1e-6)))
        torchs.step()
        averages = [0.75 * t + 0.25 * p.detach() for t, p in zip(averages, theirs, strict=True)]
    for x, y in zip((*mine, *teachers), (*theirs, *averages), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    for p, q in zip(mine, theirs, strict=True):
        if p.grad is not None:
            buffers = ours.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"]
            torch.testing.assert_close(*buffers, rtol=1e-6, atol=1e-6)


def test_groups_with_and_without_eta(device: torch.device) -> None:
    params, alone = parameters(device), parameters(device)
    groups = [{"params": params[:3]}, {"params": params[3:], "eta": None}]
    both = LARS(groups, 0.3, 0.1)
    single = [LARS(alone[:3], 0.3, 0.1), LARS(alone[3:], 0.3, 0.1, eta=None)]
    for step in range(2):
        set_grads(params, step)
        set_grads(alone, step)
        for optimizer in (both, *single):
            optimizer.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="norms: expected None, as LARS"):
        both.step(norms=torch.ones(len(params), device=device))


def test_a_bad_gradient_and_skip_change_no_byte(device: torch.device) -> None:
    params, teachers = parameters(device), [p.detach().clone() for p in parameters(device, 1)]
    optimizer = LARS(groups_of(params), 0.1, 0.1, teacher_params=teachers)
    set_grads(params, 0)
    optimizer.step(momentum=0.5)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    before = [x.detach().clone() for x in (*params, *teachers)]
    for bad, skip in ((True, False), (False, True), (False, torch.tensor(True, device=device))):
        set_grads(params, 1)
        assert params[2].grad is not None
        if bad:
            params[2].grad[-1, -1] = float("nan")
        result = optimizer.step(momentum=0.5, skip=skip)
        assert bool(result.found_inf) is bad
        assert all(map(torch.equal, before, (*params, *teachers)))
        for i, entry in optimizer.state_dict()["state"].items():
            assert torch.equal(entry["momentum_buffer"], state[i]["momentum_buffer"])
    set_grads(params, 1)
    optimizer.step(momentum=0.5)
    assert not torch.equal(before[2], params[2])


def test_other_types_and_layouts(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 8, generator=g).to(device)[:, ::2], torch.randn(6, 4, generator=g).double()]
    params = [torch.nn.Parameter(x.to(device)[:]) for x in values] + parameters(device)[:1]
    expected = [p.detach().double().clone() for p in params]
    buffers = [torch.zeros_like(x) for x in expected]
    optimizer = LARS(params, 0.3, 0.1, max_grad_norm=1.5)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
        for p, value, buffer in zip(params, expected, buffers, strict=True):
            assert p.grad is not None
            official_step(value, p.grad.double(), buffer, 0.1, 1.5)
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-6, atol=1e-6)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="eta: expected a number >= 0, got -1"):
        LARS([torch.nn.Parameter(torch.ones(1))], eta=-1)
    with pytest.raises(ValueError, match="max_grad_norm: expected a number >= 0, got -1"):
        LARS([torch.nn.Parameter(torch.ones(1))], max_grad_norm=-1)
    with pytest.raises(ValueError, match="teacher_params: expected 1 entries, got 0"):
        LARS([torch.nn.Parameter(torch.ones(1))], teacher_params=[])
