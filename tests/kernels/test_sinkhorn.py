"""Sinkhorn-Knopp from column offsets against the matrix that is normalised again and again, in float64."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastdino_kernels import backend, dino_loss, reference
from fastdino_kernels.dino_loss import temperature
from fastdino_kernels.sinkhorn import sinkhorn_center, sinkhorn_knopp, softmax_over_batch
from torch import Tensor

implementation = importlib.import_module("fastdino_kernels.sinkhorn")

SHAPES = [(1, 1), (1, 50), (50, 1), (3, 5), (17, 1000), (70, 513), (300, 33), (9, 4111)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP32 = 1.2e-7
# Rounding exponents of some units and the temperature's inverse moves a target by a few ulp, even where eager
# is exact.
FLOOR = 8 * FP32


def swav(logits: Tensor, temp: float, n_iters: int) -> Tensor:
    """As its definition reads: exponentials, then prototypes and samples divided in turn."""
    q = ((logits - logits.max()) / temp).exp().T
    q = q / q.sum()
    k, r = q.shape
    for _ in range(n_iters):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / r
    return (q * r).T


def problem(rows: int, k: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(rows * k)
    return (scale * torch.randn(rows, k, generator=g)).to(dtype)


def error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item()


@pytest.mark.parametrize("n_iters", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rewritten_matrix(
    library: None, poisoned: None, shape: tuple[int, int], dtype: torch.dtype, n_iters: int
) -> None:
    x = problem(*shape, dtype)
    for temp in (0.0625, 0.04, 1.0):
        got = sinkhorn_knopp(x, temp=temp, n_iters=n_iters)
        oracle = swav(x.double(), temp, n_iters)
        eager = reference.sinkhorn_knopp(x, temp=temp, n_iters=n_iters)
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert error(got, oracle) <= 2 * error(eager, oracle) + FLOOR * oracle.max().item()
        assert error(got.sum(1), torch.ones(len(x)).double()) <= 1e-6


def test_the_reference_is_the_definition() -> None:
    x = problem(13, 40).double()
    for n_iters in (1, 2, 5):
        expected = swav(x, 0.05, n_iters)
        for function in (reference.sinkhorn_knopp, sinkhorn_knopp):
            got = function(x, temp=0.05, n_iters=n_iters)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_many_iterations_balance_the_prototypes(library: None) -> None:
    x = problem(64, 40)
    q = sinkhorn_knopp(x, temp=0.5, n_iters=60)
    torch.testing.assert_close(q.sum(0), torch.full((40,), 64 / 40), rtol=1e-5, atol=0)
    before = sinkhorn_knopp(x, temp=0.5, n_iters=1)
    assert error(before.sum(0), torch.tensor(64 / 40).double()) > 1e-2


def test_softmax_over_the_batch(library: None) -> None:
    x = problem(20, 33)
    p = (x.double() / 0.05).softmax(0)
    for kind in ("auto", "reference"):
        with backend(kind):
            got = softmax_over_batch(x, temp=0.05)
            assert error(got, p / p.sum(1, keepdim=True)) <= 2e-6
            assert torch.equal(got, sinkhorn_knopp(x, temp=0.05, n_iters=1))


@pytest.mark.parametrize("scale,temp", [(1e4, 0.1), (1e4, 0.01), (100.0, 0.01), (1e-3, 1.0), (0.0, 0.05)])
def test_extreme_logits_and_temperatures(library: None, scale: float, temp: float) -> None:
    x = problem(24, 3001, scale=scale)
    for n_iters in (1, 3):
        got = sinkhorn_knopp(x, temp=temp, n_iters=n_iters)
        oracle = reference.sinkhorn_knopp(x.double(), temp=temp, n_iters=n_iters)
        eager = reference.sinkhorn_knopp(x, temp=temp, n_iters=n_iters)
        assert error(got, oracle) <= 2 * error(eager, oracle) + FLOOR * oracle.max().item()
        assert error(got.sum(1), torch.ones(24).double()) <= 1e-6


def test_prototypes_and_logits_that_are_infinite_or_nan(library: None) -> None:
    for kind in ("auto", "reference"):
        with backend(kind):
            x = problem(12, 700)
            x[:, 40] = -float("inf")  # a prototype nobody admits
            x[3, 500:] = -float("inf")  # one sample admits some only
            for n_iters in (1, 3):
                got = sinkhorn_knopp(x, temp=0.05, n_iters=n_iters)
                kept = x[:, torch.arange(700) != 40]
                expected = reference.sinkhorn_knopp(kept.double(), temp=0.05, n_iters=n_iters)
                assert (got[:, 40] == 0).all() and (got[3, 500:] == 0).all()
                assert error(got[:, torch.arange(700) != 40], expected) <= 2e-6
            assert sinkhorn_center(x, temp=0.05)[40] == 0
            x[5] = -float("inf")  # a sample without any prototype has no target, and is told apart
            assert sinkhorn_knopp(x, temp=0.05, n_iters=1)[5].isnan().all()
            x = problem(12, 700)
            x[2, 650] = float("nan")
            assert sinkhorn_knopp(x, temp=0.05).isnan().all()


def test_strided_and_expanded_logits(library: None) -> None:
    x = problem(10, 300)
    expected = sinkhorn_knopp(x, temp=0.05)
    wide = torch.stack([x, x], -1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(sinkhorn_knopp(wide, temp=0.05), expected)
    assert torch.equal(sinkhorn_knopp(x.T.contiguous().T, temp=0.05), expected)
    row = x[:1].expand(10, 300)
    got = sinkhorn_knopp(row, temp=0.05)
    torch.testing.assert_close(got, torch.full_like(got, 1 / 300), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dtype_of_the_result(library: None, dtype: torch.dtype) -> None:
    x = problem(10, 300)
    full = sinkhorn_knopp(x, temp=0.05)
    got = sinkhorn_knopp(x, temp=0.05, dtype=dtype)
    assert got.dtype == dtype and torch.equal(got, full.to(dtype))
    assert sinkhorn_knopp(x.double(), temp=0.05).dtype == torch.float64
    assert sinkhorn_center(x.double(), temp=0.05).dtype == torch.float64
    assert softmax_over_batch(x.to(dtype), temp=0.05, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_targets_carry_no_gradient(library: None) -> None:
    for kind in ("auto", "reference"):
        with backend(kind):
            x = problem(10, 30).requires_grad_()
            assert not sinkhorn_knopp(x, temp=0.05).requires_grad
            assert not sinkhorn_center(x, temp=torch.tensor(0.05, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_center_gives_the_targets(library: None, dtype: torch.dtype) -> None:
    for kind in ("auto", "reference"):
        with backend(kind):
            x, student = problem(8, 600, dtype), problem(16, 600)
            center = sinkhorn_center(x, temp=0.0625)
            assert center.dtype == torch.float32
            q = sinkhorn_knopp(x.double(), temp=0.0625)
            assert error(((x.double() - center) / 0.0625).softmax(1), q) <= 4e-6
            loss = dino_loss(student, x.float(), center, student_temp=0.1, teacher_temp=0.0625).loss
            views, targets = (student.double() / 0.1).log_softmax(1).split(4), q.split(4)
            pairs = [
                -(p * y).sum(1).mean() for g, p in enumerate(targets) for v, y in enumerate(views) if g != v
            ]
            torch.testing.assert_close(loss.double(), torch.stack(pairs).mean(), rtol=2e-6, atol=0)


def test_temperature_as_a_tensor(library: None) -> None:
    x = problem(10, 300)
    assert torch.equal(sinkhorn_knopp(x, temp=torch.tensor(0.0625)), sinkhorn_knopp(x, temp=0.0625))


def test_bitwise_the_same_again_and_for_any_number_of_threads(library: None, threads: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = problem(70, 5001, dtype)
        results = []
        for n in (1, 1, 2, 3):
            torch.set_num_threads(n)
            results.append((sinkhorn_knopp(x, temp=0.05), sinkhorn_center(x, temp=0.05)))
        for targets, center in results[1:]:
            assert torch.equal(targets, results[0][0]) and torch.equal(center, results[0][1])


def test_only_the_result_is_allocated(library: None) -> None:
    x = problem(64, 8192)
    for function, allowed in ((sinkhorn_knopp, x.nbytes), (sinkhorn_center, 0)):
        with torch.profiler.profile(profile_memory=True) as profile:
            function(x, temp=0.05)
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert largest <= allowed + 8 * 8192 * 4  # and vectors of a double per prototype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_well_formed(library: None, dtype: torch.dtype) -> None:
    x, temp = problem(12, 40, dtype), temperature(0.05)
    c = implementation._columns(x, temp)
    torch.library.opcheck(implementation._columns, (x, temp))
    torch.library.opcheck(implementation._step, (x, temp, c))
    for out in DTYPES:
        torch.library.opcheck(implementation._targets, (x, temp, c, out))


def test_compiles_without_graph_breaks(library: None) -> None:
    x = problem(12, 300)

    def step(x: Tensor, temp: Tensor) -> Tensor:
        return 2 * sinkhorn_knopp(x, temp=temp) + sinkhorn_center(x, temp=temp)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for temp in (torch.tensor(0.04), torch.tensor(0.07)):
        assert torch.equal(compiled(x, temp), step(x, temp))


BAD = [
    (dict(logits=[1.0]), TypeError, "logits: expected a tensor"),
    (dict(logits=torch.zeros(8, 4, dtype=torch.int64)), TypeError, "logits: expected a floating-point"),
    (dict(logits=torch.zeros(8)), ValueError, r"logits: expected shape \[R, K\], got \[8\]"),
    (dict(logits=torch.zeros(0, 4)), ValueError, r"logits: expected at least one sample .*, got \[0, 4\]"),
    (dict(temp=0), ValueError, "temp: expected a temperature > 0, got 0"),
    (dict(temp=torch.ones(2)), ValueError, "temp: .* 0-dim"),
    (dict(n_iters=0), ValueError, "n_iters: expected a whole number, at least 1, got 0"),
    (dict(n_iters=2.5), ValueError, "n_iters: expected a whole number, at least 1, got 2.5"),
    (dict(group="world"), ValueError, "group: expected a process group, None or 'local', got 'world'"),
    (dict(dtype=torch.int32), TypeError, "dtype: expected a floating-point type, got torch.int32"),
]


@pytest.mark.parametrize("change,kind,message", BAD, ids=[message for _, _, message in BAD])
def test_errors_name_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    arguments = {**dict(logits=torch.zeros(8, 4), temp=0.05), **change}
    with pytest.raises(kind, match=message):
        sinkhorn_knopp(**arguments)


PROCESS = """
import sys, torch, torch.distributed as dist
from fastdino_kernels import backend
from fastdino_kernels.sinkhorn import sinkhorn_center, sinkhorn_knopp, softmax_over_batch
rank, folder, kinds = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
alone = [dist.new_group([0]), dist.new_group([1])][rank]
results = {}
for name in ("plain", "extreme", "far", "dead"):
    x = torch.load(f"{folder}/{name}.pt")[:5] if rank == 0 else torch.load(f"{folder}/{name}.pt")[5:]
    for kind in kinds:
        with backend(kind):
            for n in (1, 3):
                results[name, kind, n] = sinkhorn_knopp(x, temp=0.0625, n_iters=n)
                results[name, kind, n, "center"] = sinkhorn_center(x, temp=0.0625, n_iters=n)
            results[name, kind, "local"] = sinkhorn_knopp(x, temp=0.0625, group="local")
            results[name, kind, "alone"] = sinkhorn_knopp(x, temp=0.0625, group=alone)
            results[name, kind, "batch"] = softmax_over_batch(x, temp=0.0625, group=dist.group.WORLD)
            if name == "plain":
                some = torch.load(f"{folder}/plain.pt") if rank == 0 else x[:0]
                results[kind, "empty"] = sinkhorn_knopp(some, temp=0.0625)
                results[kind, "empty", "center"] = sinkhorn_center(some, temp=0.0625)
    if name == "plain":
        step = lambda x: sinkhorn_knopp(x, temp=0.0625)
        results["compiled"] = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
torch.save(results, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def floor(name: str, kind: str, x: Tensor) -> float:
    """Prototypes' offsets are double in the kernels, fp32 in the reference; samples' offsets fp32 in both."""
    offset = x[x.isfinite()].abs().max().item() / 0.0625
    return FLOOR + (FP32 * offset if kind == "reference" or name == "far" else 0)


def test_two_processes_are_one_with_all_rows(library: None, tmp_path: Path) -> None:
    plain = problem(12, 77)
    far, dead = plain.clone(), plain.clone()
    far[5:] -= 20.0  # the second process adds less than an ulp to any prototype's sum, at first
    dead[:, 30], dead[:5, 31], dead[5:, 32] = (-float("inf"),) * 3  # for all, and for one process alone
    samples = dict(plain=plain, extreme=1e4 * plain, far=far, dead=dead)
    for name, x in samples.items():
        torch.save(x, tmp_path / f"{name}.pt")
    kinds = ["cpu", "reference"] + ["triton"] * (importlib.util.find_spec("triton") is not None)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path), ",".join(kinds)], env=environment)
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, x in samples.items():
        for kind in kinds:
            for n in (1, 3):
                oracle = reference.sinkhorn_knopp(x.double(), temp=0.0625, n_iters=n)
                eager = reference.sinkhorn_knopp(x, temp=0.0625, n_iters=n)
                got = torch.cat([first[name, kind, n], second[name, kind, n]])
                assert error(got, oracle) <= 2 * error(eager, oracle) + floor(name, kind, x), (name, kind, n)
                assert torch.equal(first[name, kind, n, "center"], second[name, kind, n, "center"])
                if n == 1:
                    both = torch.cat([first[name, kind, "batch"], second[name, kind, "batch"]])
                    assert torch.equal(got, both)
            for mine, rows in ((first, x[:5]), (second, x[5:])):
                oracle = reference.sinkhorn_knopp(rows.double(), temp=0.0625)
                eager = reference.sinkhorn_knopp(rows, temp=0.0625)
                for scope in ("local", "alone"):
                    assert error(mine[name, kind, scope], oracle) <= 2 * error(eager, oracle) + floor(
                        name, kind, x
                    )
    for kind in kinds:  # all samples with the first process
        oracle = reference.sinkhorn_knopp(plain.double(), temp=0.0625)
        eager = reference.sinkhorn_knopp(plain, temp=0.0625)
        bound = 2 * error(eager, oracle) + floor("plain", kind, plain)
        assert error(first[kind, "empty"], oracle) <= bound
        assert second[kind, "empty"].shape == (0, 77)
        assert torch.equal(first[kind, "empty", "center"], second[kind, "empty", "center"])
    together = torch.cat([first["compiled"], second["compiled"]])
    assert torch.equal(together, torch.cat([first["plain", "cpu", 3], second["plain", "cpu", 3]]))
