"""The loss between matched rows against the float64 loop over rows and targets; CPU kernels and reference."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import backend, dino_loss, prototype_loss, reference
from fastdino_kernels.dino_loss import temperature
from torch import Tensor

implementation = importlib.import_module("fastdino_kernels.matched_loss")
matched_loss = implementation.matched_loss

SHAPES = [  # student rows, teacher rows, targets, K, D
    (7, 5, 2, 1500, 8),
    (1, 1, 1, 1, 1),
    (20, 3, 3, 2049, 16),
    (17, 33, 1, 1024, 5),
    (5, 9, 4, 65, 24),
]
TEMPS = dict(student_temp=0.1, teacher_temp=0.04)


def loops(
    z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, match: Tensor, row_weight: Tensor | None
) -> Tensor:
    """The definition: one student row, one target after another."""
    log_q = (F.linear(z, w).to(c.dtype) / 0.1).log_softmax(-1)
    p = ((F.linear(y, wt).to(c.dtype) - c) / 0.04).softmax(-1)
    pairs = [(r, t) for r, targets in enumerate(match.tolist()) for t in targets if t >= 0]
    equal = torch.full((len(z),), 1 / max(1, len(pairs)), dtype=c.dtype)
    weights = equal if row_weight is None else row_weight
    zero = (0 * z).sum() + (0 * w).sum()
    return sum((-weights[r].to(c.dtype) * (p[t] * log_q[r]).sum() for r, t in pairs), zero)


def problem(rows: int, teacher_rows: int, targets: int, k: int, d: int, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(rows * k + d)
    z, w, y, wt = (torch.randn(n, d, generator=g) for n in (rows, k, teacher_rows, k))
    match = torch.randint(-1, teacher_rows, (rows, targets), generator=g)
    match[0, 0] = teacher_rows - 1
    match[rows // 2 + 1 :: 5] = -1  # rows without a target
    unit = (F.normalize(x, dim=1).to(dtype) for x in (z, w, y, wt))
    return *unit, 0.3 * torch.randn(k, generator=g), match, torch.rand(rows, generator=g)


def double(inputs) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


def fused(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, match: Tensor, row_weight=None) -> Tensor:
    return matched_loss(z, w, y, wt, c, match, row_weight=row_weight, **TEMPS).loss


def loss_and_grads(
    function, z: Tensor, w: Tensor, *rest, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    z, w = z.detach().requires_grad_(), w.detach().requires_grad_()
    loss = function(z, w, *rest)
    (factor * loss).backward()
    assert z.grad is not None and w.grad is not None
    return loss.detach(), z.grad, w.grad


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


def peak_bytes(function) -> int:
    """Most that ``function`` has allocated at one time."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and groups even of a small problem."""
    monkeypatch.setattr(implementation, "CHUNK_BYTES", 1)
    monkeypatch.setattr(implementation, "GROUP_BYTES", 40_000)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_loops(
    library: None, poisoned: None, shape: tuple, dtype: torch.dtype, weighted: bool
) -> None:
    *inputs, row_weight = problem(*shape, dtype)
    inputs.append(row_weight if weighted else None)
    kernel = loss_and_grads(fused, *inputs)
    oracle = loss_and_grads(loops, *double(inputs[:6]), inputs[6])
    # Eager code in the same dtype: GEMMs in bf16, the loss in fp32; fp16 is computed in fp32 on a CPU.
    eager = loss_and_grads(
        loops, *(x.float() if x.dtype == torch.float16 else x for x in inputs[:6]), inputs[6]
    )
    eps = torch.finfo(dtype).eps
    for value, base, truth in zip(kernel, eager, oracle, strict=True):
        assert error(value, truth) <= 2 * (error(base, truth) + eps * truth.abs().max().item())
    assert kernel[1].dtype == dtype and kernel[2].dtype == dtype and kernel[0].dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_fp32_everything_agrees_to_rounding(library: None, shape: tuple) -> None:
    inputs = problem(*shape)
    kernel, oracle = loss_and_grads(fused, *inputs), loss_and_grads(loops, *double(inputs))
    for value, truth in zip(kernel, oracle, strict=True):
        assert error(value, truth) <= 3e-6 * truth.abs().max().item()
    out = matched_loss(*inputs[:6], row_weight=inputs[6], **TEMPS)
    z, w, y, wt, c, match, row_weight = double(inputs)
    log_p = ((F.linear(y, wt) - c) / 0.04).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    used = sum(row_weight[r] * entropy[t] for r, ts in enumerate(match.tolist()) for t in ts if t >= 0)
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.kl.double(), oracle[0] - used, **close)
    torch.testing.assert_close(out.teacher_entropy.double(), entropy.mean(), **close)
    torch.testing.assert_close(out.batch_center.double(), F.linear(y, wt).mean(0), **close)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_loops(shape: tuple) -> None:
    inputs = double(problem(*shape))
    for row_weight in (inputs[6], None):
        got = loss_and_grads(fused, *inputs[:6], row_weight)
        for value, truth in zip(got, loss_and_grads(loops, *inputs[:6], row_weight), strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    with backend("reference"):
        small = matched_loss(*problem(*shape)[:6], row_weight=inputs[6], **TEMPS)
    truth = matched_loss(*inputs[:6], row_weight=inputs[6], **TEMPS)
    for value, exact in zip(small, truth, strict=True):
        assert value.dtype == torch.float32 and exact.dtype == torch.float64
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    z, w, y, wt, c, match, row_weight = double(problem(5, 4, 2, 6, 4))
    assert torch.autograd.gradcheck(
        lambda z, w: fused(z, w, y, wt, c, match, row_weight), (z.requires_grad_(), w.requires_grad_())
    )


@pytest.mark.parametrize("kind", ["auto", "reference"])
def test_the_pairing_of_dino_gives_its_loss(library: None, kind: str) -> None:
    views, n_global, images, k, d = 5, 2, 3, 1100, 16
    z, w, y, wt, c, _, _ = problem(views * images, n_global * images, 1, k, d)
    pairs = [
        [g * images + b if g != v else -1 for g in range(n_global)]
        for v in range(views)
        for b in range(images)
    ]
    match = torch.tensor(pairs)
    with backend(kind):
        expected = loss_and_grads(lambda z, w: prototype_loss(z, w, y, wt, c, **TEMPS).loss, z, w)
        got = loss_and_grads(lambda z, w: fused(z, w, y, wt, c, match), z, w)
        out = matched_loss(z, w, y, wt, c, match, row_weight=None, **TEMPS)
        logits = dino_loss(F.linear(z, w), F.linear(y, wt), c, **TEMPS)
    for value, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=2e-5, atol=2e-7)
    for name in out._fields:
        torch.testing.assert_close(getattr(out, name), getattr(logits, name), rtol=1e-5, atol=1e-5)


def test_rows_without_a_target_count_for_nothing(library: None) -> None:
    z, w, y, wt, c, match, row_weight = problem(20, 7, 2, 1100, 8)
    empty = (match < 0).all(1)
    assert empty.any() and not empty.all()
    loss, dz, dw = loss_and_grads(fused, z, w, y, wt, c, match, row_weight)
    z[empty] = float("nan")
    again = loss_and_grads(fused, z, w, y, wt, c, match, row_weight)
    assert torch.equal(again[0], loss) and torch.equal(again[1], dz) and not dz[empty].any()
    none = torch.full_like(match, -1)
    for value in loss_and_grads(fused, *problem(20, 7, 2, 1100, 8)[:5], none):
        assert not value.any()


def test_extreme_features_and_temperatures(library: None) -> None:
    z, w, y, wt, c, match, row_weight = problem(7, 5, 2, 1500, 8)
    inputs = (100 * z, 100 * w, 100 * y, 100 * wt, c, match, row_weight)  # logits up to 1e4
    kernel, oracle = loss_and_grads(fused, *inputs), loss_and_grads(loops, *double(inputs))
    eager = loss_and_grads(loops, *inputs)
    for value, base, truth in zip(kernel, eager, oracle, strict=True):
        assert value.isfinite().all()
        assert error(value, truth) <= 2 * error(base, truth) + 1.2e-7 * truth.abs().max().item()
    for s, u in ((0.01, 0.01), (1.0, 2.0)):
        temps = dict(student_temp=s, teacher_temp=u)
        got = matched_loss(z, w, y, wt, c, match, row_weight=row_weight, **temps)
        truth = reference.matched_loss(
            *double((z, w, y, wt, c, match)), row_weight=row_weight.double(), **temps
        )
        torch.testing.assert_close(got.loss.double(), truth.loss, rtol=1e-5, atol=0)


def test_nan_and_infinity_reach_the_loss(library: None) -> None:
    for bad in (float("nan"), float("inf")):
        for argument in (0, 2):
            inputs = problem(7, 5, 2, 1500, 8)
            inputs[argument][-1 if argument else 0, 3] = bad
            inputs[5][0] = 4
            assert fused(*inputs).isnan()
    z, w, y, wt, c, match, row_weight = problem(7, 5, 2, 1500, 8)
    c[1300] = float("inf")  # a prototype the teacher excludes is fine
    out = matched_loss(z, w, y, wt, c, match, row_weight=row_weight, **TEMPS)
    truth = reference.matched_loss(*double((z, w, y, wt, c, match)), row_weight=row_weight.double(), **TEMPS)
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=0)
    assert out.teacher_entropy.isfinite()


def test_autocast_computes_in_bf16(library: None) -> None:
    *inputs, row_weight = problem(20, 9, 2, 2100, 32)
    truth = loss_and_grads(loops, *double(inputs), row_weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernel = loss_and_grads(fused, *inputs, row_weight)
        eager = loss_and_grads(loops, *inputs, row_weight)
    for value, base, exact in zip(kernel, eager, truth, strict=True):
        assert value.dtype == torch.float32
        assert 0 < error(value, exact) <= 2 * error(base, exact) + 2**-8 * exact.abs().max().item()


def test_gradients_only_where_asked(library: None) -> None:
    z, w, *rest = problem(7, 5, 2, 1500, 8)
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


def test_backward_scales_repeats_and_takes_expanded_gradients(library: None) -> None:
    z, w, *rest = problem(7, 5, 2, 1500, 8)
    _, *base = loss_and_grads(fused, z, w, *rest)
    _, *tripled = loss_and_grads(fused, z, w, *rest, factor=3.0)
    z, w = z.requires_grad_(), w.requires_grad_()
    loss = fused(z, w, *rest)
    loss.expand(4).sum().backward(retain_graph=True)
    loss.backward()
    for factor, got in ((3, tripled), (5, (z.grad, w.grad))):
        for value, one in zip(got, base, strict=True):
            assert error(value, factor * one.double()) <= 2e-6 * factor * one.abs().max().item()


def test_strided_inputs(library: None) -> None:
    z, w, y, wt, c, match, row_weight = problem(7, 5, 2, 1500, 8)
    expected = loss_and_grads(fused, z, w, y, wt, c, match, row_weight)
    strided = [x.T.contiguous().T for x in (z, w, y, wt)]
    half = [torch.stack([x, x], -1)[..., 0] for x in (c, match, row_weight)]
    assert not any(x.is_contiguous() for x in (*strided, *half))
    for a, b in zip(loss_and_grads(fused, *strided, *half), expected, strict=True):
        assert torch.equal(a, b)
    same = loss_and_grads(fused, z, w, y, wt, c, match, torch.ones(()).expand(7))
    for a, b in zip(same, loss_and_grads(fused, z, w, y, wt, c, match, torch.ones(7)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_again_and_close_for_chunks_and_groups_of_any_size(
    library: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    inputs = problem(40, 21, 2, 3001, 8, dtype)
    first, second = loss_and_grads(fused, *inputs), loss_and_grads(fused, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    monkeypatch.setattr(implementation, "CHUNK_BYTES", 1 << 30)
    monkeypatch.setattr(implementation, "GROUP_BYTES", 1 << 30)
    if dtype == torch.float32:  # GEMMs of another width round differently
        for a, b in zip(loss_and_grads(fused, *inputs), first, strict=True):
            assert error(a, b.double()) <= 1e-5 * b.abs().max().item()


def test_threads_change_nothing_but_what_the_gemms_round(library: None, threads: None) -> None:
    inputs = [x.bfloat16().float() if x.is_floating_point() else x for x in problem(40, 21, 2, 3001, 4)]
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(loss_and_grads(fused, *inputs))
    for loss, dz, dw in results[1:]:
        assert torch.equal(loss, results[0][0])  # products of 4 terms: the logits are the same
        for a, b in ((dz, results[0][1]), (dw, results[0][2])):
            assert error(a, b.double()) <= 1e-6 * b.abs().max().item()


def test_no_tensor_of_rows_times_prototypes(library: None) -> None:
    rows, k = 256, 16384
    z, w, *rest = problem(rows, 128, 2, k, 8)
    z.requires_grad_(), w.requires_grad_()
    logits = rows * k * 4
    assert peak_bytes(lambda: F.linear(z, w)) >= logits
    assert peak_bytes(lambda: fused(z, w, *rest).backward()) <= 0.25 * logits


@pytest.mark.parametrize("images", [1, 4])
def test_groups_hold_every_row_once_and_its_targets(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    regions, teacher_rows = 10, 6  # of an image; the teacher's rows lie view by view, as EsViT's
    image = torch.arange(images).repeat(regions)
    match = torch.randint(
        0, teacher_rows // 2, (images * regions, 2), generator=torch.Generator().manual_seed(0)
    )
    match = match + 3 * image[:, None] + torch.tensor([0, 3 * images])
    match[5, 0], match[7] = -1, -1
    for budget, wanted in ((1 << 20, 1), (220, -(-images // 2)), (1, None)):
        monkeypatch.setattr(implementation, "GROUP_BYTES", budget)
        found = [g for g in implementation.groups(match, images * teacher_rows, 10, 1) if len(g.rows)]
        assert wanted is None or len(found) == wanted
        rows = torch.cat([g.rows for g in found])
        assert sorted(rows.tolist()) == [r for r in range(images * regions) if r != 7]
        for group in found:
            again = group.teachers[group.match.clamp(min=0)].where(group.match >= 0, -1)
            assert torch.equal(again, match[group.rows])
        every = torch.cat([g.teachers for g in implementation.groups(match, images * teacher_rows, 10, 1)])
        assert set(every.tolist()) == set(range(images * teacher_rows))
        assert wanted is None or len(every) == images * teacher_rows  # images stay whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_well_formed(library: None, dtype: torch.dtype) -> None:
    z, w, y, wt, c, match, row_weight = problem(7, 5, 2, 40, 8, dtype)
    tensors = (z.requires_grad_(), w.requires_grad_(), y, wt, c, match, row_weight)
    tensors = (*tensors, temperature(0.1), temperature(0.04))
    for needs in ((True, True), (False, True), (True, False)):
        arguments = [x.requires_grad_(need) for x, need in zip(tensors, needs, strict=False)]
        torch.library.opcheck(implementation._forward, (*arguments, *tensors[2:], dtype, *needs))


def test_compiles_without_graph_breaks(library: None) -> None:
    z, w, y, wt, c, match, _ = problem(7, 5, 2, 300, 8)

    def step(z: Tensor, w: Tensor, u: Tensor) -> Tensor:
        out = matched_loss(z, w, y, wt, c, match, row_weight=None, student_temp=0.1, teacher_temp=u)
        return 2 * out.loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for u in (torch.tensor(0.04), torch.tensor(0.07)):
        for a, b in zip(loss_and_grads(compiled, z, w, u), loss_and_grads(step, z, w, u), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_match_beyond_the_teacher_is_an_error(library: None) -> None:
    *inputs, _ = problem(7, 5, 2, 40, 8)
    inputs[5][3, 1] = 5
    with pytest.raises(ValueError, match="match: expected rows of the teacher, below 5, got 5"):
        fused(*inputs)


BAD = [
    (dict(student_z=None), TypeError, "student_z: expected a tensor, got NoneType"),
    (dict(student_z=torch.zeros(8)), ValueError, r"student_z: expected shape \[R, D\], got \[8\]"),
    (dict(student_weight=torch.zeros(6, 5)), ValueError, r"student_weight: expected shape \[K, 4\]"),
    (dict(student_weight=torch.zeros(0, 4)), ValueError, "student_weight: expected at least one prototype"),
    (dict(teacher_z=torch.zeros(4, 3)), ValueError, r"teacher_z: expected shape \[T, 4\]"),
    (dict(teacher_z=torch.zeros(0, 4)), ValueError, "teacher_z: expected at least one row"),
    (dict(teacher_z=torch.zeros(5, 4, requires_grad=True)), ValueError, "teacher_z: .* not require grad"),
    (dict(teacher_weight=torch.zeros(7, 4)), ValueError, r"teacher_weight: expected shape \[6, 4\]"),
    (dict(center=torch.zeros(5)), ValueError, r"center: expected shape \[6\], got \[5\]"),
    (dict(match=[[0]]), TypeError, "match: expected an int64 tensor, got list"),
    (dict(match=torch.zeros(8, 2)), TypeError, "match: expected an int64 tensor, got torch.float32"),
    (dict(match=torch.zeros(8, dtype=torch.int64)), ValueError, r"match: expected shape \[8, G\]"),
    (dict(match=torch.zeros(8, 0, dtype=torch.int64)), ValueError, "match: .* with G >= 1"),
    (dict(match=torch.zeros(8, 1, dtype=torch.int64, device="meta")), ValueError, "match: expected device"),
    (dict(row_weight=torch.zeros(7)), ValueError, r"row_weight: expected shape \[8\], got \[7\]"),
    (dict(row_weight=torch.zeros(8, requires_grad=True)), ValueError, "row_weight: must not require grad"),
    (dict(student_temp=0), ValueError, "student_temp: expected a temperature > 0"),
    (dict(teacher_temp="hot"), TypeError, "teacher_temp: expected a number"),
]


@pytest.mark.parametrize("change,kind,message", BAD, ids=[message for _, _, message in BAD])
def test_errors_name_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    arguments = dict(
        student_z=torch.zeros(8, 4),
        student_weight=torch.zeros(6, 4),
        teacher_z=torch.zeros(5, 4),
        teacher_weight=torch.zeros(6, 4),
        center=torch.zeros(6),
        match=torch.zeros(8, 2, dtype=torch.int64),
        row_weight=None,
    )
    with pytest.raises(kind, match=message):
        matched_loss(**{**arguments, **TEMPS, **change})
