"""Sharded training against whole models, on two processes and, as two replicas of two shards, on four."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdino.config import ConfigError, parse_mesh
from runs import exit_codes, free_port
from tests.engine.sharding_worker import run_checks

ON_TWO = [
    "the_same_batch_gives_the_same_bits",
    "parts_of_a_batch_give_the_whole_update",
    "what_is_gathered_in_16_bits",
    "only_the_last_micro_batch_communicates",
    "the_teacher_sees_its_average",
    "rows_that_are_not_here",
    "a_frozen_layer_has_no_state",
    "whole_weights_come_and_go_unchanged",
    "a_plain_backbone_for_evaluation",
    "recomputed_blocks_are_the_same",
    "compiled_blocks_are_the_same",
]
ON_FOUR = [
    "the_same_batch_gives_the_same_bits",
    "parts_of_a_batch_give_the_whole_update",
    "only_the_last_micro_batch_communicates",
    "rows_that_are_not_here",
    "a_frozen_layer_has_no_state",
    "whole_weights_come_and_go_unchanged",
]


ON_A_GPU = [
    "the_same_batch_gives_the_same_bits",
    "what_is_gathered_in_16_bits",
    "the_teacher_sees_its_average",
    "a_frozen_layer_has_no_state",
    "whole_weights_come_and_go_unchanged",
    "a_plain_backbone_for_evaluation",
    "compiled_blocks_are_the_same",
]


class Checks:
    """Runs all checks for a number of processes at once, when the first of them is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.passed: dict[int, set[str]] = {}
        self.output: dict[int, str] = {}
        self.code: dict[int, list[int]] = {}

    def of(self, processes: int, names: list[str]) -> set[str]:
        if processes not in self.passed:
            noted, log = self.folder / f"passed-{processes}", self.folder / f"log-{processes}"
            noted.touch()
            port = free_port()
            given = [(names, noted, log, rank, processes, port) for rank in range(processes)]
            self.code[processes] = exit_codes(run_checks, given, 240)
            self.passed[processes] = set(noted.read_text().split())
            self.output[processes] = log.read_text()
        return self.passed[processes]


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    return Checks(tmp_path_factory.mktemp("sharding"))


@pytest.mark.parametrize("name", ON_TWO)
def test_two_shards(checks: Checks, name: str) -> None:
    assert name in checks.of(2, ON_TWO), checks.output[2]


@pytest.mark.parametrize("name", ON_FOUR)
def test_two_replicas_of_two_shards(checks: Checks, name: str) -> None:
    assert name in checks.of(4, ON_FOUR), checks.output[4]


@pytest.mark.parametrize("processes,names", [(2, ON_TWO), (4, ON_FOUR)], ids=["2", "4"])
def test_the_processes_part_in_peace(checks: Checks, processes: int, names: list[str]) -> None:
    checks.of(processes, names)
    assert checks.code[processes] == [0] * processes, checks.output[processes]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_single_shard_on_a_gpu(checks: Checks, name: str) -> None:
    assert name in checks.of(1, ON_A_GPU), checks.output[1]


@pytest.mark.parametrize(
    "text,processes,expected",
    [
        ("replicate", 4, None),
        ("shard", 1, None),
        ("1x1", 1, None),
        ("shard", 8, (1, 8)),
        ("2x4", 8, (2, 4)),
        ("8x1", 8, (8, 1)),
        ("10x12", 120, (10, 12)),
    ],
)
def test_mesh(text: str, processes: int, expected: tuple[int, int] | None) -> None:
    assert parse_mesh(text, processes) == expected


@pytest.mark.parametrize(
    "text,message",
    [
        ("shards", "expected replicate, shard or RxS such as 2x4, got 'shards'"),
        ("0x4", "expected replicate, shard or RxS"),
        ("2 x 2", "expected replicate, shard or RxS"),
        ("2x2x1", "expected replicate, shard or RxS"),
        ("3x2", "expected R x S = 4, the number of processes, got 3x2"),
    ],
)
def test_mesh_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_mesh(text, 4)
    assert error.value.flag == "mesh"
