"""LARS against the formula of the official code, written out."""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels import LARS


def test_update_rule() -> None:
    g = torch.Generator().manual_seed(0)
    matrix, bias = (
        torch.nn.Parameter(torch.randn(4, 3, generator=g)),
        torch.nn.Parameter(torch.randn(4, generator=g)),
    )
    zero, frozen = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = LARS(
        [{"params": [matrix, zero]}, {"params": [bias, frozen], "weight_decay": 0.0}], weight_decay=0.1
    )
    values = [p.detach().double().clone() for p in (matrix, zero, bias)]
    buffers = [torch.zeros_like(x) for x in values]
    for _ in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.3
        for p in (matrix, zero, bias):
            p.grad = torch.randn(p.shape, generator=g)
        for i, p in enumerate((matrix, zero, bias)):
            update = p.grad.double()
            if i < 2:
                update = update + 0.1 * values[i]
                norm = values[i].norm()
                update = update * (0.001 * norm / update.norm() if norm > 0 else 1.0)
            buffers[i] = 0.9 * buffers[i] + update
            values[i] = values[i] - 0.3 * buffers[i]
        optimizer.step()
        for p, value in zip((matrix, zero, bias), values, strict=True):
            torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-6)
    assert torch.equal(frozen, torch.ones(2)) and frozen not in optimizer.state
    assert list(optimizer.state[matrix]) == ["momentum_buffer"]


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="eta: expected a number >= 0, got -1"):
        LARS([torch.nn.Parameter(torch.ones(1))], eta=-1)
