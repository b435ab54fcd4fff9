"""Checks of arguments, made once in each public function; errors name argument, expectation and finding."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(name: str, x: Any, shape: tuple[str | int, ...], *, like: Tensor | None = None) -> None:
    """``shape`` holds expected extents, or letters for free ones; ``like`` gives the expected device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name}: got a DTensor; call the loss inside the module's forward, or pass .full_tensor()"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'nested' if x.is_nested else x.layout}")
    if x.dim() != len(shape) or any(
        isinstance(e, int) and n != e for n, e in zip(x.shape, shape, strict=True)
    ):
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {list(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {x.device}")


def check_prototypes(name: str, number: int) -> None:
    if number == 0:
        raise ValueError(f"{name}: expected at least one prototype, got none")


def check_temperature(name: str, value: float | Tensor, *, targets: bool = False) -> None:
    """A number > 0 or a 0-dim tensor, which gets no gradient: of ``targets`` nothing else is expected."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a number or a 0-dim tensor, got shape {list(value.shape)}")
        if value.requires_grad and not targets:
            raise ValueError(
                f"{name}: expected a temperature that is not trained (detach it): it gets no gradient"
            )
    elif not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {type(value).__name__}")
    elif not value > 0:
        raise ValueError(f"{name}: expected a temperature > 0, got {value}")


def check_views(
    student_name: str, student_rows: int, teacher_name: str, teacher_rows: int, n_global: int
) -> None:
    """V*B student rows and G*B teacher rows of the same B >= 1 images, with V >= G and at least one pair."""
    if not isinstance(n_global, (int, torch.SymInt)):
        raise TypeError(f"n_global: expected a whole number, got {n_global!r}")
    if n_global < 1:
        raise ValueError(f"n_global: expected at least 1, got {n_global}")
    if teacher_rows == 0 or teacher_rows % n_global:
        raise ValueError(
            f"{teacher_name}: expected n_global * B = {n_global} * B rows with B >= 1, got {teacher_rows}"
        )
    images = teacher_rows // n_global
    if student_rows % images or student_rows < max(n_global, 2) * images:
        raise ValueError(
            f"{student_name}: expected V * B = V * {images} rows with V >= {max(n_global, 2)} "
            f"({teacher_name} has {n_global} * {images}), got {student_rows}"
        )


def check_no_grad(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(
            f"{name}: the teacher must not require grad; detach it or run it under torch.no_grad()"
        )


def check_number(
    name: str, value: float | Tensor, low: float = 0.0, high: float = math.inf, *, positive: bool = False
) -> None:
    """A number in [low, high] (> 0 with ``positive``), or a 0-dim tensor, whose value stays where it is."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a number or a 0-dim tensor, got shape {list(value.shape)}")
    elif not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {type(value).__name__}")
    elif not (low <= value <= high) or (positive and value == 0):
        at_least = f">{'' if positive else '='} {low:g}"
        expected = f"a number in [{low:g}, {high:g}]" if high < math.inf else f"a number {at_least}"
        raise ValueError(f"{name}: expected {expected}, got {value}")
