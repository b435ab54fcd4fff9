"""EsViT's loss between matched regions against its definition: loops over views, images and regions."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from fastdino_kernels import backend
from fastdino_kernels.region_loss import RegionMatch, match_regions, region_loss
from torch import Tensor

implementation = importlib.import_module("fastdino_kernels.matched_loss")

TEMPS = dict(student_temp=0.1, teacher_temp=0.04)
LAYOUTS = [  # regions of each view, images, teacher views
    ([4, 4, 3, 3, 3], 3, 2),
    ([5, 5], 2, 2),
    ([4, 3, 2, 4], 2, 2),
    ([3, 2], 1, 1),
    ([1, 1, 1], 4, 2),
    ([2, 2, 2, 1], 2, 3),
]


def split(x: Tensor, regions: list[int], images: int) -> list[Tensor]:
    """Flat rows -> for each view [B, N_v, ...]."""
    parts = x.split([images * n for n in regions])
    return [part.unflatten(0, (images, -1)) for part in parts]


def esvit(
    z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, f: Tensor, ft: Tensor, layout: tuple
) -> Tensor:
    """Mean over the pairs of views, of the mean over images, of the mean over regions (EsViT, eq. 2)."""
    regions, images, n_global = layout
    log_q = split((F.linear(z, w) / 0.1).log_softmax(-1), regions, images)
    p = split(((F.linear(y, wt) - c) / 0.04).softmax(-1), regions[:n_global], images)
    students, teachers = split(f, regions, images), split(ft, regions[:n_global], images)
    of_pairs = []
    for g in range(n_global):
        for v in range(len(regions)):
            if v == g:
                continue
            of_images = []
            for b in range(images):
                of_regions = []
                for i in range(regions[v]):
                    similarity = F.cosine_similarity(students[v][b, i][None], teachers[g][b])
                    nearest = int(similarity.argmax())
                    of_regions.append(-(p[g][b, nearest] * log_q[v][b, i]).sum())
                of_images.append(torch.stack(of_regions).mean())
            of_pairs.append(torch.stack(of_images).mean())
    return torch.stack(of_pairs).mean()


def problem(layout: tuple, k: int = 1100, d: int = 8, width: int = 6):
    regions, images, n_global = layout
    g = torch.Generator().manual_seed(sum(regions) * images)
    rows, teacher_rows = images * sum(regions), images * sum(regions[:n_global])
    z, w, y, wt = (F.normalize(torch.randn(n, d, generator=g), dim=1) for n in (rows, k, teacher_rows, k))
    features = torch.randn(rows, width, generator=g), 3 * torch.randn(teacher_rows, width, generator=g)
    return z, w, y, wt, 0.3 * torch.randn(k, generator=g), *features


def fused(z: Tensor, w: Tensor, y: Tensor, wt: Tensor, c: Tensor, f: Tensor, ft: Tensor, layout: tuple):
    match = match_regions(f, ft, layout[0], n_global=layout[2])
    return region_loss(z, w, y, wt, c, match, **TEMPS).loss


def loss_and_grads(function, z: Tensor, w: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    z, w = z.detach().requires_grad_(), w.detach().requires_grad_()
    loss = function(z, w, *rest)
    loss.backward()
    assert z.grad is not None and w.grad is not None
    return loss.detach(), z.grad, w.grad


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_against_the_definition(library: None, poisoned: None, layout: tuple) -> None:
    inputs = problem(layout)
    oracle = loss_and_grads(esvit, *(x.double() for x in inputs), layout)
    eager = loss_and_grads(esvit, *inputs, layout)
    exact = loss_and_grads(fused, *(x.double() for x in inputs), layout)
    for kind in ("auto", "reference"):
        with backend(kind):
            kernel = loss_and_grads(fused, *inputs, layout)
        for value, base, truth in zip(kernel, eager, oracle, strict=True):
            bound = 2 * (base.double() - truth).abs().max() + 1.2e-7 * truth.abs().max()
            assert (value.double() - truth).abs().max() <= bound
    for value, truth in zip(exact, oracle, strict=True):  # the weights are fp32
        assert (value - truth).abs().max() <= 1e-7 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matches_are_the_most_similar_regions(layout: tuple, dtype: torch.dtype) -> None:
    regions, images, n_global = layout
    *_, f, ft = problem(layout)
    f, ft = f.to(dtype), ft.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        match, row_weight = match_regions(f.requires_grad_(), ft, regions, n_global=n_global)
    assert match.shape == (len(f), n_global) and match.dtype == torch.int64
    assert (
        row_weight.shape == (len(f),) and row_weight.dtype == torch.float32 and not row_weight.requires_grad
    )
    similarity = F.cosine_similarity(f[:, None].double(), ft[None].double(), dim=-1)
    row = 0
    for v, n in enumerate(regions):
        for b in range(images):
            for _ in range(n):
                first = 0
                for g in range(n_global):
                    begin = first + b * regions[g]
                    allowed = similarity[row, begin : begin + regions[g]]
                    assert match[row, g] == (-1 if g == v else begin + allowed.argmax())
                    first += images * regions[g]
                row += 1
    assert row == len(f)
    # Every pair of views counts the same, and every image and region within it.
    pairs = (match >= 0).sum(1)
    torch.testing.assert_close((row_weight * pairs).sum(), torch.tensor(1.0))
    for v, part in enumerate(split(row_weight, regions, images)):
        expected = 1 / (n_global * (len(regions) - 1) * images * regions[v])
        torch.testing.assert_close(part, torch.full_like(part, expected))


def test_identical_features_match_themselves_and_one_region_gives_the_view_loss(library: None) -> None:
    images, views, n_global = 3, 4, 2
    z, w, y, wt, c, *_ = problem(([5, 5, 5, 5], images, n_global))
    features = torch.randn(images * 5, 16).repeat(views, 1)
    match = match_regions(features, features[: n_global * images * 5], [5] * views).match
    own = torch.arange(images * 5).repeat(views)
    for g in range(n_global):
        expected = own + g * images * 5
        expected[g * images * 5 : (g + 1) * images * 5] = -1
        assert torch.equal(match[:, g], expected)
    # With one region in each view there is nothing to choose: the loss is that of whole views.
    layout = ([1] * views, images, n_global)
    z, w, y, wt, c, f, ft = problem(layout)
    students = (F.linear(z, w).double() / 0.1).split(images)
    targets = ((F.linear(y, wt).double() - c) / 0.04).softmax(-1).split(images)
    pairs = [(p, x) for g, p in enumerate(targets) for v, x in enumerate(students) if g != v]
    view_loss = torch.stack([-(p * x.log_softmax(-1)).sum(-1).mean() for p, x in pairs]).mean()
    torch.testing.assert_close(fused(z, w, y, wt, c, f, ft, layout).double(), view_loss, rtol=1e-6, atol=0)


def test_statistics(library: None) -> None:
    layout = LAYOUTS[0]
    z, w, y, wt, c, f, ft = problem(layout)
    match = match_regions(f, ft, layout[0])
    out = region_loss(z, w, y, wt, c, match, **TEMPS)
    with backend("reference"):
        truth = region_loss(z, w, y, wt, c, match, **TEMPS)
    for name in out._fields:
        torch.testing.assert_close(getattr(out, name), getattr(truth, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.batch_center, F.linear(y, wt).mean(0), rtol=1e-5, atol=1e-6)
    # A student that says what the teacher says has no divergence left.
    same = match_regions(ft, ft, [4, 4])
    z = ft.new_zeros(len(ft), 8) + y[torch.where(same.match[:, 0] < 0, same.match[:, 1], same.match[:, 0])]
    perfect = region_loss(
        z, wt, y, wt, torch.zeros_like(c), RegionMatch(*same), student_temp=0.1, teacher_temp=0.1
    )
    assert abs(perfect.kl.item()) <= 1e-5 < perfect.loss.item()


def test_gradcheck_through_the_reference() -> None:
    layout = ([2, 2, 1], 2, 2)
    z, w, *rest = (x.double() for x in problem(layout, k=5, d=3))
    assert torch.autograd.gradcheck(
        lambda z, w: fused(z, w, *rest, layout), (z.requires_grad_(), w.requires_grad_())
    )


def test_compiles_without_graph_breaks(library: None) -> None:
    layout = LAYOUTS[0]
    inputs = problem(layout, k=300)
    compiled = torch.compile(lambda *x: 2 * fused(*x, layout), fullgraph=True, backend="aot_eager")
    expected = loss_and_grads(lambda *x: 2 * fused(*x, layout), *inputs)
    for a, b in zip(loss_and_grads(compiled, *inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


BAD = [
    (dict(student_features=None), TypeError, "student_features: expected a tensor"),
    (dict(student_features=torch.zeros(34)), ValueError, r"student_features: expected shape \[R, C\]"),
    (dict(teacher_features=torch.zeros(16, 5)), ValueError, r"teacher_features: expected shape \[T, 6\]"),
    (dict(teacher_features=torch.zeros(15, 6)), ValueError, r"teacher_features: expected B \* 8 rows"),
    (dict(teacher_features=torch.zeros(0, 6)), ValueError, r"teacher_features: expected B \* 8 rows"),
    (dict(student_features=torch.zeros(33, 6)), ValueError, r"student_features: expected 2 \* 17 rows"),
    (dict(regions=[4, 4, 0]), ValueError, "regions: expected at least 1 region"),
    (dict(regions=[4]), ValueError, "regions: expected one number for each of V >= max"),
    (dict(n_global=0), ValueError, "regions: .*n_global >= 1"),
    (dict(n_global=6), ValueError, r"regions: expected one number for each of V >= max\(2, n_global = 6\)"),
]


@pytest.mark.parametrize("change,kind,message", BAD, ids=[message for _, _, message in BAD])
def test_errors_name_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    arguments = dict(
        student_features=torch.zeros(34, 6), teacher_features=torch.zeros(16, 6), regions=[4, 4, 3, 3, 3]
    )
    with pytest.raises(kind, match=message):
        match_regions(**{**arguments, **change})


def test_a_bare_tensor_is_no_match() -> None:
    z, w, y, wt, c, f, ft = problem(LAYOUTS[0])
    with pytest.raises(TypeError, match="match: expected a RegionMatch, got Tensor"):
        region_loss(z, w, y, wt, c, match_regions(f, ft, LAYOUTS[0][0]).match, **TEMPS)
