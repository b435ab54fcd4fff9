"""AdamWEMA against torch.optim.AdamW + a clipping loop + an EMA loop."""

from __future__ import annotations

import copy

import pytest
import torch
from fastdino_kernels import AdamWEMA, backend
from torch import Tensor

# Two groups as in training: decayed matrices (one of several blocks), undecayed vectors, a scalar.
SHAPES = [[(33, 65), (130, 129), (3, 3, 2, 5)], [(65,), (1,), ()]]
BACKENDS = ["cpu", "reference"]


@pytest.fixture(params=BACKENDS)
def kind(request: pytest.FixtureRequest, library: object):
    with backend(request.param):
        yield request.param


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[list[torch.nn.Parameter]]:
    g = torch.Generator().manual_seed(seed)
    return [[torch.nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in group] for group in SHAPES]


def groups_of(params: list[list[torch.nn.Parameter]]) -> list[dict]:
    return [{"params": params[0], "weight_decay": 0.3}, {"params": params[1], "weight_decay": 0.0}]


def flat(params: list[list[torch.nn.Parameter]]) -> list[torch.nn.Parameter]:
    return [p for group in params for p in group]


def set_grads(
    params: list[torch.nn.Parameter], seed: int, scale: float = 1.0, missing: tuple[int, ...] = ()
) -> None:
    g = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=g) * (10.0 if i % 2 else 0.1)  # some are clipped, some are not
        p.grad = None if i in missing else (scale * grad).to(p.dtype)


def expected_step(
    params: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    teachers: list[Tensor],
    momentum: float,
) -> list[float]:
    """One step as the official training loop does it, gradients unscaled."""
    norms = []
    for p in params:
        if p.grad is None:
            norms.append(0.0)
            continue
        norms.append(p.grad.norm(2).item())
        factor = 3.0 / (norms[-1] + 1e-6)
        if factor < 1:
            p.grad.mul_(factor)
    optimizer.step()
    with torch.no_grad():
        for t, p in zip(teachers, params, strict=True):
            t.mul_(momentum).add_((1 - momentum) * p)
    return norms


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_equals_adamw_clipping_and_ema(kind: str) -> None:
    mine, theirs = parameters(), parameters()
    teachers = [p.detach().clone() for p in flat(parameters(seed=1))]
    their_teachers = [t.clone() for t in teachers]
    ours = AdamWEMA(groups_of(mine), teachers, lr=0.0, max_grad_norm=3.0)
    torchs = torch.optim.AdamW(groups_of(theirs), lr=0.0)
    for step in range(6):
        missing = (1, 3) if step < 2 else ()  # as the last layer in its frozen epoch
        set_grads(flat(mine), step, scale=256.0, missing=missing)
        set_grads(flat(theirs), step, missing=missing)
        for optimizer in (ours, torchs):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = 0.01 / (step + 1)
                group["weight_decay"] = (0.1 + 0.05 * step) * (i == 0)
        result = ours.step(momentum=0.9 + 0.01 * step, grad_scale=256.0)
        norms = expected_step(flat(theirs), torchs, their_teachers, 0.9 + 0.01 * step)
        assert not result.found_inf
        torch.testing.assert_close(result.grad_norms, torch.tensor(norms), rtol=1e-6, atol=0)
        for p, q in zip(flat(mine), flat(theirs), strict=True):
            close(p.detach(), q.detach())
        for t, u in zip(teachers, their_teachers, strict=True):
            close(t, u)
    for p, q in zip(flat(mine), flat(theirs), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            close(ours.state[p][key], torchs.state[q][key])


def test_the_backends_agree(library: object) -> None:
    results = []
    for name in BACKENDS:
        params = parameters()
        teachers = [torch.zeros_like(p) for p in flat(params)]
        optimizer = AdamWEMA(groups_of(params), teachers, lr=0.01, max_grad_norm=3.0)
        with backend(name):
            for step in range(3):
                set_grads(flat(params), step)
                optimizer.step(momentum=0.5)
        results.append([*flat(params), *teachers])
    for a, b in zip(*results, strict=True):
        close(a.detach(), b.detach())


def test_missing_gradients_leave_the_state_but_not_the_teacher(kind: str) -> None:
    params = parameters()
    before = [p.detach().clone() for p in flat(params)]
    teachers: list[Tensor | None] = [torch.zeros_like(p) for p in flat(params)]
    teachers[4] = None
    frozen, frozen_teacher = torch.ones(7), torch.zeros(7)
    optimizer = AdamWEMA(groups_of(params), teachers, lr=0.1, extra_ema=[(frozen, frozen_teacher)])
    set_grads(flat(params), 0, missing=(1,))
    result = optimizer.step(momentum=0.75)
    p, t = flat(params)[1], teachers[1]
    assert torch.equal(p, before[1]) and p not in optimizer.state and t is not None
    torch.testing.assert_close(t, 0.25 * p.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(frozen_teacher, torch.full((7,), 0.25))
    assert result.grad_norms[1] == 0 and result.grad_norms[0] > 0
    assert not torch.equal(flat(params)[4], before[4])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (1, 16000), (5, 0)])
def test_a_bad_gradient_changes_no_byte(kind: str, bad: float, where: tuple[int, int]) -> None:
    params = parameters()
    teachers = [p.detach().clone() for p in flat(parameters(seed=1))]
    optimizer = AdamWEMA(groups_of(params), teachers, lr=0.1, weight_decay=0.1, max_grad_norm=3.0)
    for step, spoil in ((0, False), (1, True), (2, False)):
        set_grads(flat(params), step)
        if spoil:
            flat(params)[where[0]].grad.view(-1)[where[1]] = bad
            before = [x.detach().clone() for x in (*flat(params), *teachers)]
            state = copy.deepcopy(optimizer.state_dict())
        result = optimizer.step(momentum=0.5)
        assert result.found_inf is spoil
        assert result.grad_norms.isfinite().all().item() is not spoil
        if spoil:
            for a, b in zip((*flat(params), *teachers), before, strict=True):
                assert torch.equal(a, b)
            after = optimizer.state_dict()
            for i in state["state"]:
                assert all(torch.equal(state["state"][i][k], after["state"][i][k]) for k in state["state"][i])


def test_skip_measures_and_changes_nothing(kind: str) -> None:
    params = parameters()
    before = [p.detach().clone() for p in flat(params)]
    teachers = [torch.zeros_like(p) for p in flat(params)]
    optimizer = AdamWEMA(groups_of(params), teachers, lr=0.1)
    set_grads(flat(params), 0)
    result = optimizer.step(momentum=0.5, skip=True)
    assert not result.found_inf and (result.grad_norms > 0).all() and not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(flat(params), before, strict=True))
    assert not any(t.any() for t in teachers)


def test_state_dict_goes_both_ways(kind: str) -> None:
    start, continued = parameters(), parameters()
    first = AdamWEMA(groups_of(start), lr=0.01)
    for step in range(3):
        set_grads(flat(start), step)
        first.step(momentum=1.0)
    torchs = torch.optim.AdamW(groups_of(continued), lr=0.5)
    torchs.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for p, q in zip(flat(continued), flat(start), strict=True):
            p.copy_(q)
    back = copy.deepcopy(continued)
    second = AdamWEMA(groups_of(back), lr=0.7)
    second.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for params, optimizer in ((start, first), (continued, torchs), (back, second)):
        set_grads(flat(params), 7)
        optimizer.step(**({} if optimizer is torchs else {"momentum": 1.0}))
    assert second.param_groups[0]["lr"] == 0.01
    for p, q, r in zip(flat(start), flat(continued), flat(back), strict=True):
        close(p.detach(), q.detach())
        assert torch.equal(p, r)
        state = first.state[p]
        assert (
            set(state) == set(torchs.state[q]) and state["step"].dtype == torch.float32 and state["step"] == 4
        )


def test_amsgrad_state_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="group 0 has amsgrad=True"):
        AdamWEMA([p]).load_state_dict(torch.optim.AdamW([p], amsgrad=True).state_dict())


def test_bitwise_the_same_for_any_number_of_threads(library: object, threads: None) -> None:
    results = []
    for n in (1, 2, 3, 1):
        torch.set_num_threads(n)
        params = parameters()
        teachers = [torch.zeros_like(p) for p in flat(params)]
        optimizer = AdamWEMA(groups_of(params), teachers, lr=0.01, max_grad_norm=3.0)
        for step in range(3):
            set_grads(flat(params), step)
            norms = optimizer.step(momentum=0.9).grad_norms
        results.append([*flat(params), *teachers, norms])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_layouts_and_dtypes_the_kernels_do_not_take(library: object) -> None:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(4, 3, 5, 5, generator=g)
    cases = {
        "channels last": image.clone(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 4, generator=g).T,
        "every second": torch.randn(6, 8, generator=g)[:, ::2],
        "float64": torch.randn(6, 4, generator=g, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }
    for name, value in cases.items():
        mine, theirs = torch.nn.Parameter(value), torch.nn.Parameter(value.clone())
        teacher = torch.zeros(value.shape, dtype=value.dtype)
        ours, torchs = (
            AdamWEMA([mine], [teacher], lr=0.1),
            torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0),
        )
        for step in range(2):
            mine.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(step)).to(value)
            theirs.grad = mine.grad.clone()
            ours.step(momentum=0.0)
            torchs.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7, msg=name)
        torch.testing.assert_close(teacher, mine.detach(), rtol=0, atol=0, msg=name)


P = torch.nn.Parameter(torch.ones(2, 3))
BAD = [
    (lambda: AdamWEMA([P], lr=-1.0), "lr: expected a number >= 0, got -1.0"),
    (lambda: AdamWEMA([P], betas=(0.9, 1.0)), r"betas: expected two numbers in \[0, 1\)"),
    (lambda: AdamWEMA([P], max_grad_norm=float("nan")), "max_grad_norm: expected"),
    (lambda: AdamWEMA([P], []), "teacher_params: expected 1 entries, got 0"),
    (
        lambda: AdamWEMA([P], [torch.ones(3, 2)]),
        r"teacher_params\[0\]: expected shape \[2, 3\] .* got shape \[3, 2\]",
    ),
    (lambda: AdamWEMA([P], [P]), r"teacher_params\[0\]: the teacher must not require grad"),
    (lambda: AdamWEMA([P], extra_ema=[(P, torch.ones(1))]), r"extra_ema\[0\]: expected shape"),
    (lambda: AdamWEMA([P]).step(momentum=1.5), r"momentum: expected a number in \[0, 1\], got 1.5"),
    (lambda: AdamWEMA([P]).step(momentum=1.0, grad_scale=0.0), "grad_scale: expected a number > 0"),
    (lambda: AdamWEMA([P]).add_param_group({"params": [torch.ones(1)]}), "add_param_group: groups are fixed"),
]


@pytest.mark.parametrize("call,message", BAD, ids=[message for _, message in BAD])
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
