"""Stochastic depth: both forms keep the expectation, drop as often as they should, and never look at the
device.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdino.models.attention import pack
from fastdino.models.stochastic_depth import Kept, add_branch, branch_input, draw, first_rows


def test_rates_of_the_masks() -> None:
    torch.manual_seed(0)
    n = 20_000
    branches = draw(0.1, 5, torch.zeros(2 * n, 1), pack(((n, 2),)))
    dropped_before = torch.ones(n, dtype=torch.bool)
    for i, pair in enumerate(branches):
        rate = 0.025 * i
        scales = [scale for scale in pair if isinstance(scale, Tensor)]
        assert [tuple(scale.shape) for scale in scales] == [(2 * n, 1)] * 2
        # Both tokens of a crop share a draw; its two branches, blocks and crops do not.
        crops = torch.cat(scales, dim=1).view(n, 2, 2)  # [crops, tokens, branches]
        assert torch.equal(crops[:, 0], crops[:, 1])
        kept = torch.tensor([1.0]) if i == 0 else torch.tensor([0.0, 1 / (1 - rate)])
        torch.testing.assert_close(crops.unique(), kept)
        dropped = crops[:, 0] == 0
        assert (dropped.double().mean(0) - rate).abs().max() <= 4 * math.sqrt(rate * (1 - rate) / n)
        both = dropped.all(1).double().mean().item()
        assert abs(both - rate**2) <= 4 * math.sqrt(rate**2 / n)
        joint = (dropped[:, 0] & dropped_before).double().mean().item()
        expected = rate * (rate - 0.025) if i else 0.0
        assert abs(joint - expected) <= 4 * math.sqrt(expected / n) + 1e-12
        dropped_before = dropped[:, 0]


GROUPS = ((8, 3), (20, 2))
TOKENS = 64


def drawn(rate: float, depth: int = 2) -> tuple[Kept, Kept]:
    first, second = draw(rate, depth, torch.zeros(TOKENS, 1), pack(GROUPS))[-1]
    assert isinstance(first, Kept) and isinstance(second, Kept)
    return first, second


def test_subsets_name_whole_crops_of_each_group() -> None:
    torch.manual_seed(0)
    for kept in drawn(0.4):
        assert kept.packing.groups == ((5, 3), (12, 2)) and kept.packing.backend == "sdpa"
        crops = kept.crops.tolist()
        assert (
            len(set(crops)) == 17 and set(crops[:5]) <= set(range(8)) and set(crops[5:]) <= set(range(8, 28))
        )
        rows = [3 * c + t for c in crops[:5] for t in range(3)]
        rows += [24 + 2 * (c - 8) + t for c in crops[5:] for t in range(2)]
        assert kept.rows.tolist() == rows
        scale = torch.tensor([8 / 5] * 5 + [20 / 12] * 12)[:, None]
        torch.testing.assert_close(kept.crop_scale, scale)
        torch.testing.assert_close(kept.scale, scale.repeat_interleave(torch.tensor([3] * 5 + [2] * 12), 0))


def test_subsets_keep_the_expectation() -> None:
    torch.manual_seed(0)
    draws = 4000
    x, y = torch.randn(TOKENS, 3), torch.randn(TOKENS, 3)
    kept = torch.zeros(2, 28)
    total = torch.zeros(2, TOKENS, 3)
    together = 0
    for _ in range(draws):
        pair = drawn(0.4)
        for i, drop in enumerate(pair):
            kept[i, drop.crops] += 1
            total[i] += add_branch(x, branch_input(y, drop), drop) - x
        together += int(bool((pair[0].crops == 0).any() and (pair[1].crops == 0).any()))
    for group, share in ((slice(0, 8), 5 / 8), (slice(8, 28), 12 / 20)):
        error = (kept[:, group] / draws - share).abs().max()
        assert error <= 4.5 * math.sqrt(share * (1 - share) / draws)
    mean = total / draws
    assert (mean - y).abs().max() <= 4.5 * y.abs().max() * math.sqrt(0.4 / 0.6 / draws)
    share = (5 / 8) ** 2  # the branches of a block are independent of each other
    assert abs(together / draws - share) <= 4 * math.sqrt(share * (1 - share) / draws)


def test_gradient_of_a_subset() -> None:
    torch.manual_seed(0)
    drop, _ = drawn(0.4)
    x = torch.randn(TOKENS, 3, dtype=torch.float64, requires_grad=True)
    drop = drop._replace(scale=drop.scale.double())

    def branch(x: Tensor) -> Tensor:
        return add_branch(x, branch_input(x, drop).square(), drop)

    scale = torch.zeros(TOKENS, 1, dtype=torch.float64)
    scale[drop.rows] = drop.scale
    torch.testing.assert_close(branch(x), x + x.square() * scale)
    (got,) = torch.autograd.grad(branch(x).sum(), x)
    torch.testing.assert_close(got, 1 + 2 * x.detach() * scale)


def test_first_rows() -> None:
    torch.manual_seed(0)
    drop, _ = drawn(0.4)
    alone = first_rows(drop, GROUPS)
    assert isinstance(alone, Kept) and torch.equal(alone.rows, drop.crops)
    assert torch.equal(alone.scale, drop.crop_scale)
    scale = torch.arange(TOKENS)[:, None].float()
    mask = first_rows(scale, GROUPS)
    assert isinstance(mask, Tensor)
    assert mask.flatten().tolist() == [*range(0, 24, 3), *range(24, 64, 2)]
    assert first_rows(None, GROUPS) is None


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_shapes_do_not_depend_on_the_draws(rate) -> None:
    """Whatever had to be read back from the device could not run on the meta device."""
    branches = draw(rate, 3, torch.zeros(TOKENS, 1, device="meta"), pack(GROUPS))
    kinds = [type(drop) for pair in branches for drop in pair]
    assert kinds == [Tensor] * 6 if rate == 0.1 else kinds == [Tensor] * 2 + [Kept] * 4
    if rate == 0.9:
        last = branches[-1][0]
        assert isinstance(last, Kept) and last.packing.groups == ((1, 3), (2, 2))
