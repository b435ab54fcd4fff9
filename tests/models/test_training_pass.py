"""Passes of a training step through the backbone: what they keep and recompute, compiled, in 16 bits."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdino.config import ConfigError
from fastdino.models import VisionTransformer
from fastdino.models.attention import pack, resolve_attention
from fastdino.models.linear import attach_low_precision
from fastdino.models.vit import compiled_body
from tests.models.test_vit import images, tiny


def training_loss(model: VisionTransformer, crops: list[Tensor]) -> Tensor:
    torch.manual_seed(1)
    weight = torch.randn(sum(map(len, crops)), model.embed_dim, dtype=crops[0].dtype)
    return (model(crops) * weight).sum()


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_nothing_but_memory(checkpointing, rate) -> None:
    model = tiny(drop_path_rate=rate).train()
    crops = [images(4, 3, 32, 32), images(6, 3, 12, 12)]
    results = []
    for value in ("none", checkpointing):
        model.checkpointing = value
        assert model.checkpointing == value
        loss = training_loss(model, crops)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_without_gradients_and_bad_values() -> None:
    model, x = tiny(), images(2, 3, 32, 32)
    want = model(x)
    model.checkpointing = "full"
    with torch.no_grad():
        assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match="checkpointing: expected one of none, selective, full, got 'some'"):
        model.checkpointing = "some"
    with pytest.raises(ValueError, match="backend: expected one of sdpa, .*, got 'auto'"):
        model.set_attention("auto")


def test_backends_give_the_same_features() -> None:
    model, crops = tiny(), [images(2, 3, 32, 32), images(3, 3, 12, 20)]
    want = model(crops)
    model.set_attention("math")
    got = model(crops)
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_equal_eager_ones(checkpointing, rate) -> None:
    """Graphs: student and teacher, all tokens and [CLS] alone, one more per rate that keeps other crops."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    student = tiny(depth=4, drop_path_rate=rate).float().train()
    teacher = tiny(depth=4).float().train().requires_grad_(False)
    crops = [images(4, 3, 32, 32).float(), images(6, 3, 12, 12).float()]
    student.checkpointing = checkpointing
    loss = training_loss(student, crops)
    want = loss, *torch.autograd.grad(loss, list(student.parameters())), teacher(crops[0])
    for model in (student, teacher):
        model.compile_blocks(counter)
    for _ in range(2):
        loss = training_loss(student, crops)
        with torch.no_grad():
            target = teacher(crops[0])
        got = loss, *torch.autograd.grad(loss, list(student.parameters())), target
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert counter.frame_count == (6 if rate == 0.4 else 4)
    student.eval()
    student(crops[1])
    student.get_intermediate_layers(crops[1])
    student.get_last_selfattention(crops[0])
    assert counter.frame_count == (6 if rate == 0.4 else 4)


def test_compiled_blocks_keep_no_more() -> None:
    """The partitioner may save less than autograd would, as the sum of a branch in 16 bits, but not more."""
    torch._dynamo.reset()
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=64, depth=1, num_heads=1)
    attach_low_precision(model, torch.bfloat16)
    body = compiled_body("aot_eager_decomp_partition")
    block, packing = model.blocks[0], pack(((2, 17),), "sdpa", "cpu", torch.bfloat16)
    packing = packing._replace(kernels=("flash-cpu",))
    weights = {x.data_ptr() for x in (*block.parameters(), *block.buffers())}
    for checkpointing, budget in (("none", 24), ("selective", 16)):
        x = torch.randn(34, 64, requires_grad=True)
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            block(x, packing, checkpointing=checkpointing, body=body).sum()
        own = sum(size for key, size in kept.items() if key not in weights)
        assert own <= budget * x.numel() and own > (budget - 4) * x.numel()


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_a_block_through_inductor() -> None:
    torch._dynamo.reset()
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    block, packing = model.blocks[0], pack(((2, 5), (1, 3)))
    x = torch.randn(13, 16, requires_grad=True)
    inputs, results = [x, *block.parameters()], []
    for body in (None, compiled_body("inductor")):
        y = block(x, packing, body=body)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_pass_can_be_captured(compiled, backend) -> None:
    """As a CUDA graph, which refuses whatever would wait for the device; replayed, it computes the same."""
    torch._dynamo.reset()
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    crops = [torch.randn(4, 3, 32, 32, device="cuda"), torch.randn(6, 3, 16, 16, device="cuda")]
    for rate in (0.0, 0.4):
        model = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=128, depth=3, num_heads=2, drop_path_rate=rate
        ).to("cuda")
        model.set_attention(resolve_attention(backend, device="cuda", dtype=dtype, head_dim=64))
        model.checkpointing = "selective"
        attach_low_precision(model, dtype)
        if compiled:
            model.compile_blocks()

        def step(model: VisionTransformer = model) -> list[Tensor]:
            with torch.autocast("cuda", dtype):
                loss = model(crops)[:, ::2].sum()
            return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                want = step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
        assert all(x.isfinite().all() for x in got)
        if rate == 0.0:
            for a, b in zip(got, want, strict=True):
                assert (a - b).norm() <= 2e-2 * b.norm() + 1e-3


def test_xformers_stays_eager() -> None:
    model = tiny()
    model.set_attention("xformers")
    with pytest.raises(ConfigError, match="--compile: expected another --attention than xformers"):
        model.compile_blocks()


def test_16_bit_weights_change_nothing_under_autocast() -> None:
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=3)
    crops = [torch.randn(3, 3, 64, 64), torch.randn(5, 3, 24, 24)]
    results = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = training_loss(model, crops)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        attach_low_precision(model, torch.bfloat16)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-2, atol=0)
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 1e-2 * b.norm()
