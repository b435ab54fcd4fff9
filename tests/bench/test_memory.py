"""The counts of bench/memory.py: the formula of the official block, our budget, arithmetic of the totals."""

from __future__ import annotations

import pytest
import torch

from bench.memory import BUDGET, TABLE_8, count_table, kept, mean, official_block, per_block, total
from fastdino.config import ModelConfig
from fastdino.models.attention import pack
from fastdino.models.vit import Block

DIM, HEADS, TOKENS = 64, 2, 19
STATISTICS = 4 * HEADS / DIM  # attention's number per query and head


@pytest.fixture(scope="module")
def block() -> dict[str, float]:
    return per_block(DIM, HEADS, TOKENS)


def test_official_block(block) -> None:
    """Inputs of the norms 4 + 4 and their statistics, inputs of four products 2 + 2 + 2 + 8, q, k and v 6, of
    GELU 8; a softmax in fp32 and its 16-bit copy.
    """
    assert block["official"] == pytest.approx(36 + 16 / DIM + 6 * HEADS * TOKENS / DIM)


def test_our_blocks_stay_within_the_budget(block) -> None:
    assert block["none"] <= BUDGET + STATISTICS
    assert block["selective"] <= BUDGET - 8 + STATISTICS
    assert block["full"] <= 4
    assert block["none, compiled"] <= block["none"] and block["selective, compiled"] <= block["selective"]
    last = per_block(DIM, HEADS, TOKENS, cls_only=True)
    assert "official" not in last
    for name, size in last.items():
        row = {"block": {224: block[name]}, "last_block": {224: size}}
        assert mean(row, 12, 224) <= BUDGET


def test_official_block_computes_what_ours_does() -> None:
    torch.manual_seed(0)
    block, x = Block(DIM, HEADS, 4.0), torch.randn(2, TOKENS, DIM)
    ours = block(x.flatten(0, 1), pack(((2, TOKENS),)))
    torch.testing.assert_close(official_block(block, x).flatten(0, 1), ours, rtol=1e-4, atol=1e-5)


def test_weights_do_not_count() -> None:
    layer = torch.nn.Linear(8, 16)
    x = torch.randn(3, 8)
    assert kept(layer, x) == 2 * x.numel()  # autocast's copy of the input; not that of the weight
    assert kept(lambda x: layer(x).exp(), x) == 2 * x.numel() + 2 * 3 * 16


def test_totals() -> None:
    model = ModelConfig(arch="vit_small")
    row = {"provider": "x", "block": {224: 24.0, 96: 24.0}, "last_block": {224: 24.0, 96: 24.0}}
    expected = {0: 2.8, 2: 3.3, 6: 4.4, 10: 5.4}  # GB
    assert {n: round(total(row, model, 64, n) / 1e9, 1) for n in TABLE_8} == expected
    row["last_block"] = {224: 12.0, 96: 12.0}
    assert total(row, model, 64, 0) == 64 * 2 * 197 * 384 * (11 * 24 + 12)
    lines = count_table([row], model, 64).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["x", "budget", "paper,"]
