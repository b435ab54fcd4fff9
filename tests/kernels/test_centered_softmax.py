"""The teacher's targets, by every backend, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastdino_kernels import backend
from fastdino_kernels.centered_softmax import centered_softmax
from torch import Tensor


@pytest.fixture(params=["cpu", "triton", "reference"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "triton":
        yield request.getfixturevalue("triton_device")
    else:
        with backend(request.param if request.param == "reference" else "auto"):
            yield torch.device("cpu")


def problem(rows: int, k: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows * k)
    return scale * torch.randn(rows, k, generator=g), torch.randn(k, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "rows,k,scale,temp", [(3, 65, 1, 0.04), (1, 1, 1, 1.0), (2, 5001, 1e4, 0.01), (0, 7, 1, 1.0)]
)
def test_against_float64(
    device: torch.device, poisoned: None, rows: int, k: int, scale: float, temp: float, dtype: torch.dtype
) -> None:
    x, center = problem(rows, k, scale)
    x = x.to(dtype)
    got = centered_softmax(x.to(device), center.to(device), temp=temp).cpu()
    truth = ((x.double() - center.double()) / temp).softmax(-1)
    eager = ((x.float() - center) / temp).softmax(-1)
    bound = 2 * (eager - truth).abs().max() + 1.2e-7 if rows else 0
    assert got.dtype == torch.float32 and got.shape == x.shape
    assert rows == 0 or (got - truth).abs().max() <= bound


def test_excluded_prototypes_nan_and_strides(device: torch.device) -> None:
    x, center = problem(3, 4500)
    x[0, 3], x[1, :4200], x[2, 5] = -torch.inf, -torch.inf, torch.nan
    truth = ((x - center) / 0.04).softmax(-1)
    for y in (x, x.T.contiguous().T):
        got = centered_softmax(y.to(device), center.to(device), temp=torch.tensor(0.04)).cpu()
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-7, equal_nan=True)
    assert got[0, 3] == 0 and (got[1, :4200] == 0).all() and got[2].isnan().all()


def test_carries_no_gradient(device: torch.device) -> None:
    x, center = (y.to(device) for y in problem(3, 10))
    assert not centered_softmax(x.requires_grad_(), center, temp=0.1).requires_grad


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    x, center = (y.to(device) for y in problem(3, 300))
    compiled = torch.compile(
        lambda x: centered_softmax(x, center, temp=0.1), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), centered_softmax(x, center, temp=0.1))


def test_errors_name_the_argument() -> None:
    x, center = problem(3, 4)
    with pytest.raises(ValueError, match=r"logits: expected shape \[R, K\]"):
        centered_softmax(x[0], center, temp=0.1)
    with pytest.raises(ValueError, match=r"center: expected shape \[4\], got \[1, 4\]"):
        centered_softmax(x, center[None], temp=0.1)
    with pytest.raises(ValueError, match="temp: expected a temperature > 0"):
        centered_softmax(x, center, temp=0)
