"""What the Triton forms of the updates must do besides being right: tables, alignment, no waiting, graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fastdino_kernels import LAMB, LARS, AdamWEMA, clip_grad_per_tensor_, ema_update_, grad_square_sums
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from fastdino_kernels.gpu import adamw_ema, ema, lamb, lars, multi_tensor  # noqa: E402
from fastdino_kernels.gpu.multi_tensor import whole_blocks  # noqa: E402

SHAPES = [(33, 5), (70, 130), (7,), ()]
OPTIMIZERS = {
    "adamw": (AdamWEMA, dict(max_grad_norm=3.0)),
    "lars": (LARS, dict(max_grad_norm=3.0)),
    "sgd": (LARS, dict(max_grad_norm=3.0, eta=None)),
    "lamb": (LAMB, dict(max_grad_norm=3.0)),
}


def tensors(device: torch.device, seed: int, offset: int = 0) -> list[Tensor]:
    """Views that begin ``offset`` elements into their storage."""
    g = torch.Generator().manual_seed(seed)
    result = []
    for shape in SHAPES:
        x = torch.randn(shape, generator=g)
        storage = torch.full((x.numel() + offset,), 7.0, device=device)
        result.append(storage[offset:].view(shape).copy_(x))
    return result


def problem(name: str, device: torch.device, offset: int = 0, **settings: Any):
    params = [torch.nn.Parameter(x) for x in tensors(device, 0, offset)]
    teachers = tensors(device, 1, offset)
    cls, more = OPTIMIZERS[name]
    optimizer = cls(params, teacher_params=teachers, **{"lr": 0.1, "weight_decay": 0.1, **more, **settings})
    return params, teachers, optimizer


def set_grads(params: list[torch.nn.Parameter], seed: int, offset: int = 0) -> None:
    for p, g in zip(params, tensors(params[0].device, seed, offset), strict=True):
        p.grad = g


class NoWaiting(TorchDispatchMode):
    """Refuses what would read a number back from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        assert not name.startswith(("aten::_local_scalar_dense", "aten::item", "aten::nonzero")), name
        kwargs = kwargs or {}
        if name.startswith("aten::_to_copy"):
            assert args[0].device.type == "cpu" or kwargs.get("device") in (None, args[0].device), name
        return func(*args, **kwargs)


def test_the_mode_sees_a_wait() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        float(torch.ones(()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_waits_for_nothing(triton_device: torch.device, name: str) -> None:
    scalar = lambda x: torch.tensor(x, device=triton_device)  # noqa: E731
    copies = [torch.empty_like(x, dtype=torch.bfloat16) for x in tensors(triton_device, 0)]
    copies[1] = copies[1].to(torch.float16)  # not by the kernels
    extra = [(torch.ones(3, device=triton_device).double(), torch.ones(3, device=triton_device).double())]
    params, _, optimizer = problem(
        name, triton_device, lr=scalar(0.1), low_precision_params=copies, extra_ema=extra
    )
    params[0].data = params[0].data.repeat_interleave(2, 1)[:, ::2]  # outside the kernels
    numbers = dict(momentum=scalar(0.9), grad_scale=scalar(8.0), skip=scalar(False))
    set_grads(params, 2)
    optimizer.step(**numbers)
    set_grads(params, 3)
    with NoWaiting():
        result = optimizer.step(**numbers)
        optimizer.step(momentum=0.9, grad_scale=8.0)
        sums = grad_square_sums([p.grad for p in params])
        if name in ("adamw", "sgd"):
            optimizer.step(**numbers, norms=sums.sqrt() / numbers["grad_scale"])
        clip_grad_per_tensor_(params, 1.0, grad_scale=scalar(2.0))
        ema_update_([torch.zeros_like(p) for p in params], params, scalar(0.9))
    assert result.found_inf.device.type == result.grad_norms.device.type == triton_device.type


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unaligned_storage_gives_the_same_bits(triton_device: torch.device, name: str) -> None:
    results = []
    for offset in (0, 1, 4):
        params, teachers, optimizer = problem(name, triton_device, offset)
        for step in range(2):
            set_grads(params, step, offset=offset)
            norms = optimizer.step(momentum=0.9).grad_norms
        results.append([norms, *params, *teachers])
        for x in (*params, *teachers):  # the elements before the view
            assert (torch.as_strided(x.detach(), (offset,), (1,), 0) == 7.0).all()
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            torch.testing.assert_close(x, y, rtol=2e-7, atol=1e-7)  # another order of the sums
    again, _, optimizer = problem(name, triton_device)
    for step in range(2):
        set_grads(again, step)
        optimizer.step(momentum=0.9)
    assert all(map(torch.equal, again, results[0][1:]))  # bitwise the same in a second run


@triton.jit
def _whole_blocks_kernel(out, numbers):
    i = tl.program_id(0)
    at, count = tl.load(numbers + 2 * i), tl.load(numbers + 2 * i + 1)
    tl.store(out + i, whole_blocks(at, count, 1024))


def test_vectors_only_where_every_stream_is_aligned(triton_device: torch.device) -> None:
    cases = [(4096, 8192), (4096, 8191), (4096, 1023), (4096 | 8, 8192), (4096 | 2, 8192), (4096 + 16, 1024)]
    out = torch.zeros(len(cases), dtype=torch.int64, device=triton_device)
    _whole_blocks_kernel[(len(cases),)](out, torch.tensor(cases, device=triton_device))
    assert out.tolist() == [8192, 7168, 0, 0, 0, 1024]


def test_machine_code_moves_16_bytes_at_a_time() -> None:
    """Addresses out of a table must not cost the vector loads. The real compiler has a process of its own."""
    script = """
import re
from bench.ahead import compile_ahead
from fastdino_kernels.gpu import adamw_ema, ema
launches = {x.problem if x.name == "adamw_ema" else x.name: x for x in ema.launches() + adamw_ema.launches()}
for name, launch in launches.items():
    if "coefficients" not in name and "by tensor" not in name:
        found = re.findall(r"(ld|st)\\.global\\S*v4\\.b32", compile_ahead(launch, 80).ptx)
        print(name, found.count("ld"), found.count("st"), sep=";")
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(";") for line in done.stdout.splitlines()]
    found = {name: (int(loads), int(stores)) for name, loads, stores in lines}
    model = multi_tensor.MODEL[3]
    per_block = multi_tensor.BLOCK // (32 * multi_tensor.WARPS * 4)  # vectors of each stream and thread
    assert found["ema_update_"] == (2 * per_block, per_block)
    assert found["grad_norms"] == (per_block, 0)
    for suffix in ("", ", bf16 copies of both", ", fp16 copies of both"):
        assert found[model + suffix] == (5 * per_block, 4 * per_block)


def test_memory_that_moves_between_steps(triton_device: torch.device) -> None:
    mine = problem("adamw", triton_device)
    theirs = problem("adamw", triton_device)
    for step in range(4):
        for params, *_ in (mine, theirs):
            set_grads(params, 10 + step)
        if step == 1:  # as .to() or a restored checkpoint does
            for p in mine[0]:
                p.data = p.data.clone()
        if step == 2:
            for state in mine[2].state.values():
                state["exp_avg"] = state["exp_avg"].clone()
            with torch.no_grad():
                mine[0][0].grad.set_(mine[0][0].grad.clone())  # type: ignore[union-attr]
        mine[2].step(momentum=0.9)
        theirs[2].step(momentum=0.9)
        for params, *_ in (mine, theirs):
            for p in params:
                p.grad = None
    assert all(map(torch.equal, mine[0] + mine[1], theirs[0] + theirs[1]))


def test_only_the_gradients_go_up_again(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    params, _, optimizer = problem("adamw", triton_device)
    set_grads(params, 0)
    optimizer.step(momentum=0.9)
    uploads = []
    real = multi_tensor.upload
    monkeypatch.setattr(multi_tensor, "upload", lambda x, device: uploads.append(len(x)) or real(x, device))
    kept = []
    for step in range(3):
        set_grads(params, step)
        kept += [p.grad for p in params]  # so that the next gradients lie elsewhere
        optimizer.step(momentum=0.9)
    numbers = multi_tensor.PER_STEP + adamw_ema.PER_GROUP
    assert uploads == [len(params) + numbers] * 3
    params[0].data = params[0].data.clone()
    optimizer.step(momentum=0.9)
    assert len(uploads) == 5


def test_tables_are_bounded(triton_device: torch.device) -> None:
    for i in range(2 * multi_tensor._CACHED):
        multi_tensor.constants([[i, -1]], triton_device)
    assert len(multi_tensor._cache) <= multi_tensor._CACHED
    assert multi_tensor.constants([[5, 6], [7, 8]], triton_device).tolist() == [5, 6, 7, 8]


def test_a_layout_covers_every_element_once(triton_device: torch.device) -> None:
    chunk, huge = multi_tensor.CHUNK, 2**32 + 5
    sizes = [0, 1, chunk, chunk + 1, 0, 3 * chunk - 1, huge]
    layout = multi_tensor.layout(sizes, triton_device)
    table = layout.table.cpu()
    n, n_chunks = layout.n, layout.n_chunks
    assert n == len(sizes) and len(table) == 2 * n + 1 + 2 * n_chunks
    assert table[:n].tolist() == sizes
    first = table[n : 2 * n + 1].tolist()
    owner, number = table[2 * n + 1 :].view(2, n_chunks)
    assert first[-1] == n_chunks
    for i, size in enumerate(sizes):
        mine = number[owner == i]
        assert first[i + 1] - first[i] == len(mine) == -(-size // chunk)
        assert torch.equal(mine, torch.arange(len(mine))) and torch.equal(
            owner[first[i] : first[i + 1]], torch.full_like(mine, i)
        )


def test_offsets_beyond_32_bits(triton_device: torch.device) -> None:
    """One chunk far into a tensor of which only that chunk exists."""
    chunk, number = multi_tensor.CHUNK, 2**32 // multi_tensor.CHUNK + 3
    student, teacher = torch.randn(300, device=triton_device), torch.zeros(300, device=triton_device)
    start = number * chunk
    table = torch.tensor([start + 300, 0, 1, 0, number], device=triton_device)
    addresses = [0, *(x.data_ptr() - 4 * start for x in (teacher, student))]
    ema._ema_kernel[(1,)](
        table, torch.tensor(addresses, device=triton_device), table, 0.25, 0.75, 1, 1,
        False, chunk, multi_tensor.BLOCK, num_warps=multi_tensor.WARPS,
    )  # fmt: skip
    torch.testing.assert_close(teacher, 0.75 * student)


def test_the_first_steps_keep_their_digits(triton_device: torch.device) -> None:
    """1 - beta^n in fp32 would lose four digits; a beta of 0 has no logarithm."""
    for betas in ((0.9, 0.9999), (0.0, 0.0)):
        p = torch.nn.Parameter(torch.zeros(5, device=triton_device))
        optimizer = AdamWEMA([p], lr=1.0, betas=betas, eps=0.0)
        p.grad = torch.tensor([1e-3, 1.0, -30.0, 1e-6, 5.0], device=triton_device)
        optimizer.step()
        torch.testing.assert_close(p.detach(), -p.grad.sign(), rtol=3e-7, atol=0)


def test_launches_are_described(triton_device: torch.device) -> None:
    for module in (ema, adamw_ema, lars, lamb):
        described = {launch.kernel.__name__ for launch in module.launches()}
        assert described == {name for name in vars(module) if name.endswith("_kernel")}
        for launch in module.launches():
            assert {*launch.signature, *launch.constants} == set(launch.kernel.arg_names)
            assert not {*launch.signature} & {*launch.constants}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cuda_graph_replays_the_step(name: str) -> None:
    device = torch.device("cuda")
    momentum, lr, scale = (torch.tensor(x, device=device) for x in (0.9, 0.1, 8.0))
    captured, eager = (problem(name, device, lr=lr) for _ in range(2))
    gradients = tensors(device, 5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()

    def step(params, optimizer, source):  # type: ignore[no-untyped-def]
        for p, g in zip(params, source, strict=True):
            p.grad = 1.0 * g
        return optimizer.step(momentum=momentum, grad_scale=scale)

    with torch.cuda.stream(stream):
        for _ in range(2):
            step(captured[0], captured[2], gradients)
            step(eager[0], eager[2], gradients)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result = step(captured[0], captured[2], gradients)
    for i in range(4):
        for g, new in zip(gradients, tensors(device, 20 + i), strict=True):
            g.copy_(new)
        if i == 2:
            gradients[1][3, 3] = float("nan")
        lr.fill_(0.05 * (i + 1))
        graph.replay()
        expected = step(eager[0], eager[2], gradients)
        assert bool(result.found_inf) == bool(expected.found_inf) == (i == 2)
        assert all(map(torch.equal, captured[0] + captured[1], eager[0] + eager[1]))
        if i == 0:  # an eager step in between must not leave its addresses to the graph
            step(captured[0], captured[2], [g.clone() for g in gradients])
            step(eager[0], eager[2], gradients)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_eager_form_decides_on_the_device_as_well(
    triton_device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU without triton: no kernel takes any tensor."""
    results = []
    for eager in (False, True):
        params, teachers, optimizer = problem(name, triton_device)
        if eager:
            monkeypatch.setattr("fastdino_kernels.optimizer._is_fast", lambda row: False)
        for step, bad in enumerate((False, True, False)):
            set_grads(params, step)
            if bad:
                params[1].grad[1, 1] = float("inf")  # type: ignore[index]
            before = [x.detach().clone() for x in (*params, *teachers)]
            with NoWaiting():
                result = optimizer.step(momentum=0.9)
            assert bool(result.found_inf) is bad
            assert all(map(torch.equal, before, (*params, *teachers))) is bad
        results.append([*params, *teachers, result.grad_norms])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
