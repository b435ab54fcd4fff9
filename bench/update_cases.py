"""The updates of weights and teacher that `bench.kernels` measures, on ViT-S/16 and its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fastdino_kernels as fk
import torch
from torch import Tensor

from bench.kernel_cases import OURS, Call, Case, D, Setting


def parameter_shapes(k: int, width: int = 384, depth: int = 12) -> Iterator[tuple[int, ...]]:
    """ViT-S/16 and its projection head."""
    yield from ((1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,))
    for _ in range(depth):
        for n, m in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            yield from ((n, m), (n,), (width,))
    yield from ((width,), (width,))
    yield from ((2048, width), (2048,), (2048, 2048), (2048,), (D, 2048), (D,), (k, D))


class Network:
    """Parameters with gradients and a teacher, equal for every provider."""

    def __init__(self, setting: Setting, k: int, small: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = list(parameter_shapes(k, *((16, 2) if small else ())))
        tensors = [0.02 * torch.randn(size, generator=generator) for size in sizes]
        self.params = [torch.nn.Parameter(x.to(setting.device, copy=True)) for x in tensors]
        self.teacher = [0.5 * x.to(setting.device) for x in tensors]
        for p in self.params:
            p.grad = p.detach() * 0.9 + 0.01
        self.count = sum(x.numel() for x in tensors)

    def settle(self) -> None:
        """Gradients below the limit, as most are in training: then no provider has to write them."""
        for p in self.params:
            assert p.grad is not None
            p.grad.mul_(0.01)

    def results(self, grads: bool) -> list[Tensor]:
        """The head's, which are most of them; a fused optimizer need not write the clipped gradients back."""
        found = [p.grad for p in self.params[-7:] if grads and p.grad is not None]
        return [*found, *(p.detach() for p in self.params[-7:]), *self.teacher[-7:]]

    def clip_loop(self) -> None:
        for p in self.params:
            assert p.grad is not None
            coefficient = 3.0 / (p.grad.norm(2).item() + 1e-6)
            if coefficient < 1:
                p.grad.mul_(coefficient)

    def clip_foreach(self) -> None:
        grads = [p.grad for p in self.params]
        norms = torch._foreach_norm(grads)
        factors = (3.0 / (torch.stack(norms) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(factors.unbind()))

    def ema_loop(self) -> None:
        with torch.no_grad():
            for p, t in zip(self.params, self.teacher, strict=True):
                t.mul_(0.996).add_((1 - 0.996) * p.detach())

    def ema_foreach(self) -> None:
        torch._foreach_lerp_(self.teacher, [p.detach() for p in self.params], 1 - 0.996)


def settle(nets: Sequence[Network]) -> None:
    for net in nets:
        net.settle()


def updated(net: Network, update: Callable[[], object], *, grads: bool = True) -> Call:
    def call() -> list[Tensor]:
        update()
        return net.results(grads)

    return call


def adamw_ema_case(setting: Setting, k: int, small: bool = False) -> Case:
    options = dict(lr=1e-4, weight_decay=0.04)
    providers: dict[str, Call] = {}
    nets: list[Network] = []

    def add(name: str, optimizer: Callable[..., Any], clip: str, ema: str, **more: bool) -> None:
        net = Network(setting, k, small)
        nets.append(net)
        step = optimizer(net.params, **options, **more).step

        def update() -> None:
            getattr(net, clip)()
            step()
            getattr(net, ema)()

        providers[name] = updated(net, update, grads=False)

    foreach = ("clip_foreach", "ema_foreach")
    add("foreach AdamW, official loops", torch.optim.AdamW, "clip_loop", "ema_loop", foreach=True)
    add("foreach throughout", torch.optim.AdamW, *foreach, foreach=True)
    add("torch fused AdamW, foreach", torch.optim.AdamW, *foreach, fused=True)
    net = Network(setting, k, small)
    nets.append(net)
    ours = fk.AdamWEMA(net.params, net.teacher, max_grad_norm=3.0, **options)

    providers[OURS] = updated(net, lambda: ours.step(momentum=0.996), grads=False)
    case = Case("AdamWEMA", dict(parameters=net.count, dtype=torch.float32), providers, in_place=True)
    case.settle = lambda: settle(nets)
    case.bytes = 40 * net.count  # the gradient for its norm; then p, g, m, v, t read and p, m, v, t written

    def apex(library: Any) -> Call:
        add("apex FusedAdam, foreach", library.FusedAdam, *foreach)
        return providers["apex FusedAdam, foreach"]

    if setting.device.type == "cuda":
        case.add("apex FusedAdam, foreach", "apex.optimizers", apex)
    return case


class EagerLARS:
    """Loop over the tensors, as the official code has it."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for p, buffer in zip(self.params, self.buffers, strict=True):
            assert p.grad is not None
            update = p.grad
            if p.ndim != 1:
                update = update.add(p, alpha=self.weight_decay)
                p_norm, u_norm = torch.norm(p), torch.norm(update)
                one = torch.ones_like(p_norm)
                both = torch.where(u_norm > 0, 0.001 * p_norm / u_norm, one)
                update = update.mul(torch.where(p_norm > 0, both, one))
            buffer.mul_(0.9).add_(update)
            p.add_(buffer, alpha=-self.lr)


class EagerLAMB:
    """Loop over the tensors; the gradients are clipped together to a norm of 1."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        norms = torch._foreach_norm([p.grad for p in self.params])
        factor = (1.0 / torch.stack(norms).norm()).clamp(max=1.0)
        for p, (m, v) in zip(self.params, self.moments, strict=True):
            assert p.grad is not None
            g = p.grad * factor
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            update = (m / (1 - 0.9**self.steps)) / ((v / (1 - 0.999**self.steps)).sqrt() + 1e-6)
            update.add_(p, alpha=self.weight_decay)
            p.sub_(update * (self.lr * p.norm() / update.norm()))


def lars_case(setting: Setting, k: int, small: bool = False) -> Case:
    nets = [Network(setting, k, small) for _ in range(2)]
    options = dict(lr=0.1, weight_decay=1e-4)
    eager = EagerLARS(nets[0].params, **options)
    ours = fk.LARS(nets[1].params, teacher_params=nets[1].teacher, **options)
    return _optimizers("LARS", nets, eager.step, lambda: ours.step(momentum=0.996), 36)


def lamb_case(setting: Setting, k: int, small: bool = False) -> Case:
    nets = [Network(setting, k, small) for _ in range(3)]
    options = dict(lr=1e-3, weight_decay=0.01, max_grad_norm=1.0)
    eager = EagerLAMB(nets[0].params, lr=1e-3, weight_decay=0.01)
    ours = fk.LAMB(nets[1].params, nets[1].teacher, exclude_1d=False, **options)
    case = _optimizers("LAMB", nets, eager.step, lambda: ours.step(momentum=0.996), 52)

    def apex(library: Any) -> Call:
        step = library.FusedLAMB(nets[2].params, eps=1e-6, **options).step
        return updated(nets[2], lambda: (step(), nets[2].ema_foreach()), grads=False)

    if setting.device.type == "cuda":
        case.add("apex FusedLAMB, foreach EMA", "apex.optimizers", apex)
    return case


def _optimizers(
    op: str, nets: list[Network], eager: Callable[[], None], ours: Callable[[], object], traffic: int
) -> Case:
    """``traffic``: bytes per parameter."""
    providers = {
        "eager loops": updated(nets[0], lambda: (eager(), nets[0].ema_loop()), grads=False),
        OURS: updated(nets[1], ours, grads=False),
    }
    case = Case(op, dict(parameters=nets[0].count, dtype=torch.float32), providers, in_place=True)
    case.settle = lambda: settle(nets)
    case.bytes = traffic * nets[0].count
    return case


def ema_update_case(setting: Setting, k: int, small: bool = False) -> Case:
    nets = [Network(setting, k, small) for _ in range(3)]
    sources = [p.detach() for p in nets[2].params]

    providers = {
        "official loop": updated(nets[0], nets[0].ema_loop),
        "foreach lerp": updated(nets[1], nets[1].ema_foreach),
        OURS: updated(nets[2], lambda: fk.ema_update_(nets[2].teacher, sources, 0.996)),
    }
    case = Case("ema_update_", dict(parameters=nets[0].count, dtype=torch.float32), providers, in_place=True)
    case.bytes = 12 * nets[0].count
    return case


def clip_grad_case(setting: Setting, k: int, small: bool = False) -> Case:
    nets = [Network(setting, k, small) for _ in range(3)]

    providers = {
        "official loop": updated(nets[0], nets[0].clip_loop),
        "foreach": updated(nets[1], nets[1].clip_foreach),
        OURS: updated(nets[2], lambda: fk.clip_grad_per_tensor_(nets[2].params, 3.0)),
    }
    case = Case(
        "clip_grad_per_tensor_", dict(parameters=nets[0].count, dtype=torch.float32), providers, in_place=True
    )
    truth = Network(setting, k, small)
    norms = [p.grad.norm(dtype=torch.float64) for p in truth.params if p.grad is not None]
    factors = [(3.0 / (norm + 1e-6)).clamp(max=1.0).float() for norm in norms]

    def oracle() -> list[Tensor]:
        for p, factor in zip(truth.params, factors, strict=True):
            assert p.grad is not None
            p.grad.mul_(factor)
        return truth.results(grads=True)

    case.oracle = oracle
    case.settle = lambda: settle(nets)
    case.bytes = 4 * nets[0].count  # norms; nothing is large enough to be written
    return case
