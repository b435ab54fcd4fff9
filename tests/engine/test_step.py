"""The trainer's step against an independent eager loop written from Algorithm 1 of the paper."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastdino.config import Config
from fastdino.data.loader import Crops
from fastdino.engine.optim import Updater, parameter_groups
from fastdino.engine.schedules import Hyper, Schedule
from fastdino.engine.step import Scaler, TrainStep
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


def build(config: Config, **options) -> TrainStep:
    torch.manual_seed(0)
    method = DINO(config)
    updater = Updater(method.student, method.teacher, config.optim)
    return TrainStep(method, updater, **{"dtype": torch.float32, **options})


def run(step, config, source, steps, *, first=0):
    schedule = Schedule(config, 5, B * step.accumulate)
    return [step.run(source, schedule(s)) for s in range(first, first + steps)]


def digest(step: TrainStep) -> str:
    h = hashlib.sha256()
    for tensors in (step.method.state_dict(), step.updater.state()):
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


def assert_same(a: TrainStep, b: TrainStep, rtol: float, atol: float) -> None:
    expected = b.method.state_dict()
    for name, tensor in a.method.state_dict().items():
        torch.testing.assert_close(
            without_key_bias(name, tensor),
            without_key_bias(name, expected[name]),
            rtol=rtol,
            atol=atol,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_twenty_steps_equal_the_papers_loop():
    config = tiny_config()
    step, oracle = build(config), build(config)
    results = run(step, config, batches(), 20)
    losses = paper_loop(oracle.method, config, batches(), 20, 5)
    np.testing.assert_allclose([r.loss for r in results], losses, rtol=1e-5)
    assert_same(step, oracle, rtol=1e-5, atol=1e-5)
    start = build(config).method.student.state_dict()
    moved = [(start[name] - x).abs().max() for name, x in step.method.student.state_dict().items()]
    assert max(moved) > 1e-3  # the comparison is not between two networks that stood still


def test_accumulation_equals_one_large_batch_and_moves_the_teacher_once():
    config = tiny_config()
    whole, parts = build(config), build(config, accumulate=2)
    halves = []
    for crops in itertools.islice(batches(1, size=2 * B), 8):
        g, n = crops.global_.view(2, 2, B, 3, 32, 32), crops.local.view(N_LOCAL, 2, B, 3, 16, 16)
        halves += [Crops(g[:, i].flatten(0, 1), n[:, i].flatten(0, 1), crops.ids[:B]) for i in (0, 1)]
    schedule, source, split = Schedule(config, 5, 2 * B), batches(1, size=2 * B), iter(halves)
    for s in range(8):
        one, two = whole.run(source, schedule(s)), parts.run(split, schedule(s))
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        assert two.signs["teacher_entropy"] == pytest.approx(one.signs["teacher_entropy"], rel=1e-4)
    assert_same(parts, whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "lamb"])
@pytest.mark.parametrize("site", ["pixels", "parameter", "gradient"])
def test_a_bad_step_changes_no_byte(optimizer, site):
    config = tiny_config(optimizer=optimizer)
    config.model.use_bn_in_head = True  # whose running statistics must not move either
    step = build(config)
    run(step, config, batches(), 3)
    hyper = Hyper(lr=0.01, weight_decay=0.04, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)
    source = batches(5)
    hook = None
    if site == "pixels":
        crops = next(source)
        crops.local[3, 0, 2, 2] = float("inf")
        source = iter([crops])
    elif site == "parameter":
        hook = step.method.student.backbone.register_forward_hook(lambda m, a, out: out * float("nan"))
    else:
        hook = step.method.student.backbone.cls_token.register_hook(lambda g: g * float("inf"))
    before = digest(step)
    assert step.run(source, hyper).skipped
    assert digest(step) == before
    if hook is not None:
        hook.remove()
    assert not step.run(batches(6), hyper).skipped and digest(step) != before


@pytest.mark.parametrize("value", [1e30, math.inf, -math.inf, math.nan])
def test_what_is_kept_between_steps_must_be_finite_but_may_be_large(value):
    config = tiny_config()
    hyper = Hyper(lr=0.01, weight_decay=0.04, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)
    for key in ("exp_avg", "exp_avg_sq", "center"):
        step = build(config)
        run(step, config, batches(), 2)
        state = next(iter(step.updater.optimizer.state.values())) | {"center": step.center[None]}
        state[key].view(-1)[3] = value
        before = digest(step)
        assert step.run(batches(5), hyper).skipped != math.isfinite(value), key
        assert (digest(step) == before) != math.isfinite(value), key


def test_last_layer_frozen_then_trained():
    config = tiny_config()
    step = build(config)
    layer = step.method.student.head.last_layer
    start = layer.weight_v.detach().clone()
    run(step, config, batches(), 5)
    assert torch.equal(layer.weight_v, start)
    assert not any("last_layer.weight_v" in name for name in step.updater.state())
    run(step, config, batches(), 1, first=7)
    assert not torch.equal(layer.weight_v, start)
    assert layer.weight_g.eq(1).all()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "lamb"])
def test_state_round_trip_continues_bitwise(optimizer):
    config = tiny_config(optimizer=optimizer)
    step, other = build(config), build(config)
    source = batches()
    run(step, config, source, 4)
    other.method.load_state_dict({k: v.clone() for k, v in step.method.state_dict().items()})
    other.updater.load_state({k: v.clone() for k, v in step.updater.state().items()})
    for s in range(4, 9):  # crosses the end of the last-layer freeze
        crops = next(source)
        run(step, config, iter([crops]), 1, first=s)
        run(other, config, iter([crops]), 1, first=s)
    assert digest(step) == digest(other)


def test_foreign_optimizer_state_is_refused():
    updater = build(tiny_config()).updater
    with pytest.raises(KeyError, match="no trained parameter backbone.absent"):
        updater.load_state({"exp_avg.backbone.absent": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"exp_avg.backbone.norm.bias: expected shape \(32,\), got \(3,\)"):
        updater.load_state({"exp_avg.backbone.norm.bias": torch.zeros(3)})


def test_loss_scaling_survives_overflow_and_grows():
    yes, no = torch.tensor(True), torch.tensor(False)
    scaler = Scaler(torch.device("cpu"), enabled=True, scale=2.0**10)
    scaler.update(yes, no)
    assert scaler.state() == {"scale": 2.0**9, "good_steps": 0}
    scaler.load_state(None)  # of a run in bf16
    assert float(scaler.scale) == 2.0**9
    scaler.update(no, no)
    scaler.update(yes, yes)  # that step did not happen
    assert scaler.state() == {"scale": 2.0**9, "good_steps": 1}
    for _ in range(1999):
        scaler.update(no, no)
    assert scaler.state() == {"scale": 2.0**10, "good_steps": 0}
    for _ in range(20):
        scaler.update(yes, no)
    assert float(scaler.scale) == 1.0
    off = Scaler(torch.device("cpu"), enabled=False)
    off.update(yes, no)
    off.load_state(scaler.state() | {"scale": 8.0})
    assert float(off.scale) == 1.0 and off.state() is None


def test_scaled_step_equals_unscaled_step():
    config = tiny_config()
    plain = build(config)
    scaled = build(config, scaler=Scaler(torch.device("cpu"), True, 1024.0))
    for s in range(7):
        crops = list(itertools.islice(batches(s), 1))
        run(plain, config, iter(crops), 1, first=s)
        run(scaled, config, iter(crops), 1, first=s)
    assert_same(scaled, plain, rtol=1e-5, atol=1e-6)


def test_an_overflow_halves_the_scale_and_changes_nothing_else():
    config = tiny_config()
    step = build(config, scaler=Scaler(torch.device("cpu"), True, 2.0**126))
    before = digest(step)
    result = run(step, config, batches(), 1, first=7)[0]
    assert result.skipped and math.isfinite(result.loss) and result.scale == 2.0**125
    assert digest(step) == before


def test_bf16_stays_close_to_fp32():
    config = tiny_config(lr=0.0005)
    step, other = build(config), build(config, dtype=torch.bfloat16)
    for s in range(5):
        crops = list(itertools.islice(batches(s), 1))
        (a,), (b,) = run(step, config, iter(crops), 1, first=s), run(other, config, iter(crops), 1, first=s)
        assert b.loss == pytest.approx(a.loss, rel=0.02)
        assert b.signs["teacher_entropy"] == pytest.approx(a.signs["teacher_entropy"], rel=0.05)


@pytest.mark.parametrize("asked", range(7))
def test_a_stop_abandons_the_step_without_a_trace(asked):
    config = tiny_config()
    step = build(config, accumulate=2)
    source = batches()
    run(step, config, source, 1)
    before = digest(step)
    calls = itertools.count()
    result = step.run(source, Schedule(config, 5, 2 * B)(1), stop=lambda: next(calls) >= asked)
    assert result.stop == (asked < 5)  # two questions per micro-batch and one before the update
    assert (digest(step) == before) == result.stop


class Reads(TorchDispatchMode):
    """Counts the operations that bring a value to the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


HOST_READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")
READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
)


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "lamb"])
def test_no_step_waits_for_the_device(optimizer, triton_device, monkeypatch):
    """The operations of a GPU's step, its Triton kernels in the interpreter where there is no GPU."""
    config = tiny_config(optimizer=optimizer)
    config.model.drop_path_rate = 0.1
    torch.manual_seed(0)
    method = DINO(config).to(triton_device)
    step = TrainStep(
        method,
        Updater(method.student, method.teacher, config.optim),
        dtype=torch.bfloat16,
        accumulate=2,
        scaler=Scaler(triton_device, True, 1024.0),
    )
    schedule = Schedule(config, 5, B)
    source = (Crops(c.global_.to(triton_device), c.local.to(triton_device), c.ids) for c in batches())
    source = iter(list(itertools.islice(source, 8)))
    step.enqueue(source, schedule(4))  # states and tables are made in the first steps
    step.enqueue(source, schedule(5))
    list(step.ring.take(every=True))
    with Reads() as reads, monkeypatch.context() as patch:
        for name in HOST_READS:  # also inside our operators, where the mode does not look
            patch.setattr(torch.Tensor, name, lambda x, n=name: reads.found.append(n))
        if triton_device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            step.enqueue(source, schedule(6))
        finally:
            if triton_device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert reads.found == []
        step.sums[0].item()
        patch.undo()
        step.sums[0].item()
        assert reads.found == ["item", "aten._local_scalar_dense.default"]  # the counters count
    assert not list(step.ring.take(every=True))[-1].skipped
