"""Losses, softmaxes and the weight norm of fastdino_kernels on seeded problems, against their oracles."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastdino_kernels import (
    RegionMatch,
    centered_softmax,
    csrc,
    dino_loss,
    info_nce,
    normalize_weight,
    patch_loss,
    prototype_loss,
    reference,
    region_loss,
    sinkhorn_center,
    sinkhorn_knopp,
    soft_cross_entropy,
    softmax_over_batch,
)
from torch import Tensor

from reliability.fuzz import DTYPES, STEP, Fuzz, Problem, check
from reliability.promises import cases_of, promise


def make_dino_loss(r: Fuzz) -> Problem:
    (v, g, b), k, exact = r.views(), r.width(), r.kind == "integer"
    dtype = torch.float32 if exact and k > 150 else r.choice(DTYPES)
    rows = r.spread if exact else r.normal
    student, teacher = (r.laid_out(rows(n * b, k, dtype=dtype)) for n in (v, g))
    center = torch.zeros(k) if exact else r.laid_out(0.3 * r.normal(k))
    s, u = r.temps()
    options = dict(student_temp=s, teacher_temp=u, n_global=g)
    return Problem(dino_loss, reference.dino_loss, [student], [teacher, center], options, r.kind)


def prototypes(r: Fuzz, rows: int, teachers: int) -> tuple[list[Tensor], list[Tensor]]:
    """z and W, then y, W' and the center; exact: each row of z picks a column of W."""
    k, d = r.width(), r.size(1, 33)
    if r.kind == "integer":
        z, y = (torch.eye(d)[[r.randrange(d) for _ in range(n)]] for n in (rows, teachers))
        w, other = (r.spread(d, k).T.contiguous() for _ in range(2))
        return [z, w], [y, other, torch.zeros(k)]
    dtype = torch.float32 if r.small else r.choice((torch.float32, torch.float32, torch.bfloat16))
    z, w, y, other = (r.laid_out(r.unit(n, d, dtype=dtype)) for n in (rows, k, teachers, k))
    return [z, w], [y, other, r.laid_out(0.3 * r.normal(k))]


def make_prototype_loss(r: Fuzz) -> Problem:
    v, g, b = r.views()
    leaves, rest = prototypes(r, v * b, g * b)
    s, u = r.temps()
    options = dict(student_temp=s, teacher_temp=u, n_global=g)
    return Problem(
        prototype_loss, reference.prototype_loss, leaves, rest, options, r.kind, scale=3 / s, products=True
    )


def make_matched_loss(r: Fuzz) -> Problem:
    """region_loss with any match, or patch_loss, where it is the identity."""
    identity, exact = r.random() < 0.3, r.kind == "integer"
    powers = (1, 2, 4, 8)  # for the mean over the teacher's rows
    rows, targets = r.choice(powers) if exact and identity else r.size(1, 20), r.randint(1, 3)
    teachers = rows if identity else r.choice(powers) if exact else r.size(1, 9)
    leaves, rest = prototypes(r, rows, teachers)
    s, u = r.temps()
    weight = torch.tensor([r.choice((0.25, 0.5, 1.0)) for _ in range(rows)])
    options = dict(student_temp=s, teacher_temp=u)
    if identity:
        match = torch.arange(rows)[:, None]
    else:
        match = torch.tensor([[r.randint(-1, teachers - 1) for _ in range(targets)] for _ in range(rows)])

    def ours(z: Tensor, w: Tensor, *rest: Any, **options: Any) -> Any:
        *others, weight = rest
        if identity:
            return patch_loss(z, w, *others, row_weight=weight, **options)
        return region_loss(z, w, *others, RegionMatch(match, weight), **options)

    def oracle(z: Tensor, w: Tensor, *rest: Any, **options: Any) -> Any:
        *others, weight = rest
        found = reference.matched_loss(z, w, *others, match, row_weight=weight, **options)
        # The entropy of a sharp target is 0, and so is that of the oracle up to its logarithm.
        return found if not exact else found._replace(teacher_entropy=found.teacher_entropy.round())

    return Problem(ours, oracle, leaves, [*rest, weight], options, r.kind, 2 * targets / s, products=True)


def make_soft_cross_entropy(r: Fuzz) -> Problem:
    rows, k = r.size(0, 12), r.width(0 if r.kind != "integer" else 1)
    temp = r.temps()[0]
    if r.kind == "integer":
        logits, target = r.spread(rows, k), torch.zeros(rows, k)
        for row in target:
            row[[r.randrange(k) for _ in range(9)]] = float(r.randint(-3, 3))
    else:
        logits, target = r.normal(rows, k, dtype=r.choice(DTYPES)), r.normal(rows, k).softmax(1)
        target[torch.rand(rows, k, generator=r.generator) < 0.2] = 0
        logits, target = r.laid_out(logits), r.laid_out(target)
    oracle = reference.soft_cross_entropy
    options = dict(temp=temp)
    return Problem(soft_cross_entropy, oracle, [logits], [target], options, r.kind, scale=1 / temp)


def _center(logits: Tensor, *, temp: float, n_iters: int) -> Tensor:
    c = reference.sinkhorn_columns(logits, temp)
    for _ in range(n_iters - 1):
        c = reference.sinkhorn_columns(logits, temp, c)
    return temp * c.masked_fill(c == -torch.inf, 0)


def _centered(logits: Tensor, center: Tensor, *, temp: float) -> Tensor:
    return ((logits.to(center.dtype) - center) / temp).softmax(1)


def make_sinkhorn(r: Fuzz) -> Problem:
    rows, k, temp = r.size(1, 12), r.size(1, 33) if r.small else r.width(), r.temps()[1]
    logits = r.normal(rows, k, dtype=r.choice(DTYPES))
    exact = r.kind == "integer"
    if exact:  # each sample its own prototypes, equally many: balanced from the start
        k = r.choice((1, 2, 4, 8)) * rows
        own = torch.arange(k) % rows == torch.arange(rows)[:, None]
        logits = STEP * own.float()
    logits = r.laid_out(logits)
    iterated, once = dict(temp=temp, n_iters=r.randint(1, 4)), dict(temp=temp)
    ours, oracle, rest, options = r.choice((
        (sinkhorn_knopp, reference.sinkhorn_knopp, [], iterated),
        (sinkhorn_center, _center, [], iterated),
        (softmax_over_batch, lambda x, *, temp: reference.sinkhorn_knopp(x, temp=temp, n_iters=1), [], once),
        (centered_softmax, _centered, [torch.zeros(k) if exact else r.laid_out(r.normal(k))], once),
    ))  # fmt: skip
    if exact and ours is sinkhorn_center:  # logarithms of sums
        r.kind = "normal"
    spreads = ours is not centered_softmax and r.kind == "special"
    scale = max(1.0, 0.2 / temp)  # what rounding of exponents, about 5 / temp, makes of a probability
    return Problem(ours, oracle, [logits], rest, options, r.kind, scale, gradients=False, spreads=spreads)


def make_info_nce(r: Fuzz) -> Problem:
    temp = r.temps()[0]
    if r.kind == "integer":
        rows, d, q = r.choice((1, 2, 4, 8)), r.size(1, 33), r.width()
        query = torch.eye(d)[[r.randrange(d) for _ in range(rows)]]
        queue = r.spread(d, q)  # the best similarity of a query is 21 steps
        key = STEP * torch.randint(5, (rows, d), generator=r.generator) * 8.0
        return Problem(info_nce, reference.info_nce, [query], [key, queue], dict(temp=temp), r.kind)
    rows, d, q = r.size(1, 12), r.size(1, 40), r.width()
    dtype = torch.float32 if r.small else r.choice((torch.float32, torch.float32, torch.bfloat16))
    query, key = (r.laid_out(r.unit(rows, d, dtype=dtype)) for _ in range(2))
    queue = r.laid_out(r.unit(q, d, dtype=dtype).T)
    return Problem(
        info_nce, reference.info_nce, [query], [key, queue], dict(temp=temp), r.kind, products=True
    )


def make_normalize_weight(r: Fuzz) -> Problem:
    k, d = r.size(0, 70), r.size(1, 130)
    if r.kind == "integer":  # 1, 4, 16 or 64 numbers of one size: the length of a row is a power of two
        v, count = torch.zeros(k, d), r.choice([n for n in (1, 4, 16, 64) if n <= d])
        for row in v:
            row[r.sample(range(d), count)] = torch.tensor([r.choice((-2.0, 2.0)) for _ in range(count)])
        gains = torch.randint(-4, 5, (k, 1), generator=r.generator).float()
    else:
        v, gains = r.normal(k, d), r.laid_out(r.normal(k, 1))
        if r.small:  # Triton's form squares numbers as they are
            v[(v.abs() < 1e-15).all(1)] = 1.0
        v = r.laid_out(v)
    gradients = 4 * gains.double() / torch.linalg.vector_norm(v.double(), dim=1, keepdim=True)
    scale = max([1.0, *gradients[gradients.isfinite()].abs().tolist()])  # dv is a difference of such numbers
    return Problem(normalize_weight, reference.normalize_weight, [v, gains], [], {}, r.kind, scale)


MAKERS: dict[str, Callable[[Fuzz], Problem]] = {
    "dino_loss": make_dino_loss,
    "prototype_loss": make_prototype_loss,
    "matched_loss": make_matched_loss,
    "soft_cross_entropy": make_soft_cross_entropy,
    "sinkhorn": make_sinkhorn,
    "info_nce": make_info_nce,
    "normalize_weight": make_normalize_weight,
}


def try_seeds(name: str, backend: str, count: int, small: bool) -> None:
    with promise(33, f"{name}, {backend}: seeded problems against the oracle") as cases:
        for seed in range(count):
            problem = None
            with cases.case(f"{name} seed={seed} small={small}"):
                problem = MAKERS[name](Fuzz(seed, small=small))
                try:
                    check(problem, backend)
                except Exception as error:
                    raise AssertionError(f"{error} {problem.shape()}") from error


@pytest.mark.parametrize("name", MAKERS)
def test_cpu_kernels(name: str) -> None:
    if not csrc.PATH.exists() or csrc.library() is None:
        pytest.skip("the C++ kernels are not built (make build)")
    try_seeds(name, "cpu", cases_of(ci=300, nightly=10_000), small=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of NaN and infinities
@pytest.mark.parametrize("name", MAKERS)
def test_triton_kernels(name: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("interpreted on the CPU; a GPU has the tests of tests/kernels")
    try_seeds(name, "triton", cases_of(ci=3, nightly=300), small=True)
