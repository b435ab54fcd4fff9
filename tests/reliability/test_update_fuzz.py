"""Updates, neighbours and pixels of fastdino_kernels on seeded problems, against their oracles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from fastdino_kernels import (
    LAMB,
    LARS,
    AdamWEMA,
    backend,
    clip_grad_per_tensor_,
    csrc,
    ema_update_,
    grad_square_sums,
    reference,
)
from fastdino_kernels.class_votes import _reference as votes_one_by_one
from fastdino_kernels.class_votes import class_votes
from fastdino_kernels.multicrop import (
    COLUMNS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_SIGMA,
    multicrop,
    multicrop_reference,
)
from fastdino_kernels.multicrop import DTYPES as CROP_DTYPES
from fastdino_kernels.resize_crop import _reference as whole_resize
from fastdino_kernels.resize_crop import _table, resize_crop
from fastdino_kernels.top_k import RunningTopK
from torch import Tensor

from reliability.fuzz import DTYPES, Fuzz, close
from reliability.promises import cases_of, promise

EPS = torch.finfo(torch.float32).eps


def tensors(r: Fuzz, shapes: list[list[int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    def values(shape: list[int]) -> Tensor:
        if r.kind == "integer":
            return torch.randint(-8, 9, shape, generator=r.generator).to(dtype)
        return r.normal(*shape, dtype=dtype)

    return [r.laid_out(values(shape)) for shape in shapes]


def dense(xs: list[Tensor]) -> list[Tensor]:
    """Parameters may lie anywhere, but not share an element."""
    return [x.clone() if x.numel() > 1 and 0 in x.stride() else x for x in xs]


def shapes_of(r: Fuzz) -> list[list[int]]:
    return [[r.size(0, 40) for _ in range(r.randint(0, 3))] for _ in range(r.randint(1, 5))]


def same(name: str, found: Tensor, truth: Tensor) -> None:
    """Equal, NaN to NaN."""
    assert found.shape == truth.shape and torch.equal(found.isnan(), truth.isnan()), name
    wrong = (found != truth) & ~truth.isnan()
    assert not wrong.any(), f"{name}: {wrong.sum()} elements differ"


def check_ema(r: Fuzz) -> object:
    shapes = shapes_of(r)
    teacher, student = dense(tensors(r, shapes)), tensors(r, shapes, r.choice(DTYPES))
    momentum = r.choice((0.0, 0.5, 1.0) if r.kind == "integer" else (0.0, 0.9, 0.996, 1.0))
    truth, eager = [x.double() for x in teacher], [x.clone() for x in teacher]
    sizes = [x[x.isfinite()].abs().amax().item() if x.isfinite().any() else 0.0 for x in teacher]
    reference.ema_update_(truth, [x.double() for x in student], momentum)
    reference.ema_update_(eager, student, momentum)
    ema_update_(teacher, student, momentum)
    for i, (x, y, z) in enumerate(zip(teacher, eager, truth, strict=True)):
        if r.kind == "integer":
            same(f"teacher[{i}]", x, z.float())
        same(f"teacher[{i}] is finite", x.isfinite(), y.isfinite())
        close(f"teacher[{i}]", x, y, z, 4 * EPS, max(sizes[i], 1e-30))  # which may cancel
    return shapes, momentum


def check_gradient_norms(r: Fuzz) -> object:
    """Sums of squares, and clipping with an odd scale of the loss."""
    shapes = shapes_of(r)
    grads = dense(tensors(r, shapes, r.choice(DTYPES)))
    max_norm, scale = r.choice((0.0, 0.5, 3.0)), r.choice((1.0, 8.0))
    params = [torch.zeros_like(g) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    squares = grad_square_sums(grads)
    norms = clip_grad_per_tensor_(params, max_norm, grad_scale=scale)
    for i, g in enumerate(grads):
        truth = g.double().square().sum()
        assert bool(squares[i].isfinite()) == bool(g.isfinite().all()), f"squares[{i}] and its gradient"
        if not g.isfinite().all():
            continue
        if r.kind == "integer":
            assert squares[i] == truth, f"squares[{i}]"
        assert abs(squares[i] - truth) <= 1e-12 * truth
        norm = truth.sqrt() / scale
        assert abs(norms[i].double() - norm) <= EPS * norm + torch.finfo(torch.float32).tiny * EPS
        clipped = g.double() * (reference.clip_coefficient(norm.item(), max_norm) / scale)
        found = params[i].grad
        assert found is not None
        torch.testing.assert_close(
            found.double(), clipped, rtol=2 * torch.finfo(g.dtype).eps, atol=torch.finfo(g.dtype).tiny
        )
    return shapes, max_norm, scale


def check_optimizer(r: Fuzz) -> object:
    """Steps of one of the fused optimizers and of the same one with its oracle in float64."""
    make = r.choice((
        lambda p, t: AdamWEMA(p, t, lr=0.01, weight_decay=0.1, max_grad_norm=0.5),
        lambda p, t: LAMB(p, t, lr=0.01, weight_decay=0.1, max_grad_norm=1.0),
        lambda p, t: LARS(p, 0.5, 0.25, momentum=0.5, eta=0.01, teacher_params=t),
        lambda p, t: LARS(p, 0.5, 0.25, momentum=0.5, eta=None, teacher_params=t),
    ))  # fmt: skip
    shapes, steps = shapes_of(r), 1 if r.kind == "integer" else r.randint(1, 3)
    kind = r.kind
    r.kind = "integer" if kind == "integer" else "normal"  # parameters are finite; gradients are of any kind
    start, teachers = dense(tensors(r, shapes)), dense(tensors(r, shapes))
    r.kind = kind
    dtypes = (torch.float32, torch.float64)
    groups = [start, *([x.to(dtype, copy=True) for x in start] for dtype in dtypes)]
    followers = [teachers, *([x.to(dtype, copy=True) for x in teachers] for dtype in dtypes)]
    before = [x.clone() for x in (*start, *teachers)]
    optimizers = [make(p, t) for p, t in zip(groups, followers, strict=True)]
    missing, bad, momentum = r.randrange(6), False, 0.5
    for _ in range(steps):
        grads = tensors(r, shapes)
        bad = not all(g.isfinite().all() for i, g in enumerate(grads) if i != missing)
        for group, how, optimizer in zip(groups, ("cpu", "reference", "reference"), optimizers, strict=True):
            for i, (p, g) in enumerate(zip(group, grads, strict=True)):
                p.grad = None if i == missing else g.to(p.dtype)
            with backend(how):
                assert bool(optimizer.step(momentum=momentum).found_inf) == bad
        if bad:
            break
    found, eager, truth = ([*p, *t] for p, t in zip(groups, followers, strict=True))
    exact = kind == "integer" and optimizers[0].param_groups[0].get("eta", 0) is None
    for i, (x, y, z) in enumerate(zip(found, eager, truth, strict=True)):
        if bad and steps == 1:
            same(f"tensor {i} after a refused step", x, before[i])
        if exact:
            same(f"tensor {i}", x, z.float())
        assert x.isfinite().all(), f"tensor {i} is not finite"
        close(f"tensor {i}", x, y, z, 64 * EPS, 1.0)
    return type(optimizers[0]).__name__, shapes, steps, missing


def check_top_k(r: Fuzz) -> object:
    rows, columns, k = r.size(1, 12), r.columns(512, 1), r.size(1, 40)
    wide = torch.randn(rows, columns + r.choice((0, 5)), generator=r.generator)
    if r.kind in ("integer", "special"):  # many equal numbers
        wide = torch.randint(-3, 4, wide.shape, generator=r.generator).float()
    elif r.kind == "tiny":
        wide *= 1e-40
    scores = wide[:, :columns]
    state, begin = RunningTopK(rows, k), 0
    while begin < columns:
        end = min(columns, begin + r.size(1, columns))
        state.add(scores[: rows // 2, begin:end], begin)
        state.add(scores[rows // 2 :, begin:end], begin, rows // 2)
        begin = end
    values, index = state.best()
    truth = scores.double().sort(dim=1, descending=True, stable=True)
    same("values", values, truth.values[:, :k].float())
    assert torch.equal(index, truth.indices[:, :k]), "columns"
    return rows, columns, k


def check_class_votes(r: Fuzz) -> object:
    rows, k, number = r.size(0, 20), r.size(1, 30), r.size(1, 12)
    classes = torch.randint(number, (rows, k), generator=r.generator)
    weights = torch.randint(4, (rows, k), generator=r.generator).double()
    truth = torch.randint(-1, number, (rows,), generator=r.generator)
    ks = sorted({r.randint(1, k) for _ in range(3)})
    classes, weights = r.laid_out(classes), r.laid_out(weights)
    found = class_votes(classes, weights, truth, ks=ks, number=number)
    assert torch.equal(found, votes_one_by_one(classes, weights, truth, ks, number))
    return rows, k, number, ks


def image_of(r: Fuzz) -> np.ndarray:
    shape = (r.size(1, 80), r.size(1, 80), 3)
    if r.kind == "integer":  # flat and extreme: the resize overshoots at every edge
        return (255 * (np.frombuffer(r.randbytes(shape[0] * shape[1] * 3), np.uint8) & 1)).reshape(shape)
    return np.frombuffer(r.randbytes(shape[0] * shape[1] * 3), np.uint8).reshape(shape)


def check_multicrop(r: Fuzz) -> object:
    images = [image_of(r) for _ in range(r.randint(0, 2))]
    sizes = [r.size(1, 66) for _ in range(r.randint(0, 2))]
    rows = np.zeros((len(images), len(sizes), COLUMNS), np.float32)
    for i, image in enumerate(images):
        for row in rows[i]:
            h, w = (r.randint(1, side) for side in image.shape[:2])
            row[:4] = r.randint(0, image.shape[0] - h), r.randint(0, image.shape[1] - w), h, w
            row[4:6] = r.randint(0, 1), r.randint(0, 1)
            row[6:9] = [r.choice((0.0, 1.0, r.uniform(0, 2), 1e30)) for _ in range(3)]
            row[9:12] = r.uniform(-0.5, 0.5), r.randint(0, 23), r.randint(0, 1)
            row[12:14] = r.choice((0.0, 1e-3, 0.1, 1.0, 2.0, 7.5)), r.randint(0, 1)
            if r.random() < 0.02:
                row[12] = MAX_SIGMA
    dtype = r.choice(CROP_DTYPES)
    at = r.randint(0, 3)
    shapes = [(len(images), 3, size, size) for size in sizes]
    empty = [torch.full((int(np.prod(shape)) + at,), 7.0, dtype=dtype) for shape in shapes]
    out = [x[at:].view(shape) for x, shape in zip(empty, shapes, strict=True)]
    expected = [torch.empty_like(x) for x in out]
    multicrop(images, rows, out=out, num_threads=r.randint(0, 4))
    multicrop_reference(images, rows, out=expected)
    for view, (x, y) in enumerate(zip(out, expected, strict=True)):
        same(f"view {view}", x, y)
    assert all((x[:at] == 7).all() for x in empty)
    return [image.shape[:2] for image in images], sizes, dtype


def check_resize_crop(r: Fuzz) -> object:
    image, size = image_of(r), (r.size(1, 80), r.size(1, 80))
    shape = [r.randint(1, side) for side in size]
    corner = (r.randint(0, size[0] - shape[0]), r.randint(0, size[1] - shape[1]))
    dtype = r.choice((torch.uint8, *CROP_DTYPES))
    out, expected = (torch.full((3, *shape), 7, dtype=dtype) for _ in range(2))
    resize_crop(image, size, corner, out=out)
    table = None if dtype == torch.uint8 else _table(IMAGENET_MEAN, IMAGENET_STD, dtype)
    whole_resize(image, size, (*corner, *shape), table, expected)
    same("out", out, expected)
    return image.shape[:2], size, corner, shape, dtype


CHECKS: dict[str, Callable[[Fuzz], object]] = {
    "ema_update_": check_ema,
    "grad_square_sums, clip_grad_per_tensor_": check_gradient_norms,
    "AdamWEMA, LAMB, LARS": check_optimizer,
    "RunningTopK": check_top_k,
    "class_votes": check_class_votes,
    "multicrop": check_multicrop,
    "resize_crop": check_resize_crop,
}


@pytest.mark.parametrize("name", CHECKS)
def test_cpu_kernels(name: str) -> None:
    """The seed of a case is all that it takes to repeat it: ``CHECKS[name](Fuzz(seed))``."""
    if not csrc.PATH.exists() or csrc.library() is None:
        pytest.skip("the C++ kernels are not built (make build)")
    with promise(33, f"{name}, cpu: seeded problems against the oracle") as cases:
        for seed in range(cases_of(ci=300, nightly=10_000)):
            r = Fuzz(seed)
            with cases.case(f"{name} seed={seed} kind={r.kind}"):
                CHECKS[name](r)
