"""The flash form of the prototype loss, interpreted where there is no GPU, against the float64 oracle."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import reference
from torch import Tensor

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # of the interpreter
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs sm_80"
    ),
]
flash = importlib.import_module("fastdino_kernels.gpu.prototype_flash")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # loss, batch center, entropy, dz, dW
SHAPES = [  # views, n_global, images, K, D
    (12, 2, 3, 37, 24),
    (2, 2, 1, 1, 1),
    (2, 1, 17, 70, 16),
    (4, 3, 2, 90, 40),
]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles: several of each kind even in small problems."""
    monkeypatch.setattr(flash, "blocks", lambda *_: flash.Blocks(16, 16, 16, 4, 2))


def problem(
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Inputs:
    views, n_global, images, k, d = shape
    g = torch.Generator().manual_seed(views * k + d)

    def unit(n: int) -> Tensor:
        return (scale * F.normalize(torch.randn(n, d, generator=g), dim=1)).to(device, dtype)

    center = 0.3 * torch.randn(k, generator=g)
    return unit(views * images), unit(k), unit(n_global * images), unit(k), center.to(device)


def run(
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    n_global: int = 2,
    s: float | Tensor = 0.1,
    u: float | Tensor = 0.04,
    factor: float = 1.0,
) -> Result:
    z, w = (x.detach().requires_grad_() for x in inputs[:2])
    loss, batch_center, entropy = function(z, w, *inputs[2:], s, u, n_global)[:3]
    (factor * loss).backward()
    assert z.grad is not None and w.grad is not None
    return loss.detach(), batch_center, entropy, z.grad, w.grad


def eager(z: Tensor, w: Tensor, y: Tensor, v: Tensor, c: Tensor, s: float, u: float, n_global: int) -> Any:
    return reference.prototype_loss(z, w, y, v, c, student_temp=s, teacher_temp=u, n_global=n_global)


def oracle(inputs: tuple[Tensor, ...], *arguments: Any, **options: Any) -> Result:
    return run(eager, tuple(x.double() for x in inputs), *arguments, **options)


def error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).abs().max().item()


def check(inputs: Inputs, n_global: int = 2, s: float = 0.1, u: float = 0.04) -> None:
    """Each value's error within twice eager code's, plus a rounding of the value and of the exponents."""
    got, base = (run(f, inputs, n_global, s, u) for f in (flash.prototype_loss_flash, eager))
    truth = oracle(inputs, n_global, s, u)
    dtype = inputs[0].dtype
    assert [x.dtype for x in got] == [torch.float32] * 3 + [dtype] * 2
    z, w, y, v, c = (x.double() for x in inputs)
    exponent = max((z @ w.T).abs().max() / s, (y @ v.T - c).abs().max() / u)
    of_exponents = torch.finfo(torch.float32).eps * exponent / s * max(z.abs().max(), w.abs().max())
    for i, (value, near, exact) in enumerate(zip(got, base, truth, strict=True)):
        rounding = torch.finfo(value.dtype).eps * exact.abs().max() + (of_exponents if i >= 3 else 0)
        assert error(value, exact) <= 2 * error(near, exact) + 2 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(
    triton_device: torch.device, poisoned: None, small: None, shape: Any, dtype: torch.dtype
) -> None:
    check(problem(shape, triton_device, dtype), shape[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("k,d", [(256, 256), (150, 192), (70, 384)])
def test_tiles_of_production(triton_device: torch.device, k: int, d: int, dtype: torch.dtype) -> None:
    check(problem((3, 2, 10, k, d), triton_device, dtype))


def test_tiles_of_fp32(triton_device: torch.device) -> None:
    check(problem((3, 2, 2, 70, 72), triton_device))


@pytest.mark.parametrize(
    "scale,s,u", [(100.0, 0.1, 0.04), (10.0, 0.01, 0.01), (5.0, 0.01, 0.01), (0.03, 1.0, 1.0)]
)
def test_extreme_logits_and_temperatures(
    triton_device: torch.device, small: None, scale: float, s: float, u: float
) -> None:
    check(problem((3, 2, 2, 90, 16), triton_device, scale=scale), 2, s, u)


def test_nan_and_infinity_reach_the_loss(triton_device: torch.device, small: None) -> None:
    for argument in range(4):
        for bad in (float("nan"), float("inf")):
            inputs = problem((3, 2, 2, 40, 16), triton_device)
            inputs[argument][1, 3] = bad
            assert flash.prototype_loss_flash(*inputs, 0.1, 0.04, 2)[0].isnan()


def test_an_excluded_prototype(triton_device: torch.device, small: None) -> None:
    inputs = problem((3, 2, 2, 40, 16), triton_device)
    inputs[4][:17] = float("inf")  # the first tile and more have no probability for the teacher
    got = run(flash.prototype_loss_flash, inputs)
    kept = run(flash.prototype_loss_flash, (*inputs[:3], inputs[3], inputs[4].clamp(max=1e4)))
    for value, other in zip(got, kept, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_probabilities_are_subtracted_before_they_are_rounded(
    triton_device: torch.device, dtype: torch.dtype
) -> None:
    z, w, _, _, center = problem((2, 2, 16, 1024, 32), triton_device, dtype)
    y, v = (
        torch.cat([z[16:], z[:16]]),
        (1.01 * w.float()).to(dtype),
    )  # almost a view's own output as its target
    inputs, scale = (z, w, y, v, center * 0), 2.0**16  # as of a loss scaler: fp16 has no 1e-8
    truth = oracle(inputs, 2, 1.0, 1.0, factor=scale)[4]
    p = (z.double() @ w.double().T).softmax(-1)
    eps = torch.finfo(dtype).eps
    rounded = eps / 4 * scale / 32 * (p.T.square() @ z.double().square()).sqrt().max()  # what it would cost
    got = run(flash.prototype_loss_flash, inputs, 2, 1.0, 1.0, factor=scale)[4]
    assert error(got, truth) <= eps * truth.abs().max().item() < rounded.item()


def test_fp16_keeps_small_probabilities(triton_device: torch.device) -> None:
    k, small_p = 1024, 1.5e-7  # 2.5 times the smallest positive fp16
    z, w, y = (torch.zeros(n, 16, device=triton_device) for n in (2, k, 2))
    z[:, 0], y[:, 0], w[0, 0], w[1:, 1] = 1.0, 1.0, 1.0, 1.0
    v, center = w.clone(), torch.zeros(k, device=triton_device)
    s = 1.0 / -torch.tensor(small_p).log().item()
    inputs = (*(x.half() for x in (z, w, y, v)), center)
    truth = oracle(inputs, 2, s, 0.01, factor=2.0**12)[3][:, 1]
    got = run(flash.prototype_loss_flash, inputs, 2, s, 0.01, factor=2.0**12)[3][:, 1]
    torch.testing.assert_close(got.double(), truth, rtol=5e-3, atol=0)


def test_backward_scales_repeats_and_takes_expanded_gradients(
    triton_device: torch.device, small: None
) -> None:
    inputs = problem((3, 2, 2, 40, 16), triton_device)
    base = run(flash.prototype_loss_flash, inputs)[3:]
    for x, b in zip(run(flash.prototype_loss_flash, inputs, factor=3.0)[3:], base, strict=True):
        torch.testing.assert_close(x, 3 * b, rtol=1e-6, atol=1e-9)
    z, w = (x.clone().requires_grad_() for x in inputs[:2])
    loss = flash.prototype_loss_flash(z, w, *inputs[2:], 0.1, 0.04, 2)[0]
    loss.expand(5).sum().backward(retain_graph=True)
    loss.backward()
    for x, b in zip((z.grad, w.grad), base, strict=True):
        torch.testing.assert_close(x, 6 * b, rtol=1e-6, atol=1e-9)


def test_strided_inputs_and_temperatures_in_tensors(triton_device: torch.device, small: None) -> None:
    inputs = problem((3, 2, 2, 40, 16), triton_device)
    expected = run(flash.prototype_loss_flash, inputs)
    strided = tuple(torch.stack([x, x + 1], -1)[..., 0] for x in inputs)
    assert not any(x.is_contiguous() for x in strided)
    temps = (torch.tensor(t, device=triton_device) for t in (0.1, 0.04))
    for x, y in zip(run(flash.prototype_loss_flash, strided, 2, *temps), expected, strict=True):
        assert torch.equal(x, y)
    repeated = (inputs[0][:1].expand(6, 16), *inputs[1:])
    for x, y in zip(
        run(flash.prototype_loss_flash, repeated),
        run(flash.prototype_loss_flash, tuple(x.contiguous() for x in repeated)),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("needs_z,needs_weight", [(True, False), (False, True), (False, False)])
def test_frozen_inputs_cost_nothing(
    triton_device: torch.device,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    needs_z: bool,
    needs_weight: bool,
) -> None:
    inputs = problem((3, 2, 2, 40, 16), triton_device)
    expected = run(flash.prototype_loss_flash, inputs)
    asked = []
    attend = flash._attend
    monkeypatch.setattr(flash, "_attend", lambda *a: asked.append(a[-2:]) or attend(*a))
    z, w = inputs[0].clone().requires_grad_(needs_z), inputs[1].clone().requires_grad_(needs_weight)
    loss, batch_center, entropy = flash.prototype_loss_flash(z, w, *inputs[2:], 0.1, 0.04, 2)
    assert asked == [(True, True), (False, needs_z)]  # (is the teacher's, makes O)
    assert [x.requires_grad for x in (loss, batch_center, entropy)] == [needs_z or needs_weight, False, False]
    if needs_z or needs_weight:
        loss.backward()
    for x, y in zip((loss, batch_center, entropy, z.grad, w.grad), expected, strict=True):
        assert x is None or torch.allclose(x, y, rtol=1e-6, atol=1e-7)
    assert (z.grad is not None, w.grad is not None) == (needs_z, needs_weight)
    with torch.no_grad():
        loss = flash.prototype_loss_flash(z, w, *inputs[2:], 0.1, 0.04, 2)[0]
        torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-7)


def test_bitwise_the_same_again(triton_device: torch.device, small: None) -> None:
    inputs = problem((3, 2, 3, 50, 24), triton_device, torch.float16)
    runs = [run(flash.prototype_loss_flash, inputs) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_wide_addresses(triton_device: torch.device, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem((3, 2, 3, 50, 24), triton_device)
    expected = run(flash.prototype_loss_flash, inputs)
    wide = []
    for name in ("attend_kernel", "merge_teacher_kernel", "merge_student_kernel", "weight_grad_kernel"):
        monkeypatch.setattr(flash, name, Spy(getattr(flash, name), wide))
    monkeypatch.setattr(flash, "needs_int64", lambda *_: True)
    got = run(flash.prototype_loss_flash, inputs)
    assert [options["INT64"] for options in wide] == [True] * 5
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


class Spy:
    """A kernel that notes the options of its launches."""

    def __init__(self, kernel: Any, seen: list[dict[str, Any]]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.seen.append(options)
            self.kernel[grid](*arguments, **options)

        return launch


def test_nothing_as_large_as_the_logits_is_allocated(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem((6, 2, 8, 4096, 16), triton_device, torch.bfloat16)
    sizes = []
    new_empty = Tensor.new_empty

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        out = new_empty(*arguments, **options)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(Tensor, "new_empty", recorded)
    z = inputs[0].requires_grad_()
    flash.prototype_loss_flash(z, *inputs[1:], 0.1, 0.04, 2)[0].backward()
    assert len(sizes) > 8 and max(sizes) <= 8 * 128 * 16 < 48 * 4096 / 10


def test_parts_cover_the_prototypes_and_stay_few() -> None:
    for row_blocks in (1, 2, 6, 12, 47, 300):
        for k_blocks in (1, 3, 64, 1024, 4096):
            for programs in (8, 108, 132, 216):
                parts, size = flash.split(row_blocks, k_blocks, programs)
                assert (parts - 1) * size < k_blocks <= parts * size
                assert parts <= max(1, 2 * programs // row_blocks, flash.MAX_SPLITS if row_blocks == 1 else 0)
    assert flash.split(6, 1024, 132) == (22, 47)  # ViT-S/16 on an H200: all at once
    parts, _ = flash.split(6, 4096, 132)
    rows, d = 768, 256
    assert 4 * parts * rows * d <= 4 * 132 * 128 * d < 0.03 * 2 * (2 * rows + 128) * 262144


def test_operators_are_well_formed(triton_device: torch.device, small: None) -> None:
    inputs = problem((3, 2, 2, 40, 16), triton_device, torch.float16)
    inputs[0].requires_grad_(), inputs[1].requires_grad_()
    temps = [torch.tensor(t, device=triton_device) for t in (0.1, 0.04)]
    torch.library.opcheck(flash._forward, (*inputs, *temps, 2, True))
    with torch.no_grad():
        state = flash._forward(*inputs, *temps, 2, True)[3:]
        arguments = (torch.tensor(2.0, device=triton_device), *inputs, *temps, *state, 2)
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            flash._backward,
            (*(x.detach() if isinstance(x, Tensor) else x for x in arguments), *needed),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiles_without_graph_breaks(triton_device: torch.device, small: None) -> None:
    inputs = problem((3, 2, 2, 40, 16), triton_device)

    def function(*arguments: Any) -> tuple[Tensor, ...]:
        loss, batch_center, entropy = flash.prototype_loss_flash(*arguments)
        return 2 * loss, batch_center, entropy

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for u in (0.04, 0.07):
        temp = torch.tensor(u, device=triton_device)
        expected = run(function, inputs, 2, 0.1, temp)
        for x, y in zip(run(compiled, inputs, 2, 0.1, temp), expected, strict=True):
            assert torch.equal(x, y)


def test_what_is_supported() -> None:
    assert flash.supports(256, torch.bfloat16, 90) and flash.supports(384, torch.float16, 80)
    assert flash.supports(384, torch.bfloat16, 100) and not flash.supports(512, torch.bfloat16, 100)
    assert not flash.supports(256, torch.float16, 70) and not flash.supports(768, torch.float16, 90)
    assert not flash.supports(256, torch.float32, 90)
