"""MoCo's contrastive loss against a queue of negatives whose similarities are never stored.

Queries q_r and their keys k_r [R, D], negatives n_j in the columns of the queue [D, Q], temperature T:

    L_r  = log sum_j exp(q_r . n_j / T),   O_r = sum_j softmax_j(q_r . n_j / T) n_j
    d_r  = L_r - q_r . k_r / T,            loss = mean_r log(1 + e^d_r)
    dq_r = sigmoid(d_r) (O_r - k_r) / (R T)

which is cross-entropy with the key as class 0: sigmoid(d) = 1 - p_key, and nothing is subtracted from
something of nearly its own size. L and O (attention over the queue) come from one pass over it, so the
backward only multiplies.

`chunked`, for CPUs, V100 and fp32 on GPUs: the queue is taken in blocks of columns; a GEMM makes a block's
similarities, one pass (csrc/info_nce.cpp, or a Triton kernel) turns them into weights relative to the running
maximum, a second GEMM adds to O. `flash`, in Triton, for fp16 and bf16 on the tensor cores of A100 and later:
the block stays in registers. GEMMs run in autocast's dtype or the query's; statistics, O and q . k are fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .backend import gemm_dtype, resolve
from .dino_loss import KERNEL_DTYPES, temperature
from .native import call, int64, pointer, zeros
from .operators import operator
from .reference import InfoNCE
from .validate import check_no_grad, check_temperature, check_tensor

CHUNK_BYTES = 8 << 20  # of similarities and of converted columns of the queue
BLOCK = 512  # chunks are multiples of it
HALF_CHUNK = 16384  # columns at most in fp16: their weighted sum must not overflow
SMALLEST = -3.0e38  # a maximum before there is any number


def chunked(
    query: Tensor,
    queue: Tensor,
    mean: Tensor,
    fold: Callable[[Tensor], None],
) -> None:
    """Pass the similarities to ``fold`` in blocks [R, C]; add weights times columns to ``mean``.

    Args: query [R, D] in the GEMMs' dtype; queue [D, Q]; mean fp32 [R, D], or [R, 0] where it is not needed;
        ``fold`` replaces a block by its weights and brings ``mean`` to their scale.
    """
    rows, q = len(query), queue.shape[1]
    dtype = query.dtype
    width = rows + (len(queue) if queue.dtype != dtype else 0)
    size = min(max(1, CHUNK_BYTES // (width * dtype.itemsize * BLOCK)) * BLOCK, q)
    size = min(size, HALF_CHUNK) if dtype == torch.float16 else size
    buffer = torch.empty(rows * size, dtype=dtype, device=query.device)
    for begin in range(0, q, size):
        columns = queue[:, begin : begin + size].to(dtype)  # [D, C]
        block = buffer[: rows * columns.shape[1]].view(rows, -1)
        torch.mm(query, columns, out=block)
        fold(block)
        if mean.shape[1] and dtype == torch.float32:
            mean.addmm_(block, columns.t())
        elif mean.shape[1]:
            mean += torch.mm(block, columns.t())


@operator("fastdino::info_nce_fwd")
def _forward(
    query: Tensor, key: Tensor, queue: Tensor, temp: Tensor, dtype: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss [], accuracy [], gradient of the loss [R, D] fp32 ([R, 0] where not needed)."""
    rows, d, t = len(query), query.shape[1] if needs_grad else 0, temp.item()
    largest = torch.full((rows,), SMALLEST, dtype=torch.float32, device="cpu")
    total = zeros(rows, dtype=torch.float64)
    mean = zeros(rows, d)

    def fold(block: Tensor) -> None:
        call(
            "fdk_info_nce_fold",
            pointer(block),
            *int64(*block.shape),
            *(ctypes.c_int(block.dtype == torch.bfloat16), ctypes.c_double(t), ctypes.c_int(needs_grad)),
            *map(pointer, (largest, total, mean)),
            *int64(d),
        )

    chunked(query.to(dtype), queue, mean, fold)
    query, key = query.float(), key.float()
    similarity = (query * key).sum(1)
    difference = (largest.double() - similarity) / t + total.log()  # [R]
    difference = difference.masked_fill(similarity == torch.inf, torch.nan)  # no perfect match: an overflow
    loss = torch.logaddexp(difference, torch.zeros_like(difference)).mean().float()
    if needs_grad:
        share = (difference.sigmoid() / (rows * t)).float()[:, None]
        total = total.masked_fill(total == 0, 1.0)  # all negatives at -inf: they have no share
        mean = share * (mean / total.float()[:, None] - key)
    return loss, ((similarity > largest) & ~total.isnan()).float().mean(), mean


def fake_forward(
    query: Tensor, key: Tensor, queue: Tensor, temp: Tensor, dtype: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = query.new_empty((), dtype=torch.float32)
    grad = query.new_empty(query.shape[0], query.shape[1] if needs_grad else 0, dtype=torch.float32)
    return loss, torch.empty_like(loss), grad


def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def autograd(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    grad = None if grad_loss is None else (grad_loss.float() * ctx.saved_tensors[0]).to(ctx.dtype)
    return grad, None, None, None, None, None


torch.library.register_fake(_forward, fake_forward)
torch.library.register_autograd(_forward, autograd, setup_context=setup_context)


def _gemm_dtype(query: Tensor) -> torch.dtype:
    dtype = gemm_dtype(query)
    return torch.float32 if query.device.type == "cpu" and dtype not in KERNEL_DTYPES else dtype


def info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temp: float | Tensor) -> InfoNCE:
    """Cross-entropy of each query with its key against the queue (He et al. 2020, eq. 1; MoCo-v2).

    ``mean_r -log(e^(q_r.k_r / temp) / (e^(q_r.k_r / temp) + sum_j e^(q_r.n_j / temp)))``

    Args:
        query: [R, D], normalised by the caller; fp32, bf16, fp16 or float64.
        key: [R, D], the positives; must not require grad.
        queue: [D, Q], one negative per column, as MoCo's ``queue`` buffer holds them, before this step's keys
            enter; must not require grad. Fastest in the dtype of the GEMMs, else it is converted each time.
        temp: number > 0, or 0-dim tensor.

    Returns:
        InfoNCE of fp32 tensors (float64 for float64 inputs); ``loss`` is differentiable in ``query``.
        ``accuracy`` is the fraction of queries strictly more similar to their key than to every negative.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_tensor("query", query, ("R", "D"))
    rows, d = query.shape
    check_tensor("key", key, (rows, d), like=query)
    check_tensor("queue", queue, (d, "Q"), like=query)
    for name, x in (("query", query), ("queue", queue)):
        if x.numel() == 0:
            raise ValueError(f"{name}: expected no empty dimension, got {list(x.shape)}")
    check_no_grad("key", key)
    check_no_grad("queue", queue)
    check_temperature("temp", temp)
    kind = resolve(query, key, queue)
    if kind == "reference":
        return reference.info_nce(query, key, queue, temp=temp)
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    tensors = (query.contiguous(), key.contiguous(), queue.contiguous())
    if kind == "triton":
        from .gpu import info_nce as gpu

        loss, accuracy = gpu.info_nce(*tensors, temp, _gemm_dtype(query), needs_grad)
    else:
        loss, accuracy, _ = _forward(*tensors, temperature(temp), _gemm_dtype(query), needs_grad)
    return InfoNCE(loss, accuracy)
