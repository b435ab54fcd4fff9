"""Grouped attention against the formula in float64, and all backends against the one called math.

The CUDA kernels run where there is a GPU; elsewhere their calls are traced on the meta device, and what is
handed to the kernels for many crops is computed by a stand-in that knows nothing but the bounds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.models import attention as module
from fastdino.models.attention import (
    BACKENDS,
    Packing,
    attention,
    attention_map,
    cls_attention,
    describe_attention,
    pack,
    resolve_attention,
)

GROUPS = ((3, 7), (1, 1), (5, 4))
HEADS, DIM = 3, 24
STARTS = [0, 7, 14, 21, 22, 26, 30, 34, 38]
CUDA = torch.cuda.is_available()


def formula(qkv: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    outputs, start = [], 0
    for crops, tokens in groups:
        for _ in range(crops):
            q, k, v = qkv[start : start + tokens].chunk(3, dim=1)
            start += tokens
            heads = zip(q.chunk(HEADS, 1), k.chunk(HEADS, 1), v.chunk(HEADS, 1), strict=True)
            scale = math.sqrt(q.shape[1] / HEADS)
            outputs.append(torch.cat([(a @ b.T / scale).softmax(-1) @ c for a, b, c in heads], 1))
    return torch.cat(outputs)


def random_qkv(dim: int) -> Tensor:
    rows = sum(crops * tokens for crops, tokens in GROUPS)
    return torch.randn(rows, 3 * dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


@pytest.fixture
def qkv() -> Tensor:
    return random_qkv(DIM)


def gradient(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weight.to(out.device)).sum(), inputs)


def packed(dtype: torch.dtype, backend: str = "sdpa") -> Packing:
    return pack(GROUPS, backend, "cpu", dtype)


def of_cls(x: Tensor, packing: Packing) -> Tensor:
    """Attention of the first tokens, for the same input as the whole one."""
    dim = x.shape[1] // 3
    return cls_attention(x[STARTS, :dim], x[:, dim:], packing, HEADS)


def whole(x: Tensor, packing: Packing) -> Tensor:
    return attention(x, packing, HEADS)


def test_attention(qkv) -> None:
    got = attention(qkv, packed(torch.float64), HEADS)
    torch.testing.assert_close(got, formula(qkv, GROUPS), rtol=1e-12, atol=1e-12)
    qkv.requires_grad_()
    (got,) = gradient(lambda x: attention(x, packed(torch.float64), HEADS), qkv)
    (want,) = gradient(lambda x: formula(x, GROUPS), qkv)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_cls_attention(qkv) -> None:
    qkv.requires_grad_()

    def got(x: Tensor) -> Tensor:
        return of_cls(x, packed(torch.float64))

    def want(x: Tensor) -> Tensor:
        return formula(x, GROUPS)[STARTS]

    torch.testing.assert_close(got(qkv), want(qkv), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(got, qkv)[0], gradient(want, qkv)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "unit", "autocast"),
    [
        (torch.float32, 2**-23, False),
        (torch.bfloat16, 2**-8, False),
        (torch.bfloat16, 2**-8, True),
        (torch.float16, 2**-11, False),
        (torch.float16, 2**-11, True),
    ],
)
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_lower_precision(qkv, dtype, unit, autocast, backend) -> None:
    low = qkv.to(dtype).requires_grad_()
    exact = low.detach().double().requires_grad_()
    packing = packed(dtype, backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(low, packing, HEADS)
    assert out.dtype == dtype
    want = formula(exact, GROUPS)
    # Logits reach about 30, so that rounding them alone moves probabilities by 30 units.
    assert (out.double() - want).abs().max() < 40 * unit
    (got_grad,) = gradient(lambda x: attention(x, packing, HEADS).double(), low)
    (want_grad,) = gradient(lambda x: formula(x, GROUPS), exact)
    assert got_grad.dtype == dtype
    assert (got_grad.double() - want_grad).norm() < 20 * unit * want_grad.norm()


@pytest.mark.parametrize("form", [whole, of_cls])
@pytest.mark.parametrize("head_dim", [64, 48, 32, 24])
@pytest.mark.parametrize("kernel", ["flash-cpu", "flash-cpu in fp32", "dense"])
def test_every_kernel_of_the_cpu_equals_math(kernel, head_dim, form) -> None:
    dtype = torch.bfloat16 if kernel == "dense" else torch.float32
    x = random_qkv(HEADS * head_dim).to(dtype).requires_grad_()
    oracle = packed(dtype, "math")
    ours = packed(dtype)._replace(kernels=(kernel,) * 3)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(form(x, ours), form(x, oracle), rtol=0, atol=40 * unit)
    (got,), (want,) = gradient(lambda x: form(x, ours), x), gradient(lambda x: form(x, oracle), x)
    assert (got - want).norm() < 40 * unit * want.norm()


def test_gradients_that_are_no_plain_rows(qkv) -> None:
    qkv.requires_grad_()
    packing = packed(torch.float64)
    (expanded,) = torch.autograd.grad(attention(qkv, packing, HEADS).sum(), qkv)
    (want,) = torch.autograd.grad(formula(qkv, GROUPS).sum(), qkv)
    torch.testing.assert_close(expanded, want, rtol=1e-10, atol=1e-12)
    (transposed,) = torch.autograd.grad((attention(qkv, packing, HEADS).T @ qkv[:, :5]).sum(), qkv)
    (want,) = torch.autograd.grad((formula(qkv, GROUPS).T @ qkv[:, :5]).sum(), qkv)
    torch.testing.assert_close(transposed, want, rtol=1e-10, atol=1e-12)


def test_keeps_its_input_its_output_and_the_row_statistics() -> None:
    x = random_qkv(DIM).bfloat16().requires_grad_()
    packing = packed(torch.bfloat16)._replace(kernels=("flash-cpu",) * 3)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attention(x, packing, HEADS)
    assert sum(kept.values()) == x.nbytes + out.nbytes + 4 * HEADS * len(x)
    assert out.untyped_storage()._cdata in kept
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.no_grad():
        attention(x, packing, HEADS)
    assert not kept


def test_attention_map(qkv) -> None:
    rows = qkv[:21]
    probabilities = attention_map(rows, 3, HEADS)
    assert probabilities.shape == (3, HEADS, 7, 7)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, HEADS, 7, dtype=torch.float64))
    values = rows.view(3, 7, 3, HEADS, -1)[:, :, 2].transpose(1, 2)
    mixed = (probabilities @ values).transpose(1, 2).reshape(21, DIM)
    torch.testing.assert_close(mixed, formula(rows, ((3, 7),)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_one_group(qkv, backend) -> None:
    rows = qkv[:21].requires_grad_()
    packing = pack(((3, 7),), backend, "cpu", torch.float64)
    want = formula(rows, ((3, 7),))
    torch.testing.assert_close(attention(rows, packing, HEADS), want, rtol=1e-12, atol=1e-12)
    (got,) = gradient(lambda x: attention(x, packing, HEADS), rows)
    (want,) = gradient(lambda x: formula(x, ((3, 7),)), rows)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# -- all crops in one call ---------------------------------------------------------------------------------


def by_bounds(q: Tensor, k: Tensor, v: Tensor, q_bounds: list[int], k_bounds: list[int]) -> Tensor:
    """[M, heads, d] and twice [T, heads, d] -> [M, heads, d], crop by crop."""
    outputs = []
    for i in range(len(q_bounds) - 1):
        own = slice(q_bounds[i], q_bounds[i + 1])
        others = slice(k_bounds[i], k_bounds[i + 1])
        logits = torch.einsum("mhd,nhd->hmn", q[own], k[others]) / math.sqrt(q.shape[-1])
        outputs.append(torch.einsum("hmn,nhd->mhd", logits.softmax(-1), v[others]))
    return torch.cat(outputs)


def checked(q: Tensor, k: Tensor, q_bounds: Tensor, k_bounds: Tensor, most_q: int, most_k: int) -> None:
    for x, bounds, most in ((q, q_bounds, most_q), (k, k_bounds, most_k)):
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(x)
        assert most == bounds.diff().max()


def stand_in_varlen(monkeypatch: pytest.MonkeyPatch) -> str:
    def varlen_attn(q, k, v, q_bounds, k_bounds, most_q, most_k) -> Tensor:  # type: ignore[no-untyped-def]
        checked(q, k, q_bounds, k_bounds, most_q, most_k)
        return by_bounds(q, k, v, q_bounds.tolist(), k_bounds.tolist())

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return "flash"


def stand_in_efficient(monkeypatch: pytest.MonkeyPatch) -> str:
    def efficient(q, k, v, bias, q_bounds, k_bounds, most_q, most_k, *rest):  # type: ignore[no-untyped-def]
        assert bias is None and rest == (0.0, 0, True)
        checked(q[0], k[0], q_bounds, k_bounds, most_q, most_k)
        return by_bounds(q[0], k[0], v[0], q_bounds.tolist(), k_bounds.tolist())[None], None

    monkeypatch.setattr(module, "aten", SimpleNamespace(_efficient_attention_forward=efficient))
    return "efficient"


def stand_in_xformers(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """A package with the few names that are used; its mask knows the lengths it was made from."""

    class BlockDiagonalMask:
        @staticmethod
        def from_seqlens(q_lengths, k_lengths=None, *, device) -> list[list[int]]:  # type: ignore[no-untyped-def]
            lengths = (q_lengths, k_lengths or q_lengths)
            return [[sum(x[:i]) for i in range(len(x) + 1)] for x in lengths]

    def memory_efficient_attention(q, k, v, *, attn_bias, op) -> Tensor:  # type: ignore[no-untyped-def]
        assert op == (f"{family} forward", f"{family} backward")
        return by_bounds(q[0], k[0], v[0], *attn_bias)[None]

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    fmha = ModuleType("xformers.ops.fmha")
    for name in ("flash", "cutlass"):
        setattr(fmha, name, SimpleNamespace(FwOp=f"{name} forward", BwOp=f"{name} backward"))
    fmha.BlockDiagonalMask = BlockDiagonalMask  # type: ignore[attr-defined]
    fmha.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    package._cpp_lib = SimpleNamespace(_cpp_library_load_exception=None)  # type: ignore[attr-defined]
    package.ops, ops.fmha = ops, fmha  # type: ignore[attr-defined]
    for x in (package, ops, fmha):
        monkeypatch.setitem(sys.modules, x.__name__, x)


@pytest.fixture(params=["varlen flash", "varlen efficient", "xformers flash", "xformers efficient"])
def in_one_call(request, monkeypatch):
    """A packing whose kernel is a stand-in."""
    backend, kernel = request.param.split()
    if backend == "xformers":
        stand_in_xformers(monkeypatch, "cutlass" if kernel == "efficient" else kernel)
    elif kernel == "flash":
        stand_in_varlen(monkeypatch)
    else:
        stand_in_efficient(monkeypatch)
    pack.cache_clear()
    yield packed(torch.float64, backend)._replace(kernels=(kernel,) * 3)
    pack.cache_clear()


@pytest.mark.parametrize("form", [whole, of_cls])
def test_one_call_for_all_crops_equals_math(qkv, in_one_call, form) -> None:
    qkv.requires_grad_()
    oracle = packed(torch.float64, "math")
    torch.testing.assert_close(form(qkv, in_one_call), form(qkv, oracle), rtol=1e-12, atol=1e-12)
    (got,), (want,) = gradient(lambda x: form(x, in_one_call), qkv), gradient(lambda x: form(x, oracle), qkv)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_bounds_are_made_once_and_for_training() -> None:
    pack.cache_clear()
    with torch.inference_mode():
        first = pack(GROUPS, "varlen", "cpu", torch.bfloat16)
    again = pack(GROUPS, "varlen", "cpu", torch.bfloat16)
    assert first is again and first.tokens is not None and first.cls is not None
    assert first.tokens.k_bounds.tolist() == [*STARTS, 42] == first.cls.k_bounds.tolist()
    assert first.cls.q_bounds.tolist() == list(range(10))
    assert (first.tokens.longest_q, first.tokens.longest_k) == (7, 7)
    assert (first.cls.longest_q, first.cls.longest_k) == (1, 7)
    for x in (first.tokens.q_bounds, first.cls.q_bounds):
        assert x.dtype == torch.int32 and not x.is_inference()


# -- CUDA kernels without CUDA -----------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch) -> Callable[[tuple[int, int]], None]:
    """Pretend that GPUs have some compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(module, "capability", lambda device: capability)
        pack.cache_clear()

    yield pretend
    pack.cache_clear()


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
@pytest.mark.parametrize("head_dim", [64, 48, 32, 24])
@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        ((9, 0), torch.bfloat16, "flash"),
        ((8, 0), torch.float16, "flash"),
        ((8, 0), torch.float32, "efficient"),
        ((7, 0), torch.float16, "efficient"),
        ((7, 0), torch.float32, "efficient"),
    ],
)
def test_gpu_kernels_are_called_by_name(gpu, monkeypatch, backend, head_dim, capability, dtype, kernel):
    """The meta device has the shapes and the gradients of the very operators that a GPU would run."""
    gpu(capability)
    packing = pack(GROUPS, backend, "meta", dtype)
    assert set(packing.kernels) == {kernel}
    dim = HEADS * head_dim
    x = torch.empty(42, 3 * dim, dtype=dtype, device="meta", requires_grad=True)
    q = torch.empty(9, dim, dtype=dtype, device="meta", requires_grad=True)
    called = Calls()
    with called:
        out = attention(x, packing, HEADS)
        (dx,) = torch.autograd.grad(out.sum(), x)
        cls = cls_attention(q, x[:, dim:], packing, HEADS)
        dq, dkv = torch.autograd.grad(cls.sum(), (q, x))
    assert out.shape == (42, dim) and cls.shape == (9, dim) and out.dtype == cls.dtype == dtype
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in ((dx, x), (dq, q), (dkv, x)))
    names = {
        ("sdpa", "flash"): "aten::_scaled_dot_product_flash_attention",
        ("sdpa", "efficient"): "aten::_scaled_dot_product_efficient_attention",
        ("varlen", "flash"): "torch_attn::_varlen_attn",
        ("varlen", "efficient"): "aten::_efficient_attention",
    }
    name = names[backend, kernel]
    ours = [x for x in called.names if "attention" in x or "attn" in x]
    assert ours and all(x.startswith(name) for x in ours) and any("backward" in x for x in ours)
    assert not any("softmax" in x or "bmm" in x for x in called.names)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


# -- choice ------------------------------------------------------------------------------------------------


def resolve(choice: str, **changes) -> str:
    where = dict(device="cuda", dtype=torch.bfloat16, head_dim=64) | changes
    return resolve_attention(choice, **where)


def test_auto_is_sdpa_everywhere(gpu, monkeypatch) -> None:
    assert resolve("auto", device="cpu") == resolve("sdpa", device="cpu", head_dim=5) == "sdpa"
    gpu((7, 0))
    monkeypatch.setattr(module, "_trial", lambda *args: None)
    assert resolve("auto", dtype=torch.float16) == "sdpa"
    assert [resolve("math", head_dim=5, dtype=torch.float64, device=d) for d in ("cpu", "cuda")] == [
        "math"
    ] * 2


def test_kernels_are_told_to_people(gpu) -> None:
    def told(backend: str, device: str, dtype: torch.dtype) -> str:
        return describe_attention(backend, device=device, dtype=dtype)

    assert told("sdpa", "cpu", torch.float32) == "sdpa (flash-cpu)"
    assert told("sdpa", "cpu", torch.bfloat16) == "sdpa (dense; above 1024 tokens flash-cpu in fp32)"
    assert told("math", "cpu", torch.float32) == "math"
    gpu((8, 0))
    assert told("sdpa", "cuda", torch.bfloat16) == "sdpa (flash)"
    assert told("xformers", "cuda", torch.float32) == "xformers (cutlass)"
    gpu((7, 0))
    assert told("sdpa", "cuda", torch.float16) == "sdpa (efficient)"
    assert told("varlen", "cuda", torch.float16) == "varlen (efficient)"


@pytest.mark.parametrize(
    ("choice", "capability", "changes", "message"),
    [
        ("flash", (8, 0), {}, "expected one of auto, sdpa, xformers, varlen, math, got 'flash'"),
        ("varlen", (8, 0), {"device": "cpu"}, "varlen expected a CUDA device, got cpu"),
        ("xformers", (8, 0), {"device": "cpu"}, "xformers expected a CUDA device, got cpu"),
        ("auto", (8, 0), {"head_dim": 20}, "sdpa expected heads whose width is a multiple of 8, got 20"),
        ("varlen", (8, 0), {"head_dim": 264}, "varlen expected heads of at most 256 channels, got 264"),
        ("sdpa", (8, 0), {"dtype": torch.float64}, "expected float16, bfloat16 or float32, got float64"),
        ("sdpa", (7, 0), {}, "expected float16 or float32 on compute capability 7.0, got bfloat16"),
    ],
)
def test_refusals_name_what_was_expected_and_what_came(gpu, choice, capability, changes, message) -> None:
    gpu(capability)
    with pytest.raises(ConfigError, match=f"--attention: .*{message}"):
        resolve(choice, **changes)


def test_xformers_must_be_installed(gpu, monkeypatch) -> None:
    gpu((8, 0))
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ConfigError, match="xformers expected the package xformers, got .*xformers"):
        resolve("xformers")


def test_xformers_of_another_cuda_is_told_apart(gpu, monkeypatch) -> None:
    """A wheel that cannot load its library imports well, and refuses kernels that do not need the library."""
    gpu((8, 0))
    stand_in_xformers(monkeypatch, "flash")
    error = RuntimeError("xFormers can't load C++/CUDA extensions")
    error.__cause__ = OSError("libcudart.so.12: cannot open shared object file")
    sys.modules["xformers"]._cpp_lib._cpp_library_load_exception = error
    with pytest.raises(ConfigError, match=r"does not load \(libcudart.so.12: cannot open"):
        resolve("xformers")


def test_a_trial_shows_what_a_kernel_refuses(gpu) -> None:
    gpu((8, 0))
    assert module._trial("sdpa", torch.device("meta"), torch.bfloat16, 64) is None
    problem = module._trial("varlen", torch.device("cpu"), torch.float32, 64)
    assert problem is not None and problem.startswith("failed on cpu: Could not run")


# -- with a GPU --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("form", [whole, of_cls])
@pytest.mark.parametrize("head_dim", [64, 48, 32, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_on_a_gpu(backend, dtype, head_dim, form) -> None:
    try:
        resolve(backend, dtype=dtype, head_dim=head_dim)
    except ConfigError as error:
        pytest.skip(str(error))
    x = random_qkv(HEADS * head_dim).to("cuda", dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    packing, oracle = pack(GROUPS, backend, "cuda", dtype), pack(GROUPS, "math", "cuda", torch.float64)
    eager = pack(GROUPS, "math", "cuda", dtype)
    unit = torch.finfo(dtype).eps
    want = form(exact, oracle)
    bound = 2 * (form(x, eager).double() - want).abs().max() + unit * want.abs().max()
    assert (form(x, packing).double() - want).abs().max() <= bound
    (want,) = gradient(lambda x: form(x, oracle), exact)
    (plain,), (got,) = gradient(lambda x: form(x, eager), x), gradient(lambda x: form(x, packing), x)
    # Fused kernels form the gradient of a logit from the rounded output.
    assert (got.double() - want).norm() <= 4 * (plain.double() - want).norm() + 8 * unit * want.norm()
