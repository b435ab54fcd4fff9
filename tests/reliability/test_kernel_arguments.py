"""Public functions of fastdino_kernels with an argument that cannot be: TypeError or ValueError, no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastdino_kernels import (
    AdamWEMA,
    AdamWGroup,
    AdamWScalars,
    adamw_ema_step_,
    centered_softmax,
    clip_grad_per_tensor_,
    dino_loss,
    ema_update_,
    info_nce,
    match_regions,
    multicrop,
    normalize_weight,
    patch_loss,
    prototype_loss,
    sinkhorn_center,
    sinkhorn_knopp,
    soft_cross_entropy,
    softmax_over_batch,
)
from fastdino_kernels.class_votes import class_votes
from fastdino_kernels.multicrop import COLUMNS, H, W
from fastdino_kernels.resize_crop import resize_crop
from fastdino_kernels.top_k import RunningTopK
from torch import Tensor

from reliability.promises import promise

B, V, K, D = 2, 3, 5, 4
TEMPS = dict(student_temp=0.1, teacher_temp=0.04)
VIEWS = dict(student_logits=(V * B, K), teacher_logits=(2 * B, K), center=(K,))
FEATURES = dict(student_weight=(K, D), teacher_weight=(K, D), center=(K,))


def params() -> np.ndarray:
    rows = np.zeros((1, 1, COLUMNS), np.float32)
    rows[..., H], rows[..., W] = 6, 7
    return rows


def votes() -> dict[str, Any]:
    return dict(
        classes=torch.zeros(3, 2, dtype=torch.int64),
        weights=torch.ones(3, 2, dtype=torch.float64),
        truth=torch.zeros(3, dtype=torch.int64),
        ks=[1, 2],
        number=4,
    )


def random(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "dino_loss": (dino_loss, lambda: {**random(**VIEWS), **TEMPS, "n_global": 2}),
    "prototype_loss": (
        prototype_loss,
        lambda: {**random(student_z=(V * B, D), teacher_z=(2 * B, D), **FEATURES), **TEMPS, "n_global": 2},
    ),
    "patch_loss": (
        patch_loss,
        lambda: {**random(student_z=(V, D), teacher_z=(V, D), row_weight=(V,), **FEATURES), **TEMPS},
    ),
    "soft_cross_entropy": (soft_cross_entropy, lambda: {**random(logits=(3, K), target=(3, K)), "temp": 0.1}),
    "sinkhorn_knopp": (sinkhorn_knopp, lambda: {**random(logits=(3, K)), "temp": 0.1, "n_iters": 2}),
    "sinkhorn_center": (sinkhorn_center, lambda: {**random(logits=(3, K)), "temp": 0.1, "n_iters": 2}),
    "softmax_over_batch": (softmax_over_batch, lambda: {**random(logits=(3, K)), "temp": 0.1}),
    "centered_softmax": (centered_softmax, lambda: {**random(logits=(3, K), center=(K,)), "temp": 0.1}),
    "info_nce": (info_nce, lambda: {**random(query=(3, D), key=(3, D), queue=(D, 9)), "temp": 0.1}),
    "normalize_weight": (normalize_weight, lambda: random(weight_v=(K, D), weight_g=(K, 1))),
    "match_regions": (
        match_regions,
        lambda: {
            **random(student_features=(B * 11, D), teacher_features=(B * 8, D)),
            "regions": [4, 4, 3],
            "n_global": 2,
        },
    ),
    "class_votes": (class_votes, votes),
    "resize_crop": (
        resize_crop,
        lambda: dict(
            image=torch.zeros(6, 7, 3, dtype=torch.uint8),
            size=(8, 9),
            corner=(1, 1),
            out=torch.zeros(3, 4, 5),
        ),
    ),
    "RunningTopK.add": (
        RunningTopK(3, 2).add,
        lambda: dict(scores=torch.randn(3, 8), column=0, row=0),
    ),
}  # fmt: skip
# Wrong in kind, but the function can make sense of them.
ALLOWED = {
    *((name, "logits", "a row less") for name in ("sinkhorn_knopp", "sinkhorn_center", "softmax_over_batch")),
    *(
        (name, "logits", "a column less")
        for name in ("sinkhorn_knopp", "sinkhorn_center", "softmax_over_batch")
    ),
    *(("RunningTopK.add", "scores", what) for what in ("a row less", "a column less")),
    *(("resize_crop", "image", what) for what in ("a row less", "a column less")),
    ("centered_softmax", "logits", "a row less"),
    ("info_nce", "queue", "a column less"),
    ("normalize_weight", "weight_v", "a column less"),
    ("resize_crop", "out", "a column less"),
    ("patch_loss", "row_weight", "None"),
    ("sinkhorn_knopp", "n_iters", "2**62"),  # takes longer than anybody waits
    ("sinkhorn_center", "n_iters", "2**62"),
    ("class_votes", "number", "2**62"),
}


def spoiled(x: Any) -> Iterator[tuple[str, Any]]:
    """Values of which no function can make anything in the place of ``x``."""
    if isinstance(x, Tensor):
        yield from (("None", None), ("text", "text"), ("list", [1.0, 2.0]), ("array", np.zeros(3)))
        yield "complex", x.to(torch.complex64)
        yield "another dimension", x[None]
        yield "no dimension", torch.zeros((), dtype=x.dtype)
        yield "sparse", x.to_sparse()
        yield "a row less", x[:-1]
        if x.dim() > 1:
            yield "a column less", x[:, :-1].contiguous()
        yield "bool", x.bool()
    elif isinstance(x, float):
        yield from (("0", 0.0), ("-1", -1.0), ("nan", float("nan")), ("text", "0.1"), ("None", None))
        yield from (("one-element", torch.ones(1)), ("tensor of -1", torch.tensor(-1.0)))
    elif isinstance(x, int):
        yield from (("-1", -1), ("text", "2"), ("None", None), ("2**62", 1 << 62), ("2.5", 2.5))
    else:
        yield from (("None", None), ("[-1, 2]", [-1, 2]), ("text", "ab"), ("[2.5, 3.5]", [2.5, 3.5]))
        yield "2**40", [1 << 40, 1 << 40]


@pytest.mark.parametrize("name", CALLS)
def test_one_argument_that_cannot_be(name: str) -> None:
    function, arguments = CALLS[name]
    function(**arguments())
    with promise(33, f"{name}: invalid Python calls") as cases:
        for argument, x in arguments().items():
            for what, value in spoiled(x):
                if (name, argument, what) in ALLOWED:
                    continue
                with cases.case(f"{name}({argument}: {what})"):
                    try:
                        function(**{**arguments(), argument: value})
                    except (TypeError, ValueError) as error:
                        assert len(str(error)) > 10
                    else:
                        raise AssertionError("was accepted")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def step(**changes: Any) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "teacher")
    lists: dict[str, Any] = {name: [zeros(3)] for name in names}
    lists |= dict(steps=[zeros()], scalars=AdamWScalars([AdamWGroup(0.1)]))
    adamw_ema_step_(**{**lists, **changes})


def crop(images: Any = None, rows: Any = None, out: Any = None, **options: Any) -> None:
    images = [np.zeros((6, 7, 3), np.uint8)] if images is None else images
    rows, out = params() if rows is None else rows, [zeros(1, 3, 8, 8)] if out is None else out
    multicrop(images, rows, out=out, **options)


def row(column: int, value: float) -> np.ndarray:
    rows = params()
    rows[..., column] = value
    return rows


OTHERS: dict[str, Callable[[], Any]] = {
    "ema_update_: fewer students": lambda: ema_update_([zeros(3)], [], 0.5),
    "ema_update_: another shape": lambda: ema_update_([zeros(3)], [zeros(4)], 0.5),
    "ema_update_: None": lambda: ema_update_([None], [zeros(4)], 0.5),  # type: ignore[list-item]
    "ema_update_: momentum 2": lambda: ema_update_([zeros(3)], [zeros(3)], 2.0),
    "ema_update_: momentum nan": lambda: ema_update_([zeros(3)], [zeros(3)], float("nan")),
    "ema_update_: momentum text": lambda: ema_update_([zeros(3)], [zeros(3)], "0.5"),  # type: ignore[arg-type]
    "clip: max_norm -1": lambda: clip_grad_per_tensor_([], -1.0),
    "clip: scale 0": lambda: clip_grad_per_tensor_([], 1.0, grad_scale=0.0),
    "step: another gradient": lambda: step(grads=[zeros(4)]),
    "step: no moments": lambda: step(exp_avgs=[None]),
    "step: a count of int": lambda: step(steps=[zeros(dtype=torch.int64)]),
    "step: fewer groups": lambda: step(scalars=AdamWScalars([])),
    "step: momentum 2": lambda: step(scalars=AdamWScalars([AdamWGroup(0.1)], momentum=2.0)),
    "step: another teacher": lambda: step(teacher=[zeros(2)]),
    "step: a copy of fp32": lambda: step(low_precision=([zeros(3)], None)),
    "AdamWEMA: lr -1": lambda: AdamWEMA([zeros(3)], lr=-1.0),
    "AdamWEMA: betas of 1": lambda: AdamWEMA([zeros(3)], betas=(1.0, 0.9)),
    "AdamWEMA: two teachers": lambda: AdamWEMA([zeros(3)], [zeros(3), zeros(3)]),
    "AdamWEMA: another teacher": lambda: AdamWEMA([zeros(3)], [zeros(4)]),
    "AdamWEMA: no momentum": lambda: AdamWEMA([zeros(3)], [zeros(3)]).step(),
    "AdamWEMA: norms of two": lambda: AdamWEMA([zeros(3)]).step(norms=zeros(2)),
    "RunningTopK: no rows": lambda: RunningTopK(0, 2),
    "RunningTopK: k 0": lambda: RunningTopK(2, 0),
    "RunningTopK: k 2**40": lambda: RunningTopK(2, 1 << 40),
    "RunningTopK: nothing yet": lambda: RunningTopK(2, 1).best(),
    "multicrop: an image of floats": lambda: crop(images=[np.zeros((6, 7, 3), np.float32)]),
    "multicrop: an image without pixels": lambda: crop(images=[np.zeros((0, 7, 3), np.uint8)]),
    "multicrop: a gray image": lambda: crop(images=[np.zeros((6, 7), np.uint8)]),
    "multicrop: a sparse image": lambda: crop(images=[zeros(6, 7, 3, dtype=torch.uint8).to_sparse()]),
    "multicrop: a transposed image": lambda: crop(images=[np.zeros((7, 6, 3), np.uint8).transpose(1, 0, 2)]),
    "multicrop: rows of doubles": lambda: crop(rows=params().astype(np.float64)),
    "multicrop: too few rows": lambda: crop(rows=params()[:0]),
    "multicrop: crops of doubles": lambda: crop(out=[zeros(1, 3, 8, 8, dtype=torch.float64)]),
    "multicrop: a crop of another batch": lambda: crop(out=[zeros(2, 3, 8, 8)]),
    "multicrop: an oblong crop": lambda: crop(out=[zeros(1, 3, 8, 9)]),
    "multicrop: an expanded crop": lambda: crop(out=[zeros(1, 1, 8, 8).expand(1, 3, 8, 8)]),
    "multicrop: a crop that is None": lambda: crop(out=[None]),
    "multicrop: std 0": lambda: crop(std=(0.0, 1.0, 1.0)),
    "multicrop: mean nan": lambda: crop(mean=(float("nan"), 0.0, 0.0)),
    "multicrop: -1 threads": lambda: crop(num_threads=-1),
}
COLUMN_VALUES = {  # of a row of parameters for an image of 6 x 7 pixels
    0: (-1, 1, 0.5, 1e9), 1: (-1, 1, np.nan), 2: (0, 7, np.inf), 3: (0, 8, -1), 6: (-1, np.nan, np.inf),
    7: (-0.1,), 8: (-np.inf,), 9: (0.6, -0.6), 10: (-1, 24, 0.5), 12: (-1, 101, np.nan),
}  # fmt: skip


def test_other_calls_that_cannot_be() -> None:
    step()
    crop()
    with promise(33, "optimizers, neighbours and multicrop: invalid Python calls") as cases:
        for name, call in OTHERS.items():
            with cases.case(name), pytest.raises((TypeError, ValueError)):
                call()
        for column, values in COLUMN_VALUES.items():
            for value in values:
                with cases.case(f"multicrop: column {column} is {value}"), pytest.raises(ValueError):
                    crop(rows=row(column, value))
