"""The trainer's step against an independent eager loop written from Algorithm 1 of the paper."""

import copy
import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdino.config import Config
from fastdino.data.loader import Crops
from fastdino.engine.optim import Updater, parameter_groups
from fastdino.engine.schedules import Hyper, Schedule
from fastdino.engine.step import Scaler, train_step
from fastdino.methods.dino import DINO

B, N_LOCAL, K = 4, 3, 48


def tiny_config(**optim) -> Config:
    config = Config()
    model = config.model
    model.arch, model.embed_dim, model.depth, model.num_heads, model.patch_size = "vit_tiny", 32, 2, 2, 8
    model.drop_path_rate, model.out_dim, model.head_hidden_dim, model.bottleneck_dim = 0.0, K, 48, 16
    config.crops.global_crops_size, config.crops.local_crops_size = 32, 16
    config.crops.local_crops_number = N_LOCAL
    config.loss.warmup_teacher_temp_epochs, config.loss.teacher_temp = 2, 0.07
    config.optim.epochs, config.optim.warmup_epochs, config.optim.batch_size_per_gpu = 4, 1, B
    config.optim.lr, config.optim.clip_grad = 0.05, 0.5  # clipping must bite
    for key, value in optim.items():
        setattr(config.optim, key, value)
    return config


def batches(seed: int = 0, size: int = B):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield Crops(
            torch.randn(2 * size, 3, 32, 32, generator=generator),
            torch.randn(N_LOCAL * size, 3, 16, 16, generator=generator),
            np.arange(size),
        )


def build(config: Config) -> tuple[DINO, Updater]:
    torch.manual_seed(0)
    method = DINO(config)
    return method, Updater(method.student, method.teacher, config.optim)


def run(method, updater, config, source, steps, *, steps_per_epoch=5, accumulate=1):
    schedule = Schedule(config, steps_per_epoch, B * accumulate)
    return [
        train_step(
            method,
            updater,
            source,
            schedule(s),
            accumulate=accumulate,
            dtype=torch.float32,
            scaler=Scaler(False),
        )
        for s in range(steps)
    ]


def digest(method: DINO, updater: Updater) -> str:
    h = hashlib.sha256()
    for tensors in (method.state_dict(), updater.state()):
        for name in sorted(tensors):
            h.update(name.encode() + tensors[name].detach().numpy().tobytes())
    return h.hexdigest()


def paper_loop(method: DINO, config: Config, source, steps: int, steps_per_epoch: int) -> list[float]:
    """Algorithm 1 with multi-crop, official schedules, per-tensor clipping and last-layer freeze, one view
    pair at a time.
    """
    student, teacher, center = method.student, method.teacher, torch.zeros(1, K)
    optimizer = torch.optim.AdamW(parameter_groups(student), lr=0.0)
    total, warm = config.optim.epochs * steps_per_epoch, config.optim.warmup_epochs * steps_per_epoch
    half_cosine = lambda a, b, i, n: b + 0.5 * (a - b) * (1 + math.cos(math.pi * i / n))  # noqa: E731
    peak = config.optim.lr * B / 256
    losses = []
    for it in range(steps):
        epoch = it // steps_per_epoch
        lr = (
            np.linspace(0, peak, warm)[it]
            if it < warm
            else half_cosine(peak, config.optim.min_lr, it - warm, total - warm)
        )
        decay = half_cosine(config.optim.weight_decay, config.optim.weight_decay_end, it, total)
        momentum = half_cosine(config.loss.momentum_teacher, 1.0, it, total)
        temp = ([0.04, 0.07] + [0.07] * 10)[epoch]
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
        optimizer.param_groups[1].update(lr=lr, weight_decay=0.0)
        crops = next(source)
        views = [*crops.global_.chunk(2), *crops.local.chunk(N_LOCAL)]
        with torch.no_grad():
            targets = [teacher.head(teacher.backbone(v)) for v in views[:2]]
        outputs = [student.head(student.backbone(v)) for v in views]
        loss, terms = torch.zeros(()), 0
        for i, target in enumerate(targets):
            p = F.softmax((target - center) / temp, dim=-1)
            for j, output in enumerate(outputs):
                if i != j:
                    loss = loss + torch.sum(-p * F.log_softmax(output / 0.1, dim=-1), dim=-1).mean()
                    terms += 1
        loss = loss / terms
        optimizer.zero_grad()
        loss.backward()
        for name, p in student.named_parameters():
            if p.grad is not None:
                norm = p.grad.norm(2)
                coefficient = config.optim.clip_grad / (norm + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
                if "last_layer" in name and epoch < config.optim.freeze_last_layer:
                    p.grad = None
        optimizer.step()
        with torch.no_grad():
            for q, k in zip(student.parameters(), teacher.parameters(), strict=True):
                k.mul_(momentum).add_((1 - momentum) * q.detach())
            center = center * 0.9 + torch.cat(targets).mean(dim=0, keepdim=True) * 0.1
        losses.append(loss.item())
    method.center.copy_(center[0])
    return losses


def without_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of the keys' bias is exactly zero (softmax is shift invariant); AdamW turns its rounding
    noise into steps.
    """
    if name.endswith("qkv.bias"):
        d = tensor.numel() // 3
        return torch.cat([tensor[:d], tensor[2 * d :]])
    return tensor


def test_twenty_steps_equal_the_papers_loop():
    config = tiny_config()
    method, updater = build(config)
    oracle = copy.deepcopy(method)
    results = run(method, updater, config, batches(), 20)
    losses = paper_loop(oracle, config, batches(), 20, 5)
    np.testing.assert_allclose([r.loss for r in results], losses, rtol=1e-5)
    expected = oracle.state_dict()
    moved = 0.0
    for name, tensor in method.state_dict().items():
        torch.testing.assert_close(
            without_key_bias(name, tensor),
            without_key_bias(name, expected[name]),
            rtol=1e-5,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    start, _ = build(config)
    for name, tensor in start.student.state_dict().items():
        moved = max(moved, float((tensor - method.student.state_dict()[name]).abs().max()))
    assert moved > 1e-3  # the comparison is not between two networks that stood still


def test_accumulation_equals_one_large_batch_and_moves_the_teacher_once():
    config = tiny_config()
    whole, whole_updater = build(config)
    parts, parts_updater = build(config)
    source = batches(1, size=2 * B)
    halves = []
    for crops in itertools.islice(source, 8):
        g, n = crops.global_.view(2, 2, B, 3, 32, 32), crops.local.view(N_LOCAL, 2, B, 3, 16, 16)
        halves += [Crops(g[:, i].flatten(0, 1), n[:, i].flatten(0, 1), crops.ids[:B]) for i in (0, 1)]
    schedule = Schedule(config, 5, 2 * B)
    source = batches(1, size=2 * B)
    kwargs = dict(dtype=torch.float32, scaler=Scaler(False))
    for s in range(8):
        one = train_step(whole, whole_updater, source, schedule(s), **kwargs)
        two = train_step(
            parts, parts_updater, iter(halves[2 * s : 2 * s + 2]), schedule(s), accumulate=2, **kwargs
        )
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        assert two.teacher_entropy == pytest.approx(one.teacher_entropy, rel=1e-4)
    for name, tensor in parts.state_dict().items():
        torch.testing.assert_close(
            without_key_bias(name, tensor),
            without_key_bias(name, whole.state_dict()[name]),
            rtol=1e-4,
            atol=2e-5,
        )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "lamb"])
@pytest.mark.parametrize("site", ["pixels", "parameter", "gradient"])
def test_a_bad_step_changes_no_byte(optimizer, site):
    config = tiny_config(optimizer=optimizer)
    method, updater = build(config)
    run(method, updater, config, batches(), 3)
    hyper = Hyper(lr=0.01, weight_decay=0.04, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)
    source = batches(5)
    hook = None
    if site == "pixels":
        crops = next(source)
        crops.local[3, 0, 2, 2] = float("inf")
        source = iter([crops])
    elif site == "parameter":
        hook = method.student.backbone.register_forward_hook(lambda m, a, out: out * float("nan"))
    else:
        hook = method.student.backbone.cls_token.register_hook(lambda g: g * float("inf"))
    before = digest(method, updater)
    result = train_step(method, updater, source, hyper, dtype=torch.float32, scaler=Scaler(False))
    assert result.skipped
    assert digest(method, updater) == before
    if hook is not None:
        hook.remove()
    good = train_step(method, updater, batches(6), hyper, dtype=torch.float32, scaler=Scaler(False))
    assert not good.skipped and digest(method, updater) != before


def test_last_layer_frozen_then_trained():
    config = tiny_config()
    method, updater = build(config)
    weight = method.student.head.last_layer.weight_v
    start = weight.detach().clone()
    run(method, updater, config, batches(), 5)
    assert torch.equal(weight, start)
    assert not any("last_layer.weight_v" in name for name in updater.state())
    schedule = Schedule(config, 5, B)
    train_step(method, updater, batches(), schedule(7), dtype=torch.float32, scaler=Scaler(False))
    assert not torch.equal(weight, start)
    assert method.student.head.last_layer.weight_g.eq(1).all()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "lamb"])
def test_state_round_trip_continues_bitwise(optimizer):
    config = tiny_config(optimizer=optimizer)
    method, updater = build(config)
    source = batches()
    schedule = Schedule(config, 5, B)
    kwargs = dict(dtype=torch.float32, scaler=Scaler(False))
    for s in range(4):
        train_step(method, updater, source, schedule(s), **kwargs)
    saved = (
        {k: v.clone() for k, v in method.state_dict().items()},
        {k: v.clone() for k, v in updater.state().items()},
    )
    other, other_updater = build(config)
    other.load_state_dict(saved[0])
    other_updater.load_state(saved[1])
    for s in range(4, 9):  # crosses the end of the last-layer freeze
        crops = next(source)
        train_step(method, updater, iter([crops]), schedule(s), **kwargs)
        train_step(other, other_updater, iter([crops]), schedule(s), **kwargs)
    assert digest(method, updater) == digest(other, other_updater)


def test_foreign_optimizer_state_is_refused():
    _, updater = build(tiny_config())
    with pytest.raises(KeyError, match="no trained parameter backbone.absent"):
        updater.load_state({"exp_avg.backbone.absent": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"exp_avg.backbone.norm.bias: expected shape \(32,\), got \(3,\)"):
        updater.load_state({"exp_avg.backbone.norm.bias": torch.zeros(3)})


def test_loss_scaling_survives_overflow_and_grows():
    scaler = Scaler(enabled=True, scale=2.0**10)
    scaler.update(skipped=True)
    assert scaler.value() == 2.0**9 and scaler.good_steps == 0
    for _ in range(2000):
        scaler.update(skipped=False)
    assert scaler.value() == 2.0**10
    assert Scaler(enabled=False).value() == 1.0


def test_scaled_step_equals_unscaled_step():
    config = tiny_config()
    plain, plain_updater = build(config)
    scaled, scaled_updater = build(config)
    schedule = Schedule(config, 5, B)
    for s in range(7):
        crops = list(itertools.islice(batches(s), 1))
        train_step(plain, plain_updater, iter(crops), schedule(s), dtype=torch.float32, scaler=Scaler(False))
        train_step(
            scaled, scaled_updater, iter(crops), schedule(s), dtype=torch.float32, scaler=Scaler(True, 1024.0)
        )
    for name, tensor in scaled.state_dict().items():
        torch.testing.assert_close(
            without_key_bias(name, tensor),
            without_key_bias(name, plain.state_dict()[name]),
            rtol=1e-5,
            atol=1e-6,
        )


def test_bf16_stays_close_to_fp32():
    config = tiny_config(lr=0.0005)
    method, updater = build(config)
    other, other_updater = build(config)
    schedule = Schedule(config, 5, B)
    for s in range(5):
        crops = list(itertools.islice(batches(s), 1))
        a = train_step(method, updater, iter(crops), schedule(s), dtype=torch.float32, scaler=Scaler(False))
        b = train_step(
            other, other_updater, iter(crops), schedule(s), dtype=torch.bfloat16, scaler=Scaler(False)
        )
        assert b.loss == pytest.approx(a.loss, rel=0.02)
        assert b.teacher_entropy == pytest.approx(a.teacher_entropy, rel=0.05)


@pytest.mark.parametrize("asked", range(7))
def test_a_stop_abandons_the_step_without_a_trace(asked):
    config = tiny_config()
    method, updater = build(config)
    source = batches()
    run(method, updater, config, source, 1)
    before = digest(method, updater)
    calls = itertools.count()
    result = train_step(
        method,
        updater,
        source,
        Schedule(config, 5, 2 * B)(1),
        accumulate=2,
        dtype=torch.float32,
        scaler=Scaler(False),
        stop=lambda: next(calls) >= asked,
    )
    assert result.stop == (asked < 5)  # two questions per micro-batch and one before the update
    assert (digest(method, updater) == before) == result.stop
