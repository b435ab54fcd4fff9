"""ResNet-50 against its definition in plain functions, and batch norm over processes against one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import ModelConfig
from fastdino.models import MultiCropModel, ResNet, build_backbone, build_model
from fastdino.models.batch_norm import SyncBatchNorm, synchronise_batch_norm
from fastdino.models.resnet import convolve, standard_resnet
from runs import spawn


def small(seed: int = 0, **options) -> ResNet:
    torch.manual_seed(seed)
    model = ResNet(**{"width": 4, "blocks": (2, 1, 1, 1), **options}).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.normal_(0.5, 0.3)
    return model


def images(batch: int, height: int, width: int | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width or height, generator=generator, dtype=torch.float64)


def plain_map(state: dict[str, Tensor], x: Tensor, blocks: tuple[int, ...], training: bool) -> Tensor:
    """Feature map of torchvision's ResNet-50 from its state dictionary."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        get = lambda kind: state[f"{name}.{kind}"].view(-1, 1, 1)  # noqa: E731
        mean, var = get("running_mean"), get("running_var")
        if training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * get("weight") + get("bias")

    x = norm(conv(x, "conv1", 2), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for i, number in enumerate(blocks, 1):
        for j in range(number):
            at, stride = f"layer{i}.{j}.", 2 if i > 1 and j == 0 else 1
            y = norm(conv(x, at + "conv1"), at + "bn1").relu()
            y = norm(conv(y, at + "conv2", stride), at + "bn2").relu()
            y = norm(conv(y, at + "conv3"), at + "bn3")
            if f"{at}downsample.0.weight" in state:
                x = norm(conv(x, at + "downsample.0", stride), at + "downsample.1")
            x = (x + y).relu()
    return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (33, 70), (40, 8), (9, 9)])
def test_equals_the_definition(training, size) -> None:
    model, x = small().train(training), images(3, *size)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.uniform_(0.5, 1.5)
        want = plain_map({k: v.clone() for k, v in model.state_dict().items()}, x, (2, 1, 1, 1), training)
        views, (regions,) = model.forward_regions(x)
        torch.testing.assert_close(regions, want.flatten(2).mT, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(views, want.mean((2, 3)), rtol=1e-10, atol=1e-10)
        if not training:
            assert torch.equal(model.probe_features(x, 4), model(x)) and torch.equal(model(x), views)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 1), (5, 1), (1, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_maps_of_one_column_have_exact_gradients_in_bf16(height, width, stride) -> None:
    layer = nn.Conv2d(32, 32, 3, stride, 1, bias=False)
    x = images(6, height, width)[:, :1].float().expand(-1, 32, -1, -1).contiguous()
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        # What freed memory is likely to hold; gradients must not.
        junk = [torch.full((size,), 1e9) for size in range(1000, 200_000, 9000)]
        del junk
        layer.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = convolve(layer, x)
        out.float().square().sum().backward()
        grads.append(layer.weight.grad)
        torch.testing.assert_close(out.float(), layer(x), rtol=0.02, atol=0.05)
    assert float((grads[0] - grads[1]).norm()) < 0.03 * float(grads[0].norm())


def test_every_resolution_is_normalised_by_itself() -> None:
    model = small().train()
    crops = [images(2, 64), images(3, 64, seed=2), images(4, 32, seed=3)]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    want = [plain_map(state, x, (2, 1, 1, 1), True).mean((2, 3)) for x in (torch.cat(crops[:2]), crops[2])]
    got = model(crops)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-10, atol=1e-10)
    assert model.bn1.num_batches_tracked == 2
    stem = [F.conv2d(x, state["conv1.weight"], stride=2, padding=3) for x in (torch.cat(crops[:2]), crops[2])]
    mean = 0.9 * 0.1 * stem[0].mean((0, 2, 3)) + 0.1 * stem[1].mean((0, 2, 3))
    torch.testing.assert_close(model.bn1.running_mean, mean)


@pytest.mark.parametrize(
    ("arch", "parameters", "buffers", "width"),
    [
        ("resnet50", 23_508_032, 53_173, 2048),
        ("resnet50_w2", 93_907_072, 106_293, 4096),
        ("resnet50_w4", 375_378_176, 212_533, 8192),
        ("resnet50_w5", 586_450_240, 265_653, 10240),
    ],
)
def test_counts(arch, parameters, buffers, width) -> None:
    with torch.device("meta"):
        model = build_backbone(ModelConfig(arch=arch))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(b.numel() for b in model.buffers()) == buffers
    assert len(list(model.parameters())) == 159 and model.embed_dim == width and model.name == arch
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 53


def test_other_sizes_are_named_by_what_they_are() -> None:
    with torch.device("meta"):
        assert small().name == "resnet (2, 1, 1, 1) 128 wide"
        assert ResNet(blocks=(3, 4, 23, 3)).name == "resnet (3, 4, 23, 3) 2048 wide"


def test_count_with_head() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(arch="resnet50"))
    assert sum(p.numel() for p in model.parameters()) == 49_268_032
    assert sum(p.numel() for p in model.head.parameters()) == 25_760_000


def test_torchvision_names() -> None:
    with torch.device("meta"):
        model = standard_resnet("resnet50")
    names = [name for name, _ in model.named_parameters()]
    assert names[:4] == ["conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight"]
    block = [f"{kind}{i}.{part}" for i in (1, 2, 3) for kind, part in [("conv", "weight"), ("bn", "weight")]]
    assert {f"layer4.2.{name}" for name in block} < set(names)
    shortcuts = [name for name in names if "downsample.0" in name]
    assert shortcuts == [f"layer{i}.0.downsample.0.weight" for i in (1, 2, 3, 4)]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["layer2.0.conv2.weight"] == (128, 128, 3, 3)
    assert (model.layer2[0].conv1.stride, model.layer2[0].conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m([]), "expected at least one batch of images"),
        (lambda m: m(torch.zeros(1, 4, 8, 8)), r"images must be \[B, 3, H, W\], got shape \(1, 4, 8, 8\)"),
        (lambda m: ResNet(width=0), "width must be at least 1, got 0"),
        (lambda m: standard_resnet("resnet51"), "--arch: expected one of resnet50, .*got 'resnet51'"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(small())


# -- several processes -------------------------------------------------------------------------------------


class Both(nn.Module):
    """Batch norm of maps, and in the head of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small()
        self.head = nn.Sequential(nn.Linear(128, 6), nn.BatchNorm1d(6), nn.GELU()).double()

    def forward(self, crops: list[Tensor]) -> Tensor:
        return self.head(self.backbone(crops))


def crops_of(rank: int, size: int) -> list[Tensor]:
    """Every size-th of six images, in two resolutions; processes have different shares of the second."""
    return [images(6, 40)[rank::size], images(5, 24, seed=2)[rank::size]]


def weights_of(rank: int, size: int) -> Tensor:
    first, second = torch.randn(11, 6, generator=torch.Generator().manual_seed(4)).double().split([6, 5])
    return torch.cat([first[rank::size], second[rank::size]])


def gradients(model: nn.Module, rank: int, size: int) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    crops = [x.requires_grad_() for x in crops_of(rank, size)]
    out = model(crops)
    (out.square() * weights_of(rank, size)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters()}, [x.grad for x in crops]


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = synchronise_batch_norm(Both()).train()
    assert sum(isinstance(m, SyncBatchNorm) for m in model.modules()) == 21
    out, grads, inputs = gradients(model, rank, size)
    for grad in grads.values():
        dist.all_reduce(grad)
    with torch.no_grad():
        evaluated = model.eval()(crops_of(rank, size))
    torch.save((out, grads, inputs, model.state_dict(), evaluated), f"{folder}/{rank}.pt")
    single = SyncBatchNorm(3).train()
    try:
        single(torch.zeros(0 if rank else 1, 3, 1, 1))
    except ValueError as error:
        assert "more than one value per channel" in str(error)
    else:
        raise AssertionError("one value was normalised")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_batch_norm_over_two_processes_equals_one(tmp_path: Path) -> None:
    spawn(worker, (2, str(tmp_path)), 2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    model = Both().train()
    out, grads, inputs = gradients(model, 0, 1)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for rank, (out_here, grads_here, inputs_here, state, evaluated) in enumerate(found):
        rows = [*range(rank, 6, 2), *range(6 + rank, 11, 2)]
        torch.testing.assert_close(out_here, out[rows], **close)
        for name, grad in grads_here.items():
            torch.testing.assert_close(grad, grads[name], **close)
        for mine, whole in zip(inputs_here, inputs, strict=True):
            torch.testing.assert_close(mine, whole[rank::2], **close)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, **close)
        with torch.no_grad():
            torch.testing.assert_close(evaluated, model.eval()(crops_of(rank, 2)), **close)


def test_conversion_keeps_tensors_and_names() -> None:
    model = MultiCropModel(small(), build_model(ModelConfig(arch="vit_tiny", depth=1, out_dim=4)).head)
    before = {name: id(p) for name, p in model.named_parameters()}
    buffers = {name: id(b) for name, b in model.named_buffers()}
    converted = synchronise_batch_norm(model.eval())
    assert converted is model and {n: id(p) for n, p in model.named_parameters()} == before
    assert {n: id(b) for n, b in model.named_buffers()} == buffers
    assert not any(m.training for m in model.modules())
    x = images(2, 40)
    torch.testing.assert_close(model.backbone(x), small().eval()(x))
    model.train()
    torch.testing.assert_close(model.backbone(x), small().train()(x))
