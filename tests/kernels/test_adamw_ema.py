"""AdamWEMA against torch.optim.AdamW + a clipping loop + an EMA loop."""

from __future__ import annotations

import copy

import pytest
import torch
from fastdino_kernels import LAMB, LARS, AdamWEMA, AdamWGroup, AdamWScalars, adamw_ema_step_, backend
from torch import Tensor

# Two groups as in training: decayed matrices (one of two chunks), undecayed vectors, a scalar.
SHAPES = [[(33, 65), (130, 65), (3, 3, 2, 5)], [(65,), (1,), ()]]
CPU = torch.device("cpu")


def parameters(device: torch.device, seed: int = 0) -> list[list[torch.nn.Parameter]]:
    g = torch.Generator().manual_seed(seed)
    return [[torch.nn.Parameter(torch.randn(s, generator=g).to(device)) for s in group] for group in SHAPES]


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
        p.grad = None if i in missing else (scale * grad).to(p)


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


def test_twenty_steps_equal_adamw_clipping_and_ema(device: torch.device) -> None:
    mine, theirs = parameters(device), parameters(device)
    teachers = [p.detach().clone() for p in flat(parameters(device, seed=1))]
    their_teachers = [t.clone() for t in teachers]
    ours = AdamWEMA(groups_of(mine), teachers, lr=0.0, max_grad_norm=3.0)
    torchs = torch.optim.AdamW(groups_of(theirs), lr=0.0)
    for step in range(20):
        missing = (1, 3) if step < 2 else ()  # as the last layer in its frozen epoch
        set_grads(flat(mine), step, scale=256.0, missing=missing)
        set_grads(flat(theirs), step, missing=missing)
        for optimizer in (ours, torchs):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = 0.01 / (step + 1)
                group["weight_decay"] = (0.1 + 0.05 * step) * (i == 0)
        result = ours.step(momentum=0.9 + 0.004 * step, grad_scale=256.0)
        norms = expected_step(flat(theirs), torchs, their_teachers, 0.9 + 0.004 * step)
        assert not result.found_inf
        torch.testing.assert_close(result.grad_norms.cpu(), torch.tensor(norms), rtol=1e-6, atol=0)
    for p, q in zip(flat(mine), flat(theirs), strict=True):
        close(p.detach(), q.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            close(ours.state[p][key], torchs.state[q][key])
        assert ours.state[p]["step"].device == p.device
        assert ours.state[p]["step"].item() == torchs.state[q]["step"].item()
    for t, u in zip(teachers, their_teachers, strict=True):
        close(t, u)


def lists(device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict:
    """Arguments of adamw_ema_step_ in the middle of a run, gradients scaled by 8."""
    g = torch.Generator().manual_seed(seed)
    shapes = [s for group in SHAPES for s in group]
    random = [[torch.randn(s, generator=g).to(device, dtype) for s in shapes] for _ in range(5)]
    groups = [AdamWGroup(0.01, 0.3)] * 3 + [AdamWGroup(0.02, 0.0, (0.8, 0.99), 1e-6)] * 3
    return dict(
        params=random[0],
        grads=[8 * x for x in random[1]],
        exp_avgs=[0.1 * x for x in random[2]],
        exp_avg_sqs=[0.01 * x * x for x in random[3]],
        steps=[torch.full((), 4.0 + i, device=device) for i in range(6)],
        teacher=random[4],
        scalars=AdamWScalars(groups, momentum=0.9, grad_scale=8.0, max_grad_norm=3.0),
    )


def written(a: dict) -> list[Tensor]:
    return [x for key in ("params", "exp_avgs", "exp_avg_sqs", "teacher") for x in a[key]]


def test_against_the_formulas_in_float64(device: torch.device) -> None:
    mine, eager = lists(device, torch.float32), lists(device, torch.float32)
    oracle = {
        k: [x if k == "steps" else x.double() for x in v] if isinstance(v, list) else v
        for k, v in lists(device, torch.float32).items()
    }
    for i, (p, g, m, v, t) in enumerate(
        zip(*(oracle[k] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "teacher")), strict=True)
    ):
        group, n = oracle["scalars"].groups[i], 5 + i
        g = g / 8
        g = g * min(1.0, 3.0 / (g.norm().item() + 1e-6))
        b1, b2 = group.betas
        m.mul_(b1).add_((1 - b1) * g)
        v.mul_(b2).add_((1 - b2) * g * g)
        p.mul_(1 - group.lr * group.weight_decay)
        p.sub_(group.lr * (m / (1 - b1**n)) / ((v / (1 - b2**n)).sqrt() + group.eps))
        t.mul_(0.9).add_(0.1 * p)
    adamw_ema_step_(**mine)
    with backend("reference"):
        adamw_ema_step_(**eager)
    assert [x.item() for x in mine["steps"]] == [5 + i for i in range(6)]
    for x, base, truth in zip(written(mine), written(eager), written(oracle), strict=True):
        errors = [(y.double() - truth).abs().max().item() for y in (x, base)]
        assert errors[0] <= 2 * errors[1] + 1.2e-7 * truth.abs().max().item()


def test_numbers_may_be_tensors(device: torch.device) -> None:
    plain, tensors = lists(device, torch.float32), lists(device, torch.float32)
    scalar = lambda x: torch.tensor(x, device=device)  # noqa: E731
    first, second = AdamWGroup(scalar(0.01), scalar(0.3)), AdamWGroup(scalar(0.02), 0.0, (0.8, 0.99), 1e-6)
    tensors["scalars"] = AdamWScalars(
        [first] * 3 + [second] * 3, scalar(0.9), scalar(8.0), 3.0, scalar(False)
    )
    adamw_ema_step_(**plain)
    adamw_ema_step_(**tensors)
    for x, y in zip(written(plain), written(tensors), strict=True):
        close(x, y)
    before = [x.clone() for x in written(tensors) + tensors["steps"]]
    tensors["scalars"] = tensors["scalars"]._replace(skip=scalar(True))
    result = adamw_ema_step_(**tensors)
    assert not result.found_inf
    assert all(map(torch.equal, before, written(tensors) + tensors["steps"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [AdamWEMA, LARS, LAMB])
def test_every_number_of_a_step_may_be_a_tensor(device: torch.device, cls: type, dtype: torch.dtype) -> None:
    scalar = lambda x: torch.tensor(x, device=device, dtype=dtype)  # noqa: E731
    results = []
    for wrap in (float, scalar):
        params = parameters(device)
        odd = torch.nn.Parameter(torch.ones(4, 6, device=device)[:, ::2])  # outside the kernels
        params[0].append(odd)
        teachers = [torch.zeros_like(p) for p in flat(params)]
        optimizer = cls(groups_of(params), teacher_params=teachers, lr=wrap(0.1), max_grad_norm=3.0)
        for group in optimizer.param_groups:
            group["weight_decay"] = wrap(group["weight_decay"])
        for step in range(3):
            set_grads(flat(params), step, scale=8.0)
            result = optimizer.step(momentum=wrap(0.75), grad_scale=wrap(8.0), skip=wrap(step == 1))
            assert not result.found_inf
        results.append([*flat(params), *teachers])
    for x, y in zip(*results, strict=True):
        close(x.detach(), y.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_of_the_caller_clip_and_refuse(device: torch.device, dtype: torch.dtype) -> None:
    """As on one rank of a sharded model: the tensors here are parts, one of them has no elements."""
    mine, theirs = parameters(device), parameters(device)
    for params in (mine, theirs):
        params[1].append(torch.nn.Parameter(torch.zeros(0, 3, device=device)))
        params[1].append(torch.nn.Parameter(torch.ones(4, 6, device=device).double()[:, ::2]))
    teachers = [torch.zeros_like(p) for p in flat(mine)]
    average = torch.zeros(3, device=device)
    optimizer = AdamWEMA(
        groups_of(mine), teachers, lr=0.1, max_grad_norm=3.0, extra_ema=[(torch.ones_like(average), average)]
    )
    torchs = torch.optim.AdamW(groups_of(theirs), lr=0.1)
    norms = torch.tensor([0.5, 12.0, 0.0, 100.0, 3.0, 7.0, 4.0, 5.0], dtype=dtype, device=device)
    for step in range(2):
        set_grads(flat(mine), step, scale=8.0)
        set_grads(flat(theirs), step)
        for p, norm in zip(flat(theirs), norms.tolist(), strict=True):
            assert p.grad is not None
            p.grad.mul_(min(1.0, 3.0 / (norm + 1e-6)))
        result = optimizer.step(momentum=0.5, grad_scale=8.0, norms=norms)
        torchs.step()
        assert not result.found_inf
        torch.testing.assert_close(result.grad_norms, norms.float(), rtol=1e-6, atol=0)
    for p, q in zip(flat(mine), flat(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(average, torch.full_like(average, 0.75))
    before = [x.detach().clone() for x in (*flat(mine), *teachers, average)]
    for i in (6, 7, 1):  # no elements here, outside the kernels, in them
        bad = norms.clone()
        bad[i] = float("nan") if i == 7 else float("inf")
        result = optimizer.step(momentum=0.5, norms=bad)
        assert result.found_inf and result.found_inf.device == teachers[0].device
        assert result.grad_norms.isfinite().tolist() == [j != i for j in range(8)]
        assert all(map(torch.equal, before, (*flat(mine), *teachers, average)))
    result = optimizer.step(momentum=0.5, norms=norms, skip=True)
    assert not result.found_inf and all(map(torch.equal, before, (*flat(mine), *teachers, average)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_the_rounded_values(device: torch.device, dtype: torch.dtype) -> None:
    params = parameters(device)
    teachers = [p.detach().clone() for p in flat(parameters(device, seed=1))]
    teachers[4].fill_(float("nan"))
    copies = [torch.zeros_like(p, dtype=dtype) for p in flat(params)]
    teacher_copies: list[Tensor | None] = [torch.zeros_like(p, dtype=dtype) for p in flat(params)]
    copies[0] = torch.zeros_like(copies[0], dtype=torch.float16)  # one of another type
    teacher_copies[3] = None
    optimizer = AdamWEMA(
        groups_of(params), teachers, lr=0.1, low_precision_params=copies, low_precision_teacher=teacher_copies
    )

    def check() -> None:
        for x, y in (*zip(flat(params), copies, strict=True), *zip(teachers, teacher_copies, strict=True)):
            if y is not None:
                torch.testing.assert_close(y, x.detach().to(y.dtype), rtol=0, atol=0, equal_nan=True)

    check()
    for step in range(2):
        set_grads(flat(params), step, missing=(2,))
        optimizer.step(momentum=0.9)
        check()
    before = [x.clone() for x in (*copies, *(x for x in teacher_copies if x is not None))]
    with torch.no_grad():
        for p in flat(params):
            p.add_(1)
    flat(params)[0].grad.view(-1)[0] = float("inf")
    assert optimizer.step(momentum=0.9).found_inf
    for x, y in zip((*copies, *(x for x in teacher_copies if x is not None)), before, strict=True):
        assert torch.equal(x.view(torch.int16), y.view(torch.int16))


def test_the_backends_agree(library: object) -> None:
    results = []
    for name in ("cpu", "reference"):
        params = parameters(CPU)
        teachers = [torch.zeros_like(p) for p in flat(params)]
        optimizer = AdamWEMA(groups_of(params), teachers, lr=0.01, max_grad_norm=3.0)
        with backend(name):
            for step in range(3):
                set_grads(flat(params), step)
                optimizer.step(momentum=0.5)
        results.append([*flat(params), *teachers])
    for a, b in zip(*results, strict=True):
        close(a.detach(), b.detach())


def test_missing_gradients_leave_the_state_but_not_the_teacher(device: torch.device) -> None:
    params = parameters(device)
    before = [p.detach().clone() for p in flat(params)]
    teachers: list[Tensor | None] = [torch.zeros_like(p) for p in flat(params)]
    teachers[4] = None
    frozen, frozen_teacher = torch.ones(7, device=device), torch.zeros(7, device=device)
    half, half_teacher = torch.ones(7, device=device).bfloat16(), torch.zeros(7, device=device)
    extra = [(frozen, frozen_teacher), (half, half_teacher)]
    optimizer = AdamWEMA(groups_of(params), teachers, lr=0.1, extra_ema=extra)
    set_grads(flat(params), 0, missing=(1,))
    result = optimizer.step(momentum=0.75)
    p, t = flat(params)[1], teachers[1]
    assert torch.equal(p, before[1]) and p not in optimizer.state and t is not None
    torch.testing.assert_close(t, 0.25 * p.detach(), rtol=1e-6, atol=0)
    for x in (frozen_teacher, half_teacher):
        torch.testing.assert_close(x, torch.full_like(x, 0.25))
    assert len(result.grad_norms) == 6 and result.grad_norms[1] == 0 and result.grad_norms[0] > 0
    assert not torch.equal(flat(params)[4], before[4])


@pytest.mark.parametrize(
    "bad,where", [(float("nan"), (0, 0)), (float("inf"), (1, 8400)), (-float("inf"), (5, 0))]
)
def test_a_bad_gradient_changes_no_byte(device: torch.device, bad: float, where: tuple[int, int]) -> None:
    params = parameters(device)
    teachers = [p.detach().clone() for p in flat(parameters(device, seed=1))]
    optimizer = AdamWEMA(groups_of(params), teachers, lr=0.1, weight_decay=0.1, max_grad_norm=3.0)
    for step, spoil in ((0, False), (1, True), (2, False)):
        set_grads(flat(params), step)
        if spoil:
            flat(params)[where[0]].grad.view(-1)[where[1]] = bad
            before = [x.detach().clone() for x in (*flat(params), *teachers)]
            state = copy.deepcopy(optimizer.state_dict())
        result = optimizer.step(momentum=0.5)
        assert result.found_inf.dtype == torch.bool and result.found_inf.device == teachers[0].device
        assert bool(result.found_inf) is spoil
        assert result.grad_norms.isfinite().all().item() is not spoil
        if spoil:
            for a, b in zip((*flat(params), *teachers), before, strict=True):
                assert torch.equal(a, b)
            after = optimizer.state_dict()
            for i in state["state"]:
                assert all(torch.equal(state["state"][i][k], after["state"][i][k]) for k in state["state"][i])


def test_skip_measures_and_changes_nothing(device: torch.device) -> None:
    params = parameters(device)
    before = [p.detach().clone() for p in flat(params)]
    teachers = [torch.zeros_like(p) for p in flat(params)]
    optimizer = AdamWEMA(groups_of(params), teachers, lr=0.1)
    for skip in (True, torch.tensor(True, device=device)):
        set_grads(flat(params), 0)
        result = optimizer.step(momentum=0.5, skip=skip)
        assert not result.found_inf and (result.grad_norms > 0).all()
        for state in optimizer.state.values():  # a state of zeros means the same as none
            assert not any(x.any() for x in state.values())
        assert all(torch.equal(a, b) for a, b in zip(flat(params), before, strict=True))
        assert not any(t.any() for t in teachers)


def test_state_dict_goes_both_ways(device: torch.device) -> None:
    start, continued = parameters(device), parameters(device)
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


def test_autograd_sees_that_parameters_changed(device: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    AdamWEMA([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_amsgrad_state_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="group 0 has amsgrad=True"):
        AdamWEMA([p]).load_state_dict(torch.optim.AdamW([p], amsgrad=True).state_dict())


def test_bitwise_the_same_for_any_number_of_threads(library: object, threads: None) -> None:
    results = []
    for n in (1, 2, 3, 1):
        torch.set_num_threads(n)
        params = parameters(CPU)
        teachers = [torch.zeros_like(p) for p in flat(params)]
        optimizer = AdamWEMA(groups_of(params), teachers, lr=0.01, max_grad_norm=3.0)
        for step in range(3):
            set_grads(flat(params), step)
            norms = optimizer.step(momentum=0.9).grad_norms
        results.append([*flat(params), *teachers, norms])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_layouts_and_dtypes_the_kernels_do_not_take(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(4, 3, 5, 5, generator=g)
    cases = {
        "channels last": image.clone(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 4, generator=g).T,
        "every second": torch.randn(6, 8, generator=g)[:, ::2],
        "float64": torch.randn(6, 4, generator=g, dtype=torch.float64),
        "bfloat16": torch.randn(6, 4, generator=g).bfloat16(),
        "empty": torch.zeros(0, 3),
    }
    values = [x.to(device) for x in cases.values()]
    assert values[0].stride() == image.to(memory_format=torch.channels_last).stride()
    mine, theirs = ([torch.nn.Parameter(x.clone()) for x in values] for _ in range(2))
    mine[2] = torch.nn.Parameter(values[2].repeat_interleave(2, 1)[:, ::2])
    teachers = [torch.zeros_like(p) for p in mine]
    ours = AdamWEMA(mine, teachers, lr=0.1, max_grad_norm=2.0)
    torchs = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0)
    contiguous = torch.contiguous_format
    for step in range(2):
        g = torch.Generator().manual_seed(step)
        for p, q in zip(mine, theirs, strict=True):
            q.grad = torch.randn(p.shape, generator=g).to(p)
            # laid out as the parameter only in the second step
            p.grad = torch.empty_like(p).copy_(q.grad) if step else q.grad.clone(memory_format=contiguous)
            q.grad.mul_(min(1.0, 2.0 / (q.grad.double().norm().item() + 1e-6)))
        result = ours.step(momentum=0.0)
        torchs.step()
        norms = torch.stack([p.grad.double().norm() for p in mine]).float()
        torch.testing.assert_close(result.grad_norms, norms, rtol=1e-6, atol=0)
    for name, p, q, t in zip(cases, mine, theirs, teachers, strict=True):
        tolerance = 0.02 if p.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(p, q, rtol=tolerance, atol=1e-7, msg=name)
        torch.testing.assert_close(t, p.detach(), rtol=0, atol=0, msg=name)
    before = [x.detach().clone() for x in (*mine, *teachers)]
    assert mine[3].grad is not None
    mine[3].grad[0, 0] = float("nan")  # of a tensor outside the kernels: those inside stop as well
    result = ours.step(momentum=0.5)
    assert result.found_inf and result.grad_norms.isnan().sum() == 1
    assert all(map(torch.equal, before, (*mine, *teachers)))


def step_with(**changes) -> None:
    p = torch.ones(2, 3)
    lists = dict(grads=[p], exp_avgs=[p], exp_avg_sqs=[p], steps=[torch.zeros(())], teacher=[None])
    scalars = AdamWScalars([AdamWGroup(0.1)])
    adamw_ema_step_([p.clone()], **{**lists, **changes}, scalars=scalars)


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
    (lambda: AdamWEMA([P]).step(momentum=torch.ones(2)), r"momentum: .* 0-dim tensor, got shape \[2\]"),
    (lambda: AdamWEMA([P], [torch.ones(2, 3)]).step(), "momentum: .* got None"),
    (
        lambda: AdamWEMA([P], low_precision_params=[torch.ones(3, 2).bfloat16()]),
        r"low_precision_params\[0\]: expected shape \[2, 3\]",
    ),
    (
        lambda: AdamWEMA([P], low_precision_teacher=[torch.ones(2, 3).bfloat16()]),
        r"low_precision_teacher\[0\]: expected None",
    ),
    (
        lambda: AdamWEMA([P]).step(norms=torch.ones(2)),
        r"norms: expected shape \[1\] on cpu, got \[2\] on cpu",
    ),
    (lambda: LARS([P]).step(norms=torch.ones(1)), "norms: expected None, as LARS also needs"),
    (lambda: LAMB([P]).step(norms=torch.ones(1)), "norms: expected None, as LAMB also needs"),
    (lambda: step_with(grads=[]), "grads: expected 1 entries, as many as params, got 0"),
    (lambda: step_with(grads=[torch.ones(3, 2)]), r"grads\[0\]: expected \[2, 3\] on cpu, got \[3, 2\]"),
    (lambda: step_with(exp_avgs=[None]), r"steps\[0\]: expected moments and a count"),
    (lambda: step_with(steps=[torch.zeros((), dtype=torch.int64)]), r"steps\[0\]: expected a 0-dim float32"),
    (lambda: AdamWEMA([P]).add_param_group({"params": [torch.ones(1)]}), "add_param_group: groups are fixed"),
]


@pytest.mark.parametrize("call,message", BAD, ids=[message for _, message in BAD])
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
