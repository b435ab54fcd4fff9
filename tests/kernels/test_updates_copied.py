"""Copies of an optimizer go on as the original would."""

from __future__ import annotations

import copy
import io

import fastdino_kernels as fk
import pytest
import torch
from torch import nn


def through_file(x: object) -> object:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_file])
@pytest.mark.parametrize("kind", [fk.AdamWEMA, fk.LARS, fk.LAMB])
def test_a_copy_keeps_its_teachers(kind: type, copied) -> None:
    torch.manual_seed(0)
    student = nn.Linear(5, 3)
    teacher = copy.deepcopy(student).requires_grad_(False)
    pair = nn.ModuleList([student, teacher])
    optimizer = kind(student.parameters(), lr=0.1, teacher_params=list(teacher.parameters()))
    both = [(pair, optimizer)]
    for _ in range(2):
        for models, updates in both:
            models[0](torch.ones(2, 5)).square().sum().backward()
            updates.step(momentum=0.5)
            updates.zero_grad()
        if len(both) == 1:
            both.append(copied(both[0]))
    for one, two in zip(pair.parameters(), both[1][0].parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(student.weight, teacher.weight)
    both[1][1].step(momentum=0.0)
    assert torch.equal(both[1][0][0].weight, both[1][0][1].weight)
