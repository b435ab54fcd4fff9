"""LAMB against algorithm 2 of the paper in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fastdino_kernels import LAMB
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
    return [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.0, "lr": 0.02}]


def set_grads(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        p.grad = None if i == 5 else (scale * (1 + i) * torch.randn(p.shape, generator=g)).to(p)


class Oracle:
    """Algorithm 2 in float64, with clipping of each tensor and of all together."""

    def __init__(self, params: list[torch.nn.Parameter], each: float, every: float, exclude_1d: bool) -> None:
        self.values = [p.detach().double().clone() for p in params]
        self.moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in self.values]
        self.step = 0
        self.each, self.every, self.exclude_1d = each, every, exclude_1d

    def __call__(self, grads: list[Tensor | None]) -> None:
        self.step += 1
        clipped = [
            None if g is None else g * min(1.0, self.each / (g.norm().item() + 1e-6)) if self.each else g
            for g in grads
        ]
        total = math.sqrt(sum(g.square().sum().item() for g in clipped if g is not None))
        factor = self.every / total if self.every and total > self.every else 1.0
        for i, (x, g, (m, v)) in enumerate(zip(self.values, clipped, self.moments, strict=True)):
            if g is None:
                continue
            lr, decay = (0.05, 0.1) if i < 4 else (0.02, 0.0)
            m.mul_(0.9).add_(0.1 * factor * g)
            v.mul_(0.999).add_(0.001 * (factor * g) ** 2)
            u = (m / (1 - 0.9**self.step)) / ((v / (1 - 0.999**self.step)).sqrt() + 1e-6) + decay * x
            norms = x.norm().item(), u.norm().item()
            adapted = min(norms) > 0 and not (self.exclude_1d and x.ndim <= 1)
            x.sub_(lr * (norms[0] / norms[1] if adapted else 1.0) * u)


@pytest.mark.parametrize(
    "each,every,exclude_1d", [(0.0, 0.0, True), (0.0, 3.0, False), (2.0, 3.0, True)], ids=str
)
def test_update_rule(device: torch.device, each: float, every: float, exclude_1d: bool) -> None:
    params = parameters(device)
    teachers = [torch.zeros_like(p) for p in params]
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    optimizer = LAMB(
        groups_of(params),
        teachers,
        lr=torch.tensor(0.05, device=device) if each else 0.05,
        weight_decay=0.1,
        max_tensor_norm=each,
        max_grad_norm=every,
        exclude_1d=exclude_1d,
        low_precision_params=copies,
    )
    oracle = Oracle(params, each, every, exclude_1d)
    averages = [torch.zeros_like(x) for x in oracle.values]
    for step in range(4):
        set_grads(params, step, scale=8.0)
        result = optimizer.step(momentum=0.75, grad_scale=8.0)
        grads = [None if p.grad is None else p.grad.double() / 8 for p in params]
        norms = [0.0 if g is None else g.norm().item() for g in grads]
        torch.testing.assert_close(result.grad_norms.cpu(), torch.tensor(norms), rtol=1e-6, atol=0)
        oracle(grads)
        averages = [0.75 * a + 0.25 * x for a, x in zip(averages, oracle.values, strict=True)]
    for p, t, c, value, average in zip(params, teachers, copies, oracle.values, averages, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(t.double(), average, rtol=1e-6, atol=1e-6)
        assert torch.equal(c, p.detach().bfloat16())
    state = optimizer.state[params[2]]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"] and state["step"].item() == 4
    for key, moment in zip(("exp_avg", "exp_avg_sq"), oracle.moments[2], strict=True):
        torch.testing.assert_close(
            state[key].double(), moment, rtol=1e-6, atol=2e-7 * moment.abs().max().item()
        )
    assert torch.equal(params[5], parameters(device)[5]) and params[5] not in optimizer.state


def test_a_bad_gradient_and_skip_change_no_byte(device: torch.device) -> None:
    params, teachers = parameters(device), [p.detach().clone() for p in parameters(device, 1)]
    optimizer = LAMB(groups_of(params), teachers, lr=0.1, max_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step(momentum=0.5)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    before = [x.detach().clone() for x in (*params, *teachers)]
    for bad, skip in ((True, False), (False, True), (False, torch.tensor(True, device=device))):
        set_grads(params, 1)
        assert params[2].grad is not None
        if bad:
            params[2].grad[-1, -1] = float("inf")
        result = optimizer.step(momentum=0.5, skip=skip)
        assert bool(result.found_inf) is bad
        assert all(map(torch.equal, before, (*params, *teachers)))
        for i, entry in optimizer.state_dict()["state"].items():
            assert all(torch.equal(entry[key], state[i][key]) for key in entry)
    set_grads(params, 1)
    optimizer.step(momentum=0.5)
    assert not torch.equal(before[2], params[2])


def test_tensors_outside_the_kernels_count_for_the_common_norm(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 8, generator=g).to(device)[:, ::2], torch.randn(6, 4, generator=g).double()]
    params = [torch.nn.Parameter(x.to(device)[:]) for x in values] + parameters(device)[:1]
    optimizer = LAMB(params, lr=0.05, weight_decay=0.1, max_grad_norm=1.5, max_tensor_norm=1.0)
    oracle = Oracle(params, 1.0, 1.5, True)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
        oracle([None if p.grad is None else p.grad.double() for p in params])
    for p, value in zip(params, oracle.values, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-6, atol=1e-6)


def test_state_continues(device: torch.device) -> None:
    params, others = parameters(device), parameters(device)
    first = LAMB(groups_of(params), lr=0.05)
    for step in range(2):
        set_grads(params, step)
        first.step()
    second = LAMB(groups_of(others), lr=0.7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    for x, optimizer in ((params, first), (others, second)):
        set_grads(x, 5)
        optimizer.step()
    assert all(map(torch.equal, params, others))


P = torch.nn.Parameter(torch.ones(2, 3))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="max_tensor_norm: expected a number >= 0, got -1"):
        LAMB([P], max_tensor_norm=-1.0)
    with pytest.raises(ValueError, match=r"betas: expected two numbers in \[0, 1\)"):
        LAMB([P], betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="momentum: expected"):
        LAMB([P], [torch.ones(2, 3)]).step()
