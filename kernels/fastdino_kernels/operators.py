"""Functions as operators of PyTorch: opaque to torch.compile, with autograd and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A copy of this package under another name (hub.py) has operators of its own, so both fit into one process.
_PACKAGE = __name__.rpartition(".")[0]
NAMESPACE = "fastdino" if _PACKAGE == "fastdino_kernels" else _PACKAGE


def operator(name: str, device: str = "cpu") -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes a function the form for ``device`` of the operator ``namespace::name``.

    Returns the operator. ``device="default"`` is for functions that launch Triton kernels: they run on CUDA
    tensors and, under Triton's interpreter, on those of the CPU.

    The function neither writes to its arguments nor returns one of them. ``torch.library.custom_op`` does the
    same, but imports all of torch.compile at the first call, which takes longer than the rest of the start.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        namespace, _, short = name.partition("::")
        namespace = NAMESPACE if namespace == "fastdino" else namespace
        torch.library.define(f"{namespace}::{short}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"{namespace}::{short}", device, function)
        return getattr(getattr(torch.ops, namespace), short).default

    return register


def register_gradient(forward: Any, backward: Any, *, leaves: int, kept: int, passed: int) -> None:
    """Let the operator ``backward`` differentiate the first result of ``forward`` in its first arguments.

    ``forward`` takes its tensors first, then constants, and returns from number ``kept`` on what the backward
    needs. ``backward`` takes the incoming gradient (fp32, contiguous), forward's tensors, what was kept, the
    first ``passed`` constants, and for several ``leaves`` whether each needs its gradient; it returns those.
    The other results of ``forward`` carry no gradient.
    """

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.constants = [x for x in inputs if not isinstance(x, Tensor)][:passed]
        ctx.arguments = len(inputs)
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output[kept:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def autograd(ctx: Any, grad: Any, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * ctx.arguments
        needs = ctx.needs_input_grad[:leaves]
        tensors = grad.float().contiguous(), *ctx.saved_tensors
        found = backward(*tensors, *ctx.constants, *(needs if leaves > 1 else ()))
        found = found if leaves > 1 else (found,)
        grads = (x if need else None for x, need in zip(found, needs, strict=True))
        return *grads, *(None,) * (ctx.arguments - leaves)

    torch.library.register_autograd(forward, autograd, setup_context=setup_context)
