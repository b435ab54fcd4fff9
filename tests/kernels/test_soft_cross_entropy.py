"""Cross-entropy with given targets, by every backend, against float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from fastdino_kernels import backend
from fastdino_kernels.soft_cross_entropy import _backward, _forward, soft_cross_entropy
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "triton":
        yield request.getfixturevalue("triton_device")
    else:
        yield torch.device("cpu")


def problem(rows: int, k: int, dtype: torch.dtype = torch.float32, scale: float = 1.0):
    g = torch.Generator().manual_seed(rows * k)
    x = (scale * torch.randn(rows, k, generator=g)).to(dtype)
    return x, (4 * torch.randn(rows, k, generator=g)).softmax(-1) * 1.5


def by_definition(x: Tensor, t: Tensor, temp: float) -> Tensor:
    return -(t * (x / temp).log_softmax(-1)).sum(-1)


def losses_and_grad(function, x: Tensor, t: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    losses = function(x, t, temp)
    (losses * torch.arange(1, 1 + len(x), device=x.device)).sum().backward()
    assert x.grad is not None
    return losses.detach(), x.grad


def ours(x: Tensor, t: Tensor, temp: float) -> Tensor:
    return soft_cross_entropy(x, t, temp=temp)


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double().cpu() - oracle).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,k", [(3, 65), (1, 1), (2, 5001), (5, 2048)])
def test_against_float64(device: torch.device, poisoned: None, rows: int, k: int, dtype: torch.dtype) -> None:
    x, t = problem(rows, k, dtype)
    got = losses_and_grad(ours, x.to(device), t.to(device), 0.1)
    oracle = losses_and_grad(by_definition, x.double(), t.double(), 0.1)
    eager = losses_and_grad(lambda x, t, temp: by_definition(x.float(), t, temp), x, t, 0.1)
    for value, base, truth, eps in zip(got, eager, oracle, (1.2e-7, torch.finfo(dtype).eps), strict=True):
        assert error(value, truth) <= 2 * error(base, truth) + eps * truth.abs().max().item()
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype


@pytest.mark.parametrize("scale,temp", [(1e4, 0.1), (1e4, 0.01), (30.0, 0.01), (1e-3, 1.0)])
def test_extreme_logits_and_temperatures(device: torch.device, scale: float, temp: float) -> None:
    x, t = problem(3, 4100, scale=scale)
    got = losses_and_grad(ours, x.to(device), t.to(device), temp)
    oracle = losses_and_grad(by_definition, x.double(), t.double(), temp)
    for value, truth in zip(got, oracle, strict=True):
        assert error(value, truth) <= 4e-6 * truth.abs().max().item()


def test_excluded_prototypes_and_nan(device: torch.device) -> None:
    x, t = problem(4, 4100)
    x[0, 7], t[0, 7] = -torch.inf, 0  # excluded and not wanted: nothing
    x[1, :2048], t[1, :2048] = -torch.inf, 0  # so for a whole block
    x[2, 9] = -torch.inf  # excluded but wanted
    x[3, 4000] = torch.nan
    losses, grad = (y.cpu() for y in losses_and_grad(ours, x.to(device), t.to(device), 0.1))
    for row, kept in ((0, x[0] > -torch.inf), (1, x[1] > -torch.inf)):
        truth = losses_and_grad(
            by_definition, x[row : row + 1, kept].double(), t[row : row + 1, kept].double(), 0.1
        )
        torch.testing.assert_close(losses[row].double(), truth[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(grad[row, kept].double(), (row + 1) * truth[1][0], rtol=1e-4, atol=1e-7)
        assert (grad[row, ~kept] == 0).all()
    assert losses[2] == torch.inf and losses[3].isnan()


def test_strided_and_mixed_inputs(device: torch.device) -> None:
    x, t = (y.to(device) for y in problem(3, 300))
    expected = losses_and_grad(ours, x, t, 0.1)
    for wide, target in ((x.T.contiguous().T, t), (torch.stack([x, x], -1)[..., 0], t.T.contiguous().T)):
        got = losses_and_grad(ours, wide, target, 0.1)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    mixed = losses_and_grad(ours, x, t.bfloat16(), torch.tensor(0.1))
    same = losses_and_grad(ours, x, t.bfloat16().float(), 0.1)
    assert torch.equal(mixed[0], same[0]) and torch.equal(mixed[1], same[1])
    shared = losses_and_grad(ours, x, t[:1].expand(3, -1), 0.1)
    assert torch.equal(shared[0][0], expected[0][0])


def test_backward_repeats_and_takes_expanded_gradients(device: torch.device) -> None:
    x, t = (y.to(device) for y in problem(3, 300))
    leaf = x.clone().requires_grad_()
    losses = ours(leaf, t, 0.1)
    losses.sum().backward(retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    losses.sum().backward()
    assert torch.equal(leaf.grad, 2 * once)
    with torch.no_grad():
        assert not ours(leaf, t, 0.1).requires_grad


def test_bitwise_the_same_again(device: torch.device) -> None:
    x, t = (y.to(device) for y in problem(3, 4100))
    first, second = (losses_and_grad(ours, x, t, 0.1) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_no_rows(device: torch.device) -> None:
    x = torch.empty(0, 5, device=device, requires_grad=True)
    losses = ours(x, torch.empty(0, 5, device=device), 0.1)
    losses.sum().backward()
    assert losses.shape == (0,) and x.grad is not None and x.grad.shape == (0, 5)


def test_operators_are_well_formed(triton_device: torch.device) -> None:
    gpu = importlib.import_module("fastdino_kernels.gpu.soft_cross_entropy")
    for forward, backward, device in (
        (_forward, _backward, torch.device("cpu")),
        (gpu._forward, gpu._backward, triton_device),
    ):
        x, t = (y.to(device) for y in problem(3, 40))
        temp = torch.tensor(0.1, device=device)
        torch.library.opcheck(forward, (x.requires_grad_(), t, temp))
        stats = forward(x, t, temp)[1]
        torch.library.opcheck(backward, (torch.ones(3, device=device), x.detach(), t, temp, stats.detach()))


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    x, t = (y.to(device) for y in problem(3, 300))
    temp = torch.tensor(0.1)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, expected = losses_and_grad(compiled, x, t, temp), losses_and_grad(ours, x, t, temp)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_64_bit_addresses(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = importlib.import_module("fastdino_kernels.gpu.soft_cross_entropy")
    x, t = (y.to(triton_device) for y in problem(3, 300))
    expected = losses_and_grad(ours, x, t, 0.1)
    monkeypatch.setattr(gpu, "needs_int64", lambda *tensors: True)
    got = losses_and_grad(ours, x, t, 0.1)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_rows_are_split_where_they_are_few(triton_device: torch.device) -> None:
    parts = importlib.import_module("fastdino_kernels.gpu.soft_cross_entropy")._parts
    for rows in (1, 7, 64, 512, 5000):
        for k in (1, 2048, 5001, 65536, 262144):
            programs, blocks = parts(rows, k)
            assert (programs - 1) * blocks * 2048 < k <= programs * blocks * 2048 and programs <= 32
    assert parts(1, 65536) == (32, 1) and parts(5000, 65536)[0] == 1


def test_float64_takes_the_reference() -> None:
    x, t = (y.double() for y in problem(3, 6))
    t[0, 2] = 0
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, t, temp=0.5), (x.requires_grad_(),))
    with backend("reference"):
        y = x.detach().float()
        torch.testing.assert_close(
            soft_cross_entropy(y, t.float(), temp=0.5), by_definition(y, t.float(), 0.5)
        )


BAD = [
    (dict(logits=[1.0]), TypeError, "logits: expected a tensor"),
    (dict(logits=torch.zeros(8)), ValueError, r"logits: expected shape \[R, K\]"),
    (dict(target=torch.zeros(3, 5)), ValueError, r"target: expected shape \[3, 4\], got \[3, 5\]"),
    (dict(target=torch.zeros(3, 4, requires_grad=True)), ValueError, "target: .* must not require grad"),
    (dict(temp=0.0), ValueError, "temp: expected a temperature > 0"),
]


@pytest.mark.parametrize("change,kind,message", BAD, ids=[message for _, _, message in BAD])
def test_errors_name_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    arguments = dict(logits=torch.zeros(3, 4), target=torch.zeros(3, 4), temp=0.1)
    with pytest.raises(kind, match=message):
        soft_cross_entropy(**{**arguments, **change})
