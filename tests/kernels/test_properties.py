"""Random shapes, dtypes, temperatures and pairings: every fused operation against its float64 oracle."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import AdamWEMA, backend, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TEMPS = st.sampled_from([0.02, 0.04, 0.1, 0.5, 2.0])
SEEDS = st.integers(0, 2**16)


def examples(count: int) -> Any:
    """The same examples in every run."""
    health = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=health
    )


@pytest.fixture(params=["cpu", "triton"])
def kind(request: pytest.FixtureRequest, library: object) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@contextmanager
def device_of(kind: str) -> Iterator[torch.device]:
    with backend(kind):
        yield DEVICE if kind == "triton" else torch.device("cpu")


def operation(name: str) -> Callable[..., Any]:
    modules = dict(matched_loss="matched_loss", sinkhorn_knopp="sinkhorn")
    return getattr(importlib.import_module(f"fastdino_kernels.{modules.get(name, name)}"), name)


def results(function: Callable[..., Any], leaves: Sequence[Tensor], rest: Sequence[Any], **options: Any):
    """Result and, where it has one, the gradients of ``leaves``."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, *rest, **options)
    value = out[0] if isinstance(out, tuple) else out
    if not value.requires_grad:
        return [value]
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(value.shape, generator=generator).to(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, direction)]


def check(
    name: str, kind: str, leaves: Sequence[Tensor], rest: Sequence[Any], scale: float = 1e-3, **options: Any
) -> None:
    """At most twice the error of eager code in the same dtype, plus a few ulp of the largest value.

    ``scale``: of the terms that may cancel to something smaller.
    """

    def changed(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
        return change(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    oracle_of = getattr(reference, name)
    double = [[changed(x, torch.Tensor.double) for x in part] for part in (leaves, rest)]
    oracle = results(oracle_of, *double, **options)
    eager = results(oracle_of, leaves, rest, **options)
    with device_of(kind) as device:
        there = [[x.to(device) if isinstance(x, Tensor) else x for x in part] for part in (leaves, rest)]
        found = results(operation(name), *there, **options)
    eps = torch.finfo(leaves[0].dtype).eps
    for i, (value, base, truth) in enumerate(zip(found, eager, oracle, strict=True)):
        assert value.shape == truth.shape and value.isfinite().all()
        error = (value.cpu().double() - truth).abs().max().item()
        rounding = max(eps, 16 * torch.finfo(torch.float32).eps) * max(truth.abs().max().item(), scale)
        allowed = 2 * (base.double() - truth).abs().max().item() + rounding
        assert error <= allowed, f"{name}, result {i}: error {error:.3e}, allowed {allowed:.3e}"


def unit(rows: int, d: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, d, generator=generator), dim=1).to(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


VIEWS = st.tuples(st.integers(2, 6), st.integers(1, 3), st.integers(1, 4)).filter(lambda s: s[0] >= s[1])


@examples(25)
@given(views=VIEWS, k=st.integers(1, 1300), dtype=DTYPES, s=TEMPS, u=TEMPS, seed=SEEDS)
def test_dino_loss(kind: str, views: tuple[int, int, int], k: int, dtype, s: float, u: float, seed: int):
    (v, g, b), r = views, seeded(seed)
    student, teacher = (torch.randn(n * b, k, generator=r).to(dtype) for n in (v, g))
    center = 0.3 * torch.randn(k, generator=r)
    check(
        "dino_loss", kind, [student], [teacher, center], student_temp=s, teacher_temp=u, n_global=g
    )  # fmt: skip


@examples(15)
@given(views=VIEWS, k=st.integers(1, 700), d=st.integers(1, 70), s=TEMPS, u=TEMPS, seed=SEEDS)
def test_prototype_loss(
    kind: str, views: tuple[int, int, int], k: int, d: int, s: float, u: float, seed: int
):
    (v, g, b), r, dtype = views, seeded(seed), torch.float32
    z, w, y, other = (unit(n, d, r, dtype) for n in (v * b, k, g * b, k))
    center = 0.3 * torch.randn(k, generator=r)
    check(
        "prototype_loss", kind, [z, w], [y, other, center], 2 / s, student_temp=s, teacher_temp=u, n_global=g
    )  # fmt: skip


@examples(15)
@given(
    rows=st.integers(1, 9), teachers=st.integers(1, 7), g=st.integers(1, 3), k=st.integers(1, 1100),
    d=st.integers(1, 33), weighted=st.booleans(), s=TEMPS, u=TEMPS, seed=SEEDS,
)  # fmt: skip
def test_matched_loss(kind, rows, teachers, g, k, d, weighted, s, u, seed) -> None:
    r = seeded(seed)
    z, w, y, other = (unit(n, d, r, torch.float32) for n in (rows, k, teachers, k))
    match = torch.randint(-1, teachers, (rows, g), generator=r)
    weight = torch.rand(rows, generator=r) if weighted else None
    rest = [y, other, 0.3 * torch.randn(k, generator=r), match]

    def called(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            *tensors, row_weight = args
            return function(*tensors, row_weight=row_weight, **options)

        return call

    ours, oracle = operation("matched_loss"), reference.matched_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("fastdino_kernels.matched_loss"), "matched_loss", called(ours))
        patch.setattr(reference, "matched_loss", called(oracle))
        check("matched_loss", kind, [z, w], [*rest, weight], 2 * g / s, student_temp=s, teacher_temp=u)


@examples(20)
@given(rows=st.integers(1, 9), k=st.integers(1, 1500), dtype=DTYPES, temp=TEMPS, seed=SEEDS)
def test_soft_cross_entropy(kind: str, rows: int, k: int, dtype, temp: float, seed: int) -> None:
    r = seeded(seed)
    logits = torch.randn(rows, k, generator=r).to(dtype)
    target = torch.randn(rows, k, generator=r).softmax(1)
    check("soft_cross_entropy", kind, [logits], [target], temp=temp)


@examples(10)
@given(rows=st.integers(1, 9), k=st.integers(1, 900), n=st.integers(1, 4), seed=SEEDS)
def test_sinkhorn_knopp(kind: str, rows: int, k: int, n: int, seed: int) -> None:
    k = k if kind == "cpu" else 1 + k % 120  # its interpreted kernels take a second per thousand prototypes
    logits = torch.randn(rows, k, generator=seeded(seed))
    check("sinkhorn_knopp", kind, [logits], [], temp=0.25, n_iters=n)


@examples(15)
@given(rows=st.integers(1, 9), d=st.integers(1, 40), q=st.integers(1, 900), temp=TEMPS, seed=SEEDS)
def test_info_nce(kind: str, rows: int, d: int, q: int, temp: float, seed: int) -> None:
    r = seeded(seed)
    query, key = unit(rows, d, r, torch.float32), unit(rows, d, r, torch.float32)
    check("info_nce", kind, [query], [key, unit(q, d, r, torch.float32).T.contiguous()], temp=temp)


@examples(20)
@given(k=st.integers(1, 200), d=st.integers(1, 300), seed=SEEDS)
def test_normalize_weight(kind: str, k: int, d: int, seed: int) -> None:
    r = seeded(seed)
    gains, lengths = torch.rand(2, k, 1, generator=r) + 0.5
    check("normalize_weight", kind, [lengths * unit(k, d, r, torch.float32), gains], [], scale=5.0)


SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=5)


@examples(20)
@given(
    shapes=SHAPES, clip=st.sampled_from([0.0, 0.3, 3.0]), momentum=st.floats(0, 1), lr=st.floats(1e-5, 1e-1),
    missing=st.integers(0, 4), steps=st.integers(1, 3), seed=SEEDS,
)  # fmt: skip
def test_adamw_ema(kind, shapes, clip, momentum, lr, missing, steps, seed) -> None:
    """Against torch.optim.AdamW, the official clipping and a loop for the teacher, all in float64."""
    r = seeded(seed)
    start = [torch.randn(shape, generator=r) for shape in shapes]
    teachers = [torch.randn(shape, generator=r) for shape in shapes]
    expected = [x.double().requires_grad_() for x in start]
    slow = [x.double() for x in teachers]
    oracle = torch.optim.AdamW(expected, lr=lr, weight_decay=0.1)
    with device_of(kind) as device:
        params = [x.to(device).requires_grad_() for x in start]
        fast = [x.to(device) for x in teachers]
        ours = AdamWEMA(params, fast, lr=lr, weight_decay=0.1, max_grad_norm=clip)
        for _ in range(steps):
            for i, (p, e) in enumerate(zip(params, expected, strict=True)):
                grad = None if i == missing else torch.randn(shapes[i], generator=r)
                p.grad = None if grad is None else grad.to(device)
                e.grad = None if grad is None else grad.double()
                if e.grad is not None and clip:
                    e.grad *= reference.clip_coefficient(e.grad.norm().item(), clip)
            assert not ours.step(momentum=momentum).found_inf
            oracle.step()
            for t, e in zip(slow, expected, strict=True):
                t.mul_(momentum).add_(e.detach(), alpha=1 - momentum)
    for found, truth in ((params, expected), (fast, slow)):
        for x, y in zip(found, truth, strict=True):
            torch.testing.assert_close(x.detach().cpu().double(), y.detach(), rtol=2e-5, atol=2e-6)
