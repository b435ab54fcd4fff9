"""The Triton form of the loss between matched rows: on a GPU, or interpreted on the CPU."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import backend, reference
from fastdino_kernels.patch_loss import patch_loss
from torch import Tensor

pytest.importorskip("triton")
implementation = importlib.import_module("fastdino_kernels.matched_loss")
gpu = importlib.import_module("fastdino_kernels.gpu.matched_loss")
kernels = importlib.import_module("fastdino_kernels.gpu.matched_kernels")
matched_loss = implementation.matched_loss

SHAPES = [  # student rows, teacher rows, targets, K, D
    (7, 5, 2, 700, 8),
    (1, 1, 1, 1, 1),
    (9, 3, 3, 257, 300),
    (5, 9, 1, 512, 16),
]
TEMPS = dict(student_temp=0.1, teacher_temp=0.04)
# Interpreted, the lanes that a mask leaves out of the result warn of 0 / 0 and the like.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def loops(
    z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, match: Tensor, row_weight: Tensor
) -> Tensor:
    """The definition: one student row, one target after another."""
    log_q = (F.linear(z, w).to(c.dtype) / 0.1).log_softmax(-1)
    p = ((F.linear(y, wt).to(c.dtype) - c) / 0.04).softmax(-1)
    zero = (0 * z).sum() + (0 * w).sum()
    pairs = [(r, t) for r, targets in enumerate(match.tolist()) for t in targets if t >= 0]
    return sum((-row_weight[r].to(c.dtype) * (p[t] * log_q[r]).sum() for r, t in pairs), zero)


def problem(
    rows: int, teacher_rows: int, targets: int, k: int, d: int, dtype=torch.float32, device="cpu"
) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows * k + d)
    z, w, y, wt = (torch.randn(n, d, generator=g) for n in (rows, k, teacher_rows, k))
    match = torch.randint(-1, teacher_rows, (rows, targets), generator=g)
    match[0, 0] = teacher_rows - 1
    match[rows // 2 + 1 :: 5] = -1  # rows without a target
    unit = (F.normalize(x, dim=1).to(dtype) for x in (z, w, y, wt))
    return [
        x.to(device) for x in (*unit, 0.3 * torch.randn(k, generator=g), match, torch.rand(rows, generator=g))
    ]


def double(inputs) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


def fused(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, match: Tensor, row_weight=None) -> Tensor:
    return matched_loss(z, w, y, wt, c, match, row_weight=row_weight, **TEMPS).loss


def loss_and_grads(function, z: Tensor, w: Tensor, *rest, factor: float = 1.0):
    z, w = z.detach().requires_grad_(), w.detach().requires_grad_()
    loss = function(z, w, *rest)
    (factor * loss).backward()
    assert z.grad is not None and w.grad is not None
    return loss.detach(), z.grad, w.grad


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several records, several chunks, and several steps of every loop, even of a small problem."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    monkeypatch.setattr(kernels, "MERGE_BLOCKS", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_loops(
    triton_device: torch.device, poisoned: None, shape: tuple, dtype: torch.dtype
) -> None:
    inputs = problem(*shape, dtype, triton_device)
    kernel = loss_and_grads(fused, *inputs)
    oracle = loss_and_grads(loops, *double(inputs))
    eager = loss_and_grads(loops, *inputs)
    eps = torch.finfo(dtype).eps
    for value, base, truth in zip(kernel, eager, oracle, strict=True):
        assert error(value, truth) <= 2 * error(base, truth) + eps * truth.abs().max().item()
    assert kernel[1].dtype == dtype and kernel[2].dtype == dtype and kernel[0].dtype == torch.float32
    out = matched_loss(*inputs[:6], row_weight=inputs[6], **TEMPS)
    truth = reference.matched_loss(*double(inputs[:6]), row_weight=inputs[6].double(), **TEMPS)
    with backend("reference"):
        base = matched_loss(*inputs[:6], row_weight=inputs[6], **TEMPS)
    for name in ("batch_center", "teacher_entropy", "kl"):
        value, of_eager, exact = (getattr(x, name) for x in (out, base, truth))
        assert value.dtype == torch.float32
        assert error(value, exact) <= 2 * error(of_eager, exact) + max(eps, 1e-6) * exact.abs().max().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_fp32_everything_agrees_to_rounding(triton_device: torch.device, shape: tuple) -> None:
    inputs = problem(*shape, device=triton_device)
    kernel, oracle = loss_and_grads(fused, *inputs), loss_and_grads(loops, *double(inputs))
    for value, truth in zip(kernel, oracle, strict=True):
        assert error(value, truth) <= 3e-6 * truth.abs().max().item()


def test_equal_weights_are_the_default(triton_device: torch.device) -> None:
    z, w, y, wt, c, match, _ = problem(7, 5, 2, 300, 8, device=triton_device)
    equal = torch.full((7,), 1 / int((match >= 0).sum()), device=triton_device)
    expected = loss_and_grads(fused, z, w, y, wt, c, match, equal)
    for a, b in zip(loss_and_grads(fused, z, w, y, wt, c, match), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_rows_without_a_target_count_for_nothing(triton_device: torch.device) -> None:
    z, w, y, wt, c, match, row_weight = problem(9, 7, 2, 300, 8, device=triton_device)
    empty = (match < 0).all(1)
    assert empty.any() and not empty.all()
    loss, dz, _ = loss_and_grads(fused, z, w, y, wt, c, match, row_weight)
    none = torch.full_like(match, -1)
    for nothing in ((none,), (match, 0 * row_weight)):
        for value in loss_and_grads(fused, z, w, y, wt, c, *nothing):
            assert not value.any()
    z[empty] = float("nan")
    again = loss_and_grads(fused, z, w, y, wt, c, match, row_weight)
    assert torch.equal(again[0], loss) and torch.equal(again[1], dz) and not dz[empty].any()


def test_extreme_features_and_temperatures(triton_device: torch.device) -> None:
    z, w, y, wt, c, match, row_weight = problem(7, 5, 2, 300, 8, device=triton_device)
    inputs = (100 * z, 100 * w, 100 * y, 100 * wt, c, match, row_weight)  # logits up to 1e4
    kernel, oracle = loss_and_grads(fused, *inputs), loss_and_grads(loops, *double(inputs))
    eager = loss_and_grads(loops, *inputs)
    for value, base, truth in zip(kernel, eager, oracle, strict=True):
        assert value.isfinite().all()
        assert error(value, truth) <= 2 * error(base, truth) + 1.2e-7 * truth.abs().max().item()
    temps = dict(student_temp=torch.tensor(0.01), teacher_temp=torch.tensor(0.01, device=triton_device))
    got = matched_loss(z, w, y, wt, c, match, row_weight=row_weight, **temps)
    doubles = double((z, w, y, wt, c, match))
    truth = reference.matched_loss(
        *doubles, row_weight=row_weight.double(), student_temp=0.01, teacher_temp=0.01
    )
    torch.testing.assert_close(got.loss.double(), truth.loss, rtol=1e-5, atol=0)


def test_nan_and_infinity_reach_the_loss(triton_device: torch.device) -> None:
    for bad in (float("nan"), float("inf")):
        for argument in (0, 2):
            inputs = problem(7, 5, 2, 300, 8, device=triton_device)
            inputs[argument][-1 if argument else 0, 3] = bad
            inputs[5][0] = 4
            assert fused(*inputs).isnan()
    z, w, y, wt, c, match, row_weight = problem(7, 5, 2, 300, 8, device=triton_device)
    c[256:] = float("inf")  # prototypes the teacher excludes, a whole record of them, are fine
    out = matched_loss(z, w, y, wt, c, match, row_weight=row_weight, **TEMPS)
    doubles = double((z, w, y, wt, c, match))
    truth = reference.matched_loss(*doubles, row_weight=row_weight.double(), **TEMPS)
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=0)
    assert out.teacher_entropy.isfinite()


def test_a_match_beyond_the_teacher_makes_the_loss_nan(triton_device: torch.device) -> None:
    inputs = problem(7, 5, 2, 300, 8, device=triton_device)
    inputs[5][2, 1] = 5
    assert fused(*inputs).isnan()


def test_gradients_of_fp16_survive_loss_scaling(triton_device: torch.device) -> None:
    inputs = problem(7, 5, 2, 700, 8, torch.float16, triton_device)
    inputs[6] *= 1e-6  # as a thousand images and ten views make it
    oracle = loss_and_grads(loops, *double(inputs), factor=2.0**18)
    for value, truth in zip(loss_and_grads(fused, *inputs, factor=2.0**18)[1:], oracle[1:], strict=True):
        assert error(value, truth) <= 2e-3 * truth.abs().max().item()


def test_autocast_sets_the_dtype_of_the_products(triton_device: torch.device) -> None:
    inputs = problem(7, 5, 2, 300, 32, device=triton_device)
    truth = loss_and_grads(loops, *double(inputs))
    with torch.autocast(triton_device.type, dtype=torch.bfloat16):
        kernel = loss_and_grads(fused, *inputs)
        eager = loss_and_grads(loops, *inputs)
    for value, base, exact in zip(kernel, eager, truth, strict=True):
        assert value.dtype == torch.float32
        assert 0 < error(value, exact) <= 2 * error(base, exact) + 2**-8 * exact.abs().max().item()


def test_gradients_only_where_asked(triton_device: torch.device) -> None:
    z, w, *rest = problem(7, 5, 2, 300, 8, device=triton_device)
    _, dz, dw = loss_and_grads(fused, z, w, *rest)
    z.requires_grad_()
    fused(z, w, *rest).backward()
    assert torch.equal(z.grad, dz) and w.grad is None
    w.requires_grad_()
    fused(z.detach(), w, *rest).backward()
    assert torch.equal(w.grad, dw)
    with torch.no_grad():
        assert not fused(z, w, *rest).requires_grad
    out = matched_loss(z, w, *rest[:4], row_weight=rest[4], **TEMPS)
    assert [x.requires_grad for x in out] == [True, False, False, False]


def test_backward_scales_repeats_and_takes_expanded_gradients(triton_device: torch.device) -> None:
    z, w, *rest = problem(7, 5, 2, 300, 8, device=triton_device)
    _, *base = loss_and_grads(fused, z, w, *rest)
    _, *tripled = loss_and_grads(fused, z, w, *rest, factor=3.0)
    z, w = z.requires_grad_(), w.requires_grad_()
    loss = fused(z, w, *rest)
    loss.expand(4).sum().backward(retain_graph=True)
    loss.backward()
    for factor, got in ((3, tripled), (5, (z.grad, w.grad))):
        for value, one in zip(got, base, strict=True):
            assert error(value, factor * one.double()) <= 2e-6 * factor * one.abs().max().item()


def test_strided_inputs(triton_device: torch.device) -> None:
    z, w, y, wt, c, match, row_weight = problem(7, 5, 2, 300, 8, device=triton_device)
    expected = loss_and_grads(fused, z, w, y, wt, c, match, row_weight)
    strided = [x.T.contiguous().T for x in (z, w, y, wt)]
    half = [torch.stack([x, x], -1)[..., 0] for x in (c, match, row_weight)]
    assert not any(x.is_contiguous() for x in (*strided, *half))
    for a, b in zip(loss_and_grads(fused, *strided, *half), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_again(triton_device: torch.device, dtype: torch.dtype) -> None:
    inputs = problem(9, 5, 2, 700, 8, dtype, triton_device)
    first, second = loss_and_grads(fused, *inputs), loss_and_grads(fused, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_chunks_of_any_size_and_wide_addresses_change_nothing(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem(9, 5, 2, 700, 4, device=triton_device)
    inputs[:4] = [(8 * x).round() / 8 for x in inputs[:4]]  # so that products are exact, by any GEMM
    expected = loss_and_grads(fused, *inputs)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "needs_int64", lambda *tensors: True)
        for a, b in zip(loss_and_grads(fused, *inputs), expected, strict=True):
            assert torch.equal(a, b)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1 << 30)
    got = loss_and_grads(fused, *inputs)
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert error(a, b.double()) <= 3e-6 * b.abs().max().item()


def test_a_chunk_is_all_there_is_of_the_logits(triton_device: torch.device) -> None:
    rows, teacher_rows, k = 5440, 3136, 65536
    z, y = (torch.empty(n, 256, device="meta", dtype=torch.bfloat16) for n in (rows, teacher_rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", 1024)
        patch.setattr(kernels, "CHUNK_BYTES", 48 << 20)
        chunks = gpu.Chunks(z, y, k, torch.bfloat16)
    assert chunks.x.nbytes + chunks.t.nbytes <= 48 << 20
    assert chunks.slices[0].start == 0 and chunks.slices[-1].stop == k
    assert all(a.stop == b.start for a, b in zip(chunks.slices, chunks.slices[1:], strict=False))
    assert {s.stop - s.start for s in chunks.slices} == {chunks.x.shape[1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_well_formed(triton_device: torch.device, dtype: torch.dtype) -> None:
    z, w, *rest = problem(5, 3, 2, 40, 8, dtype, triton_device)
    temps = [torch.tensor(t, device=triton_device) for t in (0.1, 0.04)]
    tensors = (z.requires_grad_(), w.requires_grad_(), *rest, *temps)
    torch.library.opcheck(gpu._forward, (*tensors, dtype))
    *_, student_stats, teacher_stats = gpu._forward(*tensors, dtype)
    detached = [x.detach() for x in (*tensors, student_stats, teacher_stats)]
    grad = torch.tensor(2.0, device=triton_device)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(gpu._backward, (grad, *detached, dtype, *needs))


def test_compiles_without_graph_breaks(triton_device: torch.device) -> None:
    z, w, y, wt, c, match, _ = problem(5, 5, 2, 130, 8, device=triton_device)

    def step(z: Tensor, w: Tensor, u: Tensor) -> Tensor:
        out = matched_loss(z, w, y, wt, c, match, row_weight=None, student_temp=0.1, teacher_temp=u)
        return out.loss + patch_loss(z, w, y, wt, c, student_temp=0.1, teacher_temp=u).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for u in (torch.tensor(0.04, device=triton_device), torch.tensor(0.07, device=triton_device)):
        for a, b in zip(loss_and_grads(compiled, z, w, u), loss_and_grads(step, z, w, u), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_launches_describe_every_kernel() -> None:
    found = kernels.launches()
    assert {launch.name.removeprefix("matched_loss_").split("_fp")[0] for launch in found} >= {
        "teacher", "student", "gradient", "center", "merge_teacher", "merge_student"
    }  # fmt: skip
    for launch in found:
        assert set(launch.kernel.arg_names) == {*launch.signature, *launch.constants}, launch.name
        assert launch.grid >= 132 or "merge" in launch.name
        assert 70 in launch.capabilities or launch.name.endswith("bf16")
