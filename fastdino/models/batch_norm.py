"""Batch normalisation over the batches of all processes, on GPUs by PyTorch's kernels and on CPUs by ours.

With x^ = (x - mean) / std over the n values that all processes hold of a channel, y = g x^ + b and G the
gradient of y, the backward pass is dx = g / std (G - sum(G) / n - x^ sum(G x^) / n), both sums over all
processes; dg = sum(G x^) and db = sum(G) stay those of a process, as the gradients of any parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm``, which knows GPUs alone, for CPUs too."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape, normalised over the batches of all processes in training mode."""
        several = dist.is_initialized() and dist.get_world_size(self.process_group) > 1
        if input.device.type != "cpu" or not self.training or not several:
            return super().forward(input)
        assert self.momentum is not None and self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        group = self.process_group
        mean, var, n = _statistics(input.detach(), group)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (n / (n - 1))).to(self.running_var.dtype), self.momentum)
        return _Normalise.apply(input, self.weight, self.bias, mean, var, n, self.eps, group)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """``module`` with every batch norm replaced by a :class:`SyncBatchNorm` of the same tensors, in place
    where it is not one itself.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        new = SyncBatchNorm(module.num_features, module.eps, module.momentum, device="meta")
        new._parameters, new._buffers, new.training = module._parameters, module._buffers, module.training
        return new
    for name, child in module.named_children():
        module.add_module(name, synchronise_batch_norm(child))
    return module


def _statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance per channel, [C] each in fp32 or wider, and the number of values of each.

    Raises ValueError for a single one.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, _all_but_channels(x), correction=0)
    n = x.numel() // x.shape[1]
    mine = torch.cat([mean, var, mean.new_tensor([n])]).double()
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group)
    # Around each process's own mean: sums of squares over all would cancel.
    means, variances, counts = torch.stack(every).split([len(mean), len(mean), 1], dim=1)
    total = int(counts.sum())
    if total < 2:
        raise ValueError(f"batch norm needs more than one value per channel, got {tuple(x.shape)}")
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean).square()) * counts).sum(0) / total
    return mean.to(wide.dtype), var.to(wide.dtype), total


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        mean: Tensor,
        var: Tensor,
        n: int,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, gain, mean, var)
        ctx.n, ctx.eps, ctx.group = n, eps, group
        return F.batch_norm(x, mean, var, gain, shift, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, mean, var = ctx.saved_tensors
        per_channel = (-1, *[1] * (x.ndim - 2))
        scale = torch.rsqrt(var + ctx.eps).view(per_channel)
        normal = (x.to(mean.dtype) - mean.view(per_channel)) * scale
        wide = grad.to(mean.dtype)
        dims = _all_but_channels(x)
        shift_grad, gain_grad = wide.sum(dims), (wide * normal).sum(dims)
        sums = torch.stack([shift_grad, gain_grad])  # [2, C]
        dist.all_reduce(sums, group=ctx.group)
        first, second = (v.view(per_channel) for v in sums / ctx.n)
        dx = (wide - first - normal * second) * (scale * gain.view(per_channel))
        return dx.to(x.dtype), gain_grad.to(gain.dtype), shift_grad.to(gain.dtype), *[None] * 5
