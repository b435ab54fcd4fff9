"""Norm or GELU and a linear layer in one, and 16-bit weights, against the plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.models import build_student_teacher
from fastdino.models.linear import Linear, attach_low_precision, gelu_linear, linear, norm_linear
from tests.models.test_models import SMALL, Config

ROWS, WIDTH, HIDDEN = 7, 8, 12
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"))]


class Pair(nn.Module):
    """LN -> Linear -> GELU -> Linear, in our form and by the modules."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.first, self.second = Linear(WIDTH, HIDDEN, bias), Linear(HIDDEN, WIDTH, bias)
        torch.manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_linear(norm_linear(x, self.norm, self.first), self.second)

    def plain(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(self.linear(self.norm(x), self.first)), self.second)

    @staticmethod
    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)


def rows(dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (3 * x + 1).to(device, dtype).requires_grad_()


def gradients(function, x: Tensor, model: nn.Module) -> list[Tensor]:
    inputs = [p for p in (x, *model.parameters()) if p.requires_grad]
    out = function(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return list(torch.autograd.grad(out, inputs, weight))


def kept_by(function) -> dict[int, int]:
    """Storages that are kept for the backward pass: number of uses."""
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        key = x.untyped_storage().data_ptr()
        found[key] = found.get(key, 0) + 1
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found_out = function()
    assert found_out is not None
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias) -> None:
    model = Pair(bias).double()
    parameters = list(model.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (rows(), *parameters))
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (rows(), *parameters))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_modules(dtype) -> None:
    model, x = Pair().to(dtype), rows(dtype)
    assert torch.equal(model(x), model.plain(x))
    for got, want in zip(gradients(model, x, model), gradients(model.plain, x, model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_autocast_rounds_where_the_modules_do(stream, low, device) -> None:
    model, x = Pair().to(device), rows(stream, device)
    if low:
        attach_low_precision(model, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        got, want = model(x), model.plain(x)
        grads = gradients(model, x, model), gradients(model.plain, x, model)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 if device == "cuda" else 0)
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 2 * torch.finfo(torch.bfloat16).eps * b.double().norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_model_in_16_bits(dtype) -> None:
    model, x = Pair().to(dtype), rows(dtype)
    torch.testing.assert_close(model(x), model.plain(x), rtol=2e-2, atol=0)
    for got, want in zip(gradients(model, x, model), gradients(model.plain, x, model), strict=True):
        assert got.dtype == dtype
        assert (got.float() - want.float()).norm() <= 4 * torch.finfo(dtype).eps * want.float().norm()


@pytest.mark.parametrize("trained", ["input", "norm", "first.weight", "first.bias", "second.weight"])
def test_what_is_frozen_takes_no_gradient(trained) -> None:
    model, x = Pair().double(), rows().requires_grad_(trained == "input")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trained))
    for got, want in zip(gradients(model, x, model), gradients(model.plain, x, model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    model(x).sum().backward()
    assert all((p.grad is None) != p.requires_grad for p in (x, *model.parameters()))


def test_keeps_only_what_comes_in() -> None:
    model, x = Pair(), rows(torch.float32)
    attach_low_precision(model, torch.bfloat16)
    given = {t.data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_by(lambda: norm_linear(x, model.norm, model.first)).keys() <= given
        h = norm_linear(x, model.norm, model.first)
        assert kept_by(lambda: gelu_linear(h, model.second)).keys() <= given | {h.data_ptr()}
        assert kept_by(lambda: model.first(h[:, :WIDTH])).keys() <= given | {h.data_ptr()}
        with torch.no_grad():
            assert not kept_by(lambda: model(x))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_traces_whole(low, autocast) -> None:
    torch._dynamo.reset()
    model, x = Pair(), rows(torch.float32)
    if low:
        attach_low_precision(model, torch.bfloat16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-1 if autocast else 1e-5)
        both = gradients(compiled, x, model), gradients(model, x, model)
    for got, want in zip(*both, strict=True):
        assert (got - want).norm() <= (1e-2 if autocast else 1e-5) * want.norm()


def test_recomputed_by_a_checkpoint() -> None:
    model, x = Pair().double(), rows()

    def inside(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    for got, want in zip(gradients(inside, x, model), gradients(model, x, model), strict=True):
        assert torch.equal(got, want)


# -- 16-bit weights ----------------------------------------------------------------------------------------


def test_a_copy_takes_part_only_in_its_own_type() -> None:
    layer, x = Linear(WIDTH, HIDDEN), rows(torch.float32)
    plain = copy.deepcopy(layer)
    (low,) = attach_low_precision(layer, torch.bfloat16).values()
    low.zero_()
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.bias.bfloat16().expand(ROWS, -1))
        norm = nn.LayerNorm(WIDTH)
        assert torch.equal(norm_linear(x, norm, layer), layer.bias.bfloat16().expand(ROWS, -1))
        assert not torch.equal(gelu_linear(x, plain), plain.bias.bfloat16().expand(ROWS, -1))
        assert torch.equal(gelu_linear(x, layer), layer.bias.bfloat16().expand(ROWS, -1))


@pytest.mark.parametrize("shape", [(WIDTH,), (5, WIDTH), (2, 5, WIDTH)])
def test_linear_with_a_copy_equals_a_cast(shape) -> None:
    layer, x = Linear(WIDTH, HIDDEN), torch.randn(shape, requires_grad=True)
    low = layer.weight.detach().bfloat16()

    def with_copy(x: Tensor) -> Tensor:
        return linear(x, layer.weight, layer.bias, low)

    with torch.autocast("cpu", torch.bfloat16):
        got, want = with_copy(x), layer(x)
        both = gradients(with_copy, x, layer), gradients(layer, x, layer)
    assert got.shape == want.shape and got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-6)
    for a, b in zip(*both, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-6)


def test_part_of_a_layer() -> None:
    norm, layer, x = nn.LayerNorm(WIDTH), Linear(WIDTH, HIDDEN), rows(torch.float32)
    attach_low_precision(layer, torch.bfloat16)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            whole, part = norm_linear(x, norm, layer), norm_linear(x, norm, layer, slice(3, 7))
            torch.testing.assert_close(part, whole[:, 3:7], rtol=2e-2 if autocast else 1e-6, atol=1e-6)
            grads = gradients(lambda x: norm_linear(x, norm, layer, slice(3, 7)), x, layer)
        assert not grads[1][:3].any() and not grads[1][7:].any() and grads[1][3:7].all()


def test_copies_of_a_model() -> None:
    student, teacher = build_student_teacher(Config(model=SMALL))
    names = list(student.state_dict())
    copies = attach_low_precision(student, torch.float16)
    of = {name: copies[p] for name, p in student.named_parameters() if p in copies}
    assert list(student.state_dict()) == names and len(of) == len(copies)
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    expected = {f"backbone.blocks.{i}.{layer}.weight" for i in (0, 1) for layer in layers}
    expected |= {f"head.mlp.{i}.weight" for i in (0, 2, 4)} | {"backbone.patch_embed.proj.weight"}
    assert set(of) == expected
    for name, p in student.named_parameters():
        assert name not in of or (of[name].dtype == torch.float16 and torch.equal(of[name], p.half()))
    assert not any(module.low_precision is not None for module in teacher.modules() if type(module) is Linear)


def test_copies_are_refilled_in_place_and_follow_a_deepcopy() -> None:
    layer = Linear(WIDTH, HIDDEN)
    (low,) = attach_low_precision(layer, torch.bfloat16).values()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.add_(1)
    (again,) = attach_low_precision(layer, torch.bfloat16).values()
    assert again is low is layer.low_precision and torch.equal(low, layer.weight.bfloat16())
    assert twin.low_precision is not None and not torch.equal(twin.low_precision, low)
    (other,) = attach_low_precision(layer, torch.float16).values()
    assert other.dtype == torch.float16 and other is layer.low_precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_see_features_without_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(16), Linear(16, 24)
    x, seen = torch.randn(5, 16), []
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        trained = norm_linear(x, norm, layer)
        with torch.no_grad():
            evaluated = norm_linear(x, norm, layer)
            hidden = gelu_linear(evaluated, Linear(24, 3))
    assert len(seen) == 1 and seen[0] is evaluated and hidden.shape == (5, 3)
    torch.testing.assert_close(evaluated, trained)
