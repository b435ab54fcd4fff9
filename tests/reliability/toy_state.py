"""A training state of 200 bytes, whole or in pieces, told apart by one number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdino.engine.checkpoint import Piece, State, load, save, step_of

META = {"epoch": 0, "note": "é"}


def contents(value: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Seven, five and one rows; a vector that every process holds; numbers without dimensions."""
    model = {
        "w": torch.arange(21.0).reshape(7, 3) + value,
        "h": (torch.arange(10.0).reshape(5, 2, 1) - value).bfloat16(),
        "token": torch.full((1, 2), value),
        "center": torch.arange(4.0) + value,
        "scale": torch.tensor(value),
    }
    return model, {"exp_avg.w": -model["w"], "step.w": torch.tensor(value)}


def part(state: dict[str, torch.Tensor], rank: int, world: int) -> State:
    """Rows in equal chunks, as FSDP deals them: the last processes have fewer rows or none."""
    pieces: dict[str, torch.Tensor | Piece] = {}
    for name, tensor in state.items():
        if name == "center" or tensor.ndim == 0:
            pieces[name] = tensor
            continue
        chunk = -(-len(tensor) // world)
        start = min(rank * chunk, len(tensor))
        pieces[name] = Piece(tensor[start : start + chunk], start, len(tensor))
    return pieces


def save_part(
    root: Path, step: int, value: float, rank: int, world: int, attempt: str, **settings: Any
) -> Path:
    model, optimizer = (part(state, rank, world) for state in contents(value))
    return save(root, step, model, optimizer, META, rank=rank, world_size=world, attempt=attempt, **settings)


def save_all(root: Path, step: int, value: float, world: int, attempt: str = "a", **settings: Any) -> Path:
    """In pieces, one process after the other, rank 0 last."""
    for rank in reversed(range(world)):
        path = save_part(root, step, value, rank, world, attempt, timeout=0, **settings)
    return path


def save_whole(root: Path, step: int, value: float, **settings: Any) -> Path:
    """By one process."""
    return save(root, step, *contents(value), META, **settings)


def assert_holds(path: Path | None, value: float) -> None:
    """The checkpoint at ``path`` is that of ``value``, to the bit."""
    assert path is not None
    model, optimizer, meta = load(path)
    for got, want in zip((model, optimizer), contents(value), strict=True):
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name
    assert meta["note"] == "é" and meta["step"] == step_of(path)
