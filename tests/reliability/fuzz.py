"""Problems for the operations of fastdino_kernels made from a seed, and how a result is judged.

``kind`` of the numbers in a problem:
    "normal"   at most twice the error of eager code in the same dtype against the float64 oracle and some ulp
    "tiny"     the same with subnormal numbers among the inputs
    "special"  with NaN and infinities among them: finite where eager code is, or at least the oracle, and
               nowhere else
    "integer"  chosen so that every sum is exact: equal to the oracle in float64, rounded once
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fastdino_kernels import backend
from torch import Tensor

from reliability.c_arguments import Draw

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "normal", "tiny", "special", "integer")
LAYOUTS = ("plain", "plain", "offset", "gaps", "transposed", "expanded")
STEP = 128.0  # exp(-128) is 0 in fp32, so softmax of distinct multiples is 0 and 1 exactly


@dataclass
class Problem:
    """``ours`` and ``oracle`` take leaves, rest and options alike; gradients are those of the leaves."""

    ours: Callable[..., Any]
    oracle: Callable[..., Any]
    leaves: list[Tensor]
    rest: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "normal"
    scale: float = 1e-3  # of terms that may cancel to something smaller
    gradients: bool = True  # of the first result are compared as well
    spreads: bool = False  # one NaN or infinity among the leaves may make every result NaN
    products: bool = False  # begins with matrix products, which round to the dtype of the leaves

    def shape(self) -> dict[str, Any]:
        """One line about it, for the message of a failure."""
        tensors = [x for x in (*self.leaves, *self.rest) if isinstance(x, Tensor)]
        shown = [f"{str(x.dtype)[6:]}{list(x.shape)}@{x.stride()}+{x.storage_offset()}" for x in tensors]
        return {"kind": self.kind, **self.options, "tensors": shown}


class Fuzz(Draw):
    """Tensors in odd layouts; ``small`` keeps to the sizes that Triton's interpreter takes in a second."""

    def __init__(self, seed: int, kind: str | None = None, small: bool = False) -> None:
        super().__init__(seed)
        self.kind = kind or self.choice(KINDS)
        self.small = small
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(shape, generator=self.generator)
        if self.kind in ("tiny", "special") and x.numel():
            some = torch.rand(shape, generator=self.generator) < 0.1
            x = torch.where(some, x * 1e-39, x)
        if self.kind == "special" and x.numel() and self.random() < 0.7:
            for _ in range(self.randint(1, 3)):
                x.view(-1)[self.randrange(x.numel())] = self.choice((torch.nan, torch.inf, -torch.inf))
        return x.to(dtype)

    def unit(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of length about 1."""
        return (self.normal(*shape) / max(1, shape[-1]) ** 0.5).to(dtype)

    def spread(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiples of STEP with one largest in each row."""
        x = torch.randint(-20, 20, (rows, columns), generator=self.generator).float()
        for row in x:
            row[self.randrange(columns)] = 21.0
        return (STEP * x).to(dtype)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same numbers (the first row for all, if they are expanded) somewhere else in memory."""
        layout = self.choice(LAYOUTS)
        if x.dim() == 0 or x.numel() == 0 or layout == "plain":
            return x
        if layout == "offset":
            at = self.randint(1, 3)
            return torch.cat([x.new_full((at,), 7), x.reshape(-1)])[at:].view(x.shape)
        if layout == "gaps":
            wide = x.new_full((*x.shape[:-1], x.shape[-1] + self.randint(1, 3)), 7)
            wide[..., : x.shape[-1]] = x
            return wide[..., : x.shape[-1]]
        if layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return x[:1].expand(x.shape) if self.kind != "integer" else x

    def views(self) -> tuple[int, int, int]:
        """V, G and B; a power of two of pairs where sums are to be exact."""
        if self.kind == "integer":
            return *self.choice(((2, 1), (2, 2), (3, 1), (3, 2), (5, 1), (5, 2))), self.choice((1, 2, 4))
        g = self.randint(1, 3)
        return self.randint(max(2, g), 5), g, self.randint(1, 4)

    def width(self, least: int = 1) -> int:
        return self.size(least, 33) if self.small else self.columns(self.choice((512, 1024, 4096)), least)

    def temps(self) -> tuple[float, float]:
        if self.kind == "integer":
            return 1.0, 1.0
        return self.choice((0.05, 0.1, 0.5)), self.choice((0.04, 0.2, 2.0))


def values_of(problem: Problem, function: Callable[..., Any], double: bool) -> list[Tensor]:
    """All results, then the gradients of the leaves along one direction, at times an expanded one."""

    def wide(x: Any) -> Any:
        return x.double() if double and isinstance(x, Tensor) and x.is_floating_point() else x

    leaves = [wide(x).detach().requires_grad_(problem.gradients) for x in problem.leaves]
    found = function(*leaves, *map(wide, problem.rest), **problem.options)
    results = list(found) if isinstance(found, tuple) else [found]
    value, results = results[0], [x.detach() for x in results]
    if not problem.gradients:
        return results
    if value.dim() == 0 or len(leaves[0]) % 2:
        direction = torch.full((), 2.0).expand(value.shape)
    else:
        direction = torch.linspace(-4, 4, max(1, value.numel()))[: value.numel()].view(value.shape).round()
    return results + list(torch.autograd.grad(value, leaves, direction.to(value)))


def check(problem: Problem, kind: str) -> None:
    """AssertionError if the backend ``kind`` does not give what ``problem.kind`` promises."""
    oracle = values_of(problem, problem.oracle, double=True)
    with backend(kind):
        found = values_of(problem, problem.ours, double=False)
    if problem.kind == "integer" and kind != "triton":  # whose kernels count in powers of 2, not of e
        for i, (value, truth) in enumerate(zip(found, oracle, strict=True)):
            rounded = truth.to(value.dtype)
            wrong = (value != rounded).nonzero()[:3].tolist()
            assert value.shape == truth.shape and not wrong, f"result {i} is not exact at {wrong}"
        return
    eager = values_of(problem, problem.oracle, double=False)
    strict = eager[0].isfinite().all()
    for i, (value, base, truth) in enumerate(zip(found, eager, oracle, strict=True)):
        assert value.shape == truth.shape, f"result {i}: shape {list(value.shape)}, not {list(truth.shape)}"
        hidden = value.isfinite() & ~base.isfinite() & ~truth.isfinite()
        spurious = ~value.isfinite() & base.isfinite()
        if problem.gradients and i >= len(found) - len(problem.leaves):
            # Eager code multiplies infinities by the 0 of what does not count; of a loss that is not finite
            # nobody takes the gradients.
            hidden &= False
            spurious &= strict
            if kind == "triton":  # a row with an infinity has NaN in all of its gradient
                spurious &= problem.leaves[i - len(found)].isfinite().all(-1, keepdim=True)
        wrong = (hidden if problem.spreads else hidden | spurious).nonzero()[:3].tolist()
        assert not wrong, f"result {i}: finite where eager code is not, or the reverse, at {wrong}"
        rounding = problem.leaves[0].dtype if problem.products else value.dtype
        eps = max(torch.finfo(rounding).eps, 16 * torch.finfo(torch.float32).eps)
        close(f"result {i}", value, base, truth, eps, problem.scale if value.dim() else 1.0)


def close(name: str, value: Tensor, base: Tensor, truth: Tensor, eps: float, scale: float) -> None:
    """Where both are finite, as near to ``truth`` as ``base`` (eager code), twice."""
    value, base = value.double(), base.double()
    finite = base.isfinite() & value.isfinite()
    value, base, truth = value[finite], base[finite], truth[finite]
    if value.numel() == 0:
        return
    error = (value - truth).abs().max().item()
    allowed = 2 * (base - truth).abs().max().item() + eps * max(truth.abs().max().item(), scale)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
