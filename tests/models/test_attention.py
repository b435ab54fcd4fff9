"""Grouped attention against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdino.models.attention import attention, attention_map, cls_attention

GROUPS = ((3, 7), (1, 1), (5, 4))
HEADS, DIM = 3, 24


def formula(qkv: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    outputs, start = [], 0
    for crops, tokens in groups:
        for _ in range(crops):
            q, k, v = qkv[start : start + tokens].chunk(3, dim=1)
            start += tokens
            heads = zip(q.chunk(HEADS, 1), k.chunk(HEADS, 1), v.chunk(HEADS, 1), strict=True)
            outputs.append(
                torch.cat([(a @ b.T / math.sqrt(DIM / HEADS)).softmax(-1) @ c for a, b, c in heads], 1)
            )
    return torch.cat(outputs)


@pytest.fixture
def qkv() -> Tensor:
    rows = sum(crops * tokens for crops, tokens in GROUPS)
    return torch.randn(rows, 3 * DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def gradient(function, *inputs: Tensor) -> tuple[Tensor, ...]:
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weight).sum(), inputs)


def test_attention(qkv) -> None:
    torch.testing.assert_close(attention(qkv, GROUPS, HEADS), formula(qkv, GROUPS), rtol=1e-12, atol=1e-12)
    qkv.requires_grad_()
    (got,) = gradient(lambda x: attention(x, GROUPS, HEADS), qkv)
    (want,) = gradient(lambda x: formula(x, GROUPS), qkv)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_cls_attention(qkv) -> None:
    starts, row = [], 0
    for crops, tokens in GROUPS:
        starts += [row + i * tokens for i in range(crops)]
        row += crops * tokens
    qkv.requires_grad_()

    def got(x: Tensor) -> Tensor:
        return cls_attention(x[starts, :DIM], x[:, DIM:], GROUPS, HEADS)

    def want(x: Tensor) -> Tensor:
        return formula(x, GROUPS)[starts]

    torch.testing.assert_close(got(qkv), want(qkv), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(got, qkv)[0], gradient(want, qkv)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "unit", "autocast"),
    [
        (torch.float32, 2**-23, False),
        (torch.bfloat16, 2**-8, False),
        (torch.bfloat16, 2**-8, True),
        (torch.float16, 2**-11, False),
        (torch.float16, 2**-11, True),
    ],
)
def test_lower_precision(qkv, dtype, unit, autocast) -> None:
    low = qkv.to(dtype).requires_grad_()
    exact = low.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(low, GROUPS, HEADS)
    assert out.dtype == dtype
    want = formula(exact, GROUPS)
    # Logits reach about 30, so that rounding them alone moves probabilities by 30 units.
    assert (out.double() - want).abs().max() < 40 * unit
    (got_grad,) = gradient(lambda x: attention(x, GROUPS, HEADS).double(), low)
    (want_grad,) = gradient(lambda x: formula(x, GROUPS), exact)
    assert got_grad.dtype == dtype
    assert (got_grad.double() - want_grad).norm() < 20 * unit * want_grad.norm()


def test_attention_map(qkv) -> None:
    rows = qkv[:21]
    probabilities = attention_map(rows, 3, HEADS)
    assert probabilities.shape == (3, HEADS, 7, 7)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, HEADS, 7, dtype=torch.float64))
    values = rows.view(3, 7, 3, HEADS, -1)[:, :, 2].transpose(1, 2)
    mixed = (probabilities @ values).transpose(1, 2).reshape(21, DIM)
    torch.testing.assert_close(mixed, formula(rows, ((3, 7),)), rtol=1e-12, atol=1e-12)


def test_one_group_is_not_copied_to_join_it(qkv) -> None:
    rows = qkv[:21]
    torch.testing.assert_close(
        attention(rows, ((3, 7),), HEADS), formula(rows, ((3, 7),)), rtol=1e-12, atol=1e-12
    )
