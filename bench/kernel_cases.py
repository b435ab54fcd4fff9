"""The losses that `bench.kernels` measures: the problem, the rivals and the least work of any implementation.

A rival computes the same results from the same tensors; libraries take part where they can be imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fastdino_kernels as fk
import torch
import torch.nn.functional as F
from fastdino_kernels import reference
from fastdino_kernels.centered_softmax import centered_softmax
from fastdino_kernels.info_nce import info_nce
from fastdino_kernels.patch_loss import patch_loss
from fastdino_kernels.region_loss import match_regions, region_loss
from fastdino_kernels.sinkhorn import sinkhorn_knopp
from fastdino_kernels.soft_cross_entropy import soft_cross_entropy
from torch import Tensor

S, U, D = 0.1, 0.04, 256  # temperatures of student and teacher, width of the bottleneck
OURS = "fastdino"
Call = Callable[[], Sequence[Tensor]]


@dataclass
class Case:
    """Providers by name, the first one being the baseline; each call returns its results for comparison."""

    op: str
    sizes: dict[str, Any]
    providers: dict[str, Call]
    oracle: Call | None = None  # results in fp32 arithmetic; without it the baseline's own
    bytes: int = 0  # least traffic of one call
    flops: int = 0  # least floating-point operations in matrix products
    logits: int = 0  # bytes of the logits, the unit for extra memory
    in_place: bool = False  # results are tensors that existed before the call
    leaves: tuple[Tensor, ...] = ()  # whose gradients the calls replace
    settle: Callable[[], None] = lambda: None  # called between the comparison and the timing
    absent: list[str] = field(default_factory=list)  # libraries that cannot be imported

    def add(self, name: str, library: str, make: Callable[[Any], Call]) -> None:
        """A provider from a library, if it is there."""
        try:
            self.providers[name] = make(importlib.import_module(library))
        except Exception as error:  # half-installed libraries raise anything
            self.absent.append(f"{name}: {type(error).__name__}")


@dataclass(frozen=True)
class Setting:
    device: torch.device
    compiles: bool  # whether torch.compile takes part

    def rival(self, dtype: torch.dtype, loss: Callable[[], Tensor], *leaves: Tensor) -> Call:
        """Forward and backward of other code, for half-precision inputs under autocast, as in training."""

        def autocast() -> Tensor:
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                return loss()

        return trained(autocast, *leaves)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(dtype)

    def unit(self, rows: int, dtype: torch.dtype) -> Tensor:
        return F.normalize(torch.randn(rows, D, device=self.device), dim=1).to(dtype)


def trained(loss: Callable[[], Tensor], *leaves: Tensor) -> Call:
    """Forward and backward of a loss: it and the gradients of the leaves."""

    def call() -> list[Tensor]:
        for x in leaves:
            x.grad = None
        value = loss()
        value.backward()
        return [value.detach(), *(x.grad for x in leaves if x.grad is not None)]

    return call


def double_loop(x: Tensor, t: Tensor, center: Tensor, views: int) -> Tensor:
    """The multi-crop loss as the official code organises it: a log-softmax for each of the 2V - 2 pairs; and
    the batch's center."""
    students = (x / S).chunk(views)
    targets = ((t - center) / U).softmax(-1).chunk(2)
    terms = [
        torch.sum(-p * F.log_softmax(y, dim=-1), dim=-1).mean()
        for g, p in enumerate(targets)
        for v, y in enumerate(students)
        if g != v
    ]
    t.sum(0)
    return torch.stack(terms).mean()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


# ------------------------------------------------------------------------------------------ losses on logits


def dino_loss_case(setting: Setting, dtype: torch.dtype, k: int, images: int, views: int) -> Case:
    x = setting.randn(views * images, k, dtype=dtype).requires_grad_()
    t, center = setting.randn(2 * images, k, dtype=dtype), setting.randn(k, scale=0.1)

    def fused(function: Callable[..., Any] = fk.dino_loss) -> Tensor:
        return function(x, t, center, student_temp=S, teacher_temp=U).loss

    providers: dict[str, Call] = {
        "official double loop": setting.rival(dtype, lambda: double_loop(x, t, center, views), x),
        "eager, targets added up": trained(lambda: fused(reference.dino_loss), x),
        OURS: trained(fused, x),
    }
    if setting.compiles:
        best = compiled(reference.dino_loss)
        providers["torch.compile"] = trained(lambda: fused(best), x)
    case = Case("dino_loss", dict(K=k, B=images, V=views, dtype=dtype), providers, leaves=(x,))
    case.oracle = trained(lambda: fused(reference.dino_loss), x)
    # read the logits of student and teacher, once for the loss, once for the gradient; write the gradient
    case.bytes = (3 * views + 4) * images * k * dtype.itemsize
    case.logits = (views + 2) * images * k * dtype.itemsize

    def lightly(library: Any) -> Call:
        loss = library.DINOLoss(output_dim=k).to(setting.device)
        loss.center.data = center.view(1, 1, k).clone()
        loss.update_center = lambda out: out.mean((0, 1))  # as the others: measured, but not applied
        return setting.rival(dtype, lambda: loss(list(t.chunk(2)), list(x.chunk(views)), teacher_temp=U), x)

    case.add("lightly", "lightly.loss", lightly)
    return case


def soft_cross_entropy_case(setting: Setting, dtype: torch.dtype, k: int, images: int) -> Case:
    x = setting.randn(images, k, dtype=dtype).requires_grad_()
    t = setting.randn(images, k, scale=4).softmax(-1)

    def eager(x: Tensor) -> Tensor:
        return torch.sum(-t * F.log_softmax(x / S, dim=-1), dim=-1).mean()

    providers: dict[str, Call] = {
        "eager": setting.rival(dtype, lambda: eager(x), x),
        OURS: trained(lambda: soft_cross_entropy(x, t, temp=S).mean(), x),
    }
    if setting.compiles:
        best = compiled(eager)
        providers["torch.compile"] = setting.rival(dtype, lambda: best(x), x)
    case = Case("soft_cross_entropy", dict(K=k, B=images, dtype=dtype), providers, leaves=(x,))
    case.oracle = trained(lambda: reference.soft_cross_entropy(x, t, temp=S).mean(), x)
    case.bytes = images * k * (3 * dtype.itemsize + 8)  # logits twice, gradient, fp32 target twice
    if setting.device.type == "cuda":
        entropy = -(t * t.log()).nansum(-1).mean()

        def liger(library: Any) -> Call:
            divergence = library.LigerKLDIVLoss(reduction="batchmean")
            return trained(lambda: divergence(F.log_softmax(x.float() / S, dim=-1), t) + entropy, x)

        case.add("Liger KLDIVLoss", "liger_kernel.transformers", liger)
    return case


def centered_softmax_case(setting: Setting, dtype: torch.dtype, k: int, images: int) -> Case:
    t, center = setting.randn(2 * images, k, dtype=dtype), setting.randn(k, scale=0.1)

    def eager(t: Tensor) -> Tensor:
        return F.softmax((t - center) / U, dim=-1)

    providers: dict[str, Call] = {
        "eager": lambda: [eager(t)],
        OURS: lambda: [centered_softmax(t, center, temp=U)],
    }
    if setting.compiles:
        best = compiled(eager)
        providers["torch.compile"] = lambda: [best(t)]
    case = Case("centered_softmax", dict(K=k, B=images, dtype=dtype), providers)
    case.oracle = lambda: [F.softmax((t.float() - center) / U, dim=-1)]
    case.bytes = 2 * images * k * (dtype.itemsize + 4)
    return case


def sinkhorn_knopp_case(setting: Setting, dtype: torch.dtype, k: int, images: int) -> Case:
    # iterations of exp(x / 0.05) in fp32: the official form, whose exponentials must not overflow
    x = (setting.unit(2 * images, torch.float32) @ setting.unit(k, torch.float32).T).to(dtype)

    def official(x: Tensor) -> Tensor:
        q = torch.exp(x.float() / 0.05).t()  # [K, R]
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True)
            q /= k
            q /= q.sum(0, keepdim=True)
            q /= 2 * images
        q *= 2 * images
        return q.t()

    providers: dict[str, Call] = {
        "official": lambda: [official(x)],
        OURS: lambda: [sinkhorn_knopp(x, temp=0.05)],
    }
    if setting.compiles:
        best = compiled(official)
        providers["torch.compile"] = lambda: [best(x)]
    case = Case("sinkhorn_knopp", dict(K=k, B=images, dtype=dtype), providers)
    case.oracle = lambda: [reference.sinkhorn_knopp(x, temp=0.05)]
    # each iteration needs the sums of the one before: three reads, one more to write the targets
    case.bytes = 2 * images * k * (4 * dtype.itemsize + 4)
    return case


# ---------------------------------------------------------------------------------- with the prototype layer


def prototype_loss_case(setting: Setting, dtype: torch.dtype, k: int, images: int, views: int) -> Case:
    rows, teacher_rows = views * images, 2 * images
    z, y = setting.unit(rows, dtype).requires_grad_(), setting.unit(teacher_rows, dtype)
    w, v = setting.unit(k, dtype).requires_grad_(), setting.unit(k, dtype)
    center = setting.randn(k, scale=0.01)

    def fused(function: Callable[..., Any] = fk.prototype_loss) -> Tensor:
        return function(z, w, y, v, center, student_temp=S, teacher_temp=U).loss

    def two_steps() -> Tensor:
        x, t = F.linear(z, w), F.linear(y, v)
        return fk.dino_loss(x, t, center, student_temp=S, teacher_temp=U).loss

    providers: dict[str, Call] = {
        "eager": setting.rival(
            dtype, lambda: double_loop(F.linear(z, w), F.linear(y, v), center, views), z, w
        ),
        "GEMM + dino_loss": trained(two_steps, z, w),
        OURS: trained(fused, z, w),
    }
    if setting.compiles:
        best = compiled(reference.prototype_loss)
        providers["torch.compile"] = trained(lambda: fused(best), z, w)
    case = Case("prototype_loss", dict(K=k, B=images, V=views, D=D, dtype=dtype), providers, leaves=(z, w))
    if setting.device.type == "cuda":
        for form in ("flash", "chunked"):
            providers[f"{OURS}, {form}"] = _in_form(form, trained(fused, z, w))
    case.oracle = _oracle(reference.prototype_loss, z, w, y, v, center)
    _prototype_work(case, rows, teacher_rows, k, dtype)
    return case


def _in_form(form: str, call: Call) -> Call:
    from fastdino_kernels.gpu import prototype_loss as gpu

    def chosen() -> Sequence[Tensor]:
        before, gpu.FORM = gpu.FORM, form
        try:
            return call()
        finally:
            gpu.FORM = before

    return chosen


def patch_loss_case(setting: Setting, dtype: torch.dtype, k: int, patches: int) -> Case:
    z, y = setting.unit(patches, dtype).requires_grad_(), setting.unit(patches, dtype)
    w, v = setting.unit(k, dtype).requires_grad_(), setting.unit(k, dtype)
    center = torch.zeros(k, device=setting.device)

    def eager() -> Tensor:
        target = F.softmax(F.linear(y, v) / U, dim=-1)
        return torch.sum(-target * F.log_softmax(F.linear(z, w) / S, dim=-1), dim=-1).mean()

    def fused() -> Tensor:
        return patch_loss(z, w, y, v, center, student_temp=S, teacher_temp=U).loss

    providers: dict[str, Call] = {"eager": setting.rival(dtype, eager, z, w), OURS: trained(fused, z, w)}
    if setting.compiles:
        providers["torch.compile"] = setting.rival(dtype, compiled(eager), z, w)
    case = Case("patch_loss", dict(K=k, patches=patches, D=D, dtype=dtype), providers, leaves=(z, w))
    if setting.device.type == "cuda":
        t = F.log_softmax(F.linear(y, v).float() / U, dim=-1)
        entropy = -(t.exp() * t).sum(-1).mean()
        del t

        def liger(library: Any) -> Call:  # KL; the teacher's temperature goes into its features
            divergence = library.LigerFusedLinearJSD(jsd_beta=0.0, temperature=S)
            return trained(lambda: divergence(z, w, y * (S / U), v, None) + entropy, z, w)

        case.add("Liger FusedLinearJSD", "liger_kernel.transformers", liger)
    identity = torch.arange(patches, device=setting.device)[:, None]
    case.oracle = _oracle(reference.matched_loss, z, w, y, v, center, identity)
    _prototype_work(case, patches, patches, k, dtype)
    return case


def region_loss_case(
    setting: Setting, dtype: torch.dtype, k: int, images: int, regions: Sequence[int]
) -> Case:
    """EsViT: each region of a view meets one region of each other teacher view."""
    rows, teacher_rows = images * sum(regions), images * sum(regions[:2])
    z, y = setting.unit(rows, dtype).requires_grad_(), setting.unit(teacher_rows, dtype)
    w, v = setting.unit(k, dtype).requires_grad_(), setting.unit(k, dtype)
    center = setting.randn(k, scale=0.01)
    match = match_regions(setting.unit(rows, dtype), setting.unit(teacher_rows, dtype), regions)

    def official() -> Tensor:
        students = (F.linear(z, w) / S).split([images * n for n in regions])
        targets = F.softmax((F.linear(y, v) - center) / U, dim=-1)
        found = match.match.split([images * n for n in regions])
        terms = [
            torch.sum(-targets[rows[:, g]] * F.log_softmax(x, dim=-1), dim=-1).mean()
            for g in range(2)
            for i, (x, rows) in enumerate(zip(students, found, strict=True))
            if g != i
        ]
        return torch.stack(terms).mean()

    def fused() -> Tensor:
        return region_loss(z, w, y, v, center, match, student_temp=S, teacher_temp=U).loss

    providers: dict[str, Call] = {
        "official": setting.rival(dtype, official, z, w),
        OURS: trained(fused, z, w),
    }
    if setting.compiles:
        providers["torch.compile"] = setting.rival(dtype, compiled(official), z, w)
    sizes = dict(K=k, B=images, regions="+".join(map(str, regions)), D=D, dtype=dtype)
    case = Case("region_loss", sizes, providers, leaves=(z, w))
    function = partial(reference.matched_loss, row_weight=match.row_weight)
    case.oracle = _oracle(function, z, w, y, v, center, match.match)
    _prototype_work(case, rows, teacher_rows, k, dtype)
    return case


def _oracle(function: Callable[..., Any], z: Tensor, w: Tensor, *others: Tensor) -> Call:
    """In fp32, from the same numbers."""

    def call() -> list[Tensor]:
        leaves = [x.detach().float().requires_grad_() for x in (z, w)]
        wide = (x.float() if x.is_floating_point() else x for x in others)
        loss = function(*leaves, *wide, student_temp=S, teacher_temp=U).loss
        return trained(lambda: loss, *leaves)()

    return call


def _prototype_work(case: Case, rows: int, teacher_rows: int, k: int, dtype: torch.dtype) -> None:
    # logits of both, dz and dW; weights of both read twice, dW written
    case.flops = (6 * rows + 2 * teacher_rows) * k * D
    case.bytes = 5 * k * D * dtype.itemsize
    case.logits = (rows + teacher_rows) * k * dtype.itemsize


def info_nce_case(setting: Setting, dtype: torch.dtype, k: int, images: int) -> Case:
    q, key = (F.normalize(setting.randn(images, 128), dim=1).to(dtype) for _ in range(2))
    queue = F.normalize(setting.randn(128, k), dim=0).to(dtype)
    q.requires_grad_()

    def official() -> Tensor:
        logits = torch.cat([(q * key).sum(1, keepdim=True), q @ queue], dim=1) / 0.2
        return F.cross_entropy(logits, torch.zeros(images, dtype=torch.long, device=setting.device))

    def fused() -> Tensor:
        return info_nce(q, key, queue, temp=0.2).loss

    providers: dict[str, Call] = {"official": setting.rival(dtype, official, q), OURS: trained(fused, q)}
    if setting.compiles:
        providers["torch.compile"] = setting.rival(dtype, compiled(official), q)
    case = Case("info_nce", dict(queue=k, B=images, D=128, dtype=dtype), providers, leaves=(q,))
    case.oracle = trained(lambda: reference.info_nce(q, key, queue, temp=0.2).loss, q)
    case.flops, case.bytes = 4 * images * k * 128, 2 * k * 128 * dtype.itemsize
    case.logits = images * k * dtype.itemsize
    return case


def normalize_weight_case(setting: Setting, dtype: torch.dtype, k: int) -> Case:
    v, g = setting.randn(k, D).requires_grad_(), torch.ones(k, 1, device=setting.device, requires_grad=True)
    upstream = setting.randn(k, D)

    def both(function: Callable[..., Tensor]) -> Call:
        def call() -> list[Tensor]:
            v.grad = g.grad = None
            out = function(v, g)
            out.backward(upstream)
            return [out.detach(), *(x.grad for x in (v, g) if x.grad is not None)]

        return call

    providers = {"eager": both(reference.normalize_weight), OURS: both(fk.normalize_weight)}
    if setting.compiles:
        providers["torch.compile"] = both(compiled(reference.normalize_weight))
    case = Case("normalize_weight", dict(K=k, D=D, dtype=torch.float32), providers, leaves=(v, g))
    case.bytes = 5 * k * D * 4  # v twice, the result, its gradient, dv
    return case
