"""Linear layers for training: what precedes them is recomputed in the backward pass, and their 16-bit weights
may be kept instead of cast.

    norm_linear:  o = LN(x) W^T + b   keeps x            gelu_linear:  o = GELU(h) W^T + b   keeps h

Autograd alone would also keep LN(x), its statistics and GELU(h). With ``G`` the gradient of ``o`` and ``y``
the recomputed input of the product: dW = G^T y, db = G^T 1, dy = G W, then the gradient of the norm or of
GELU. Under autocast products run in its type and norms in that of their weights, as in the plain modules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

Gradients = tuple[Tensor | None, ...]


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies with ``low_precision`` where autocast asks for exactly its type.

    ``low_precision`` [out, in] is a 16-bit copy of ``weight`` or None; whoever changes ``weight`` renews it.
    Gradients go to ``weight`` alone.
    """

    low_precision: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("low_precision", None, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.low_precision)


def attach_low_precision(model: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, Tensor]:
    """Give every weight that can use one a copy in ``dtype``; weight -> copy, for the optimizer to renew.

    Called again, as after weights were loaded, it refills the copies it made.
    """
    copies: dict[nn.Parameter, Tensor] = {}
    for module in model.modules():
        if "low_precision" not in module._buffers:
            continue
        weight, copy = module.weight, module.low_precision
        assert isinstance(weight, nn.Parameter)
        if isinstance(copy, Tensor) and copy.dtype == dtype and copy.device == weight.device:
            copies[weight] = copy.copy_(weight.detach())
        else:
            module.low_precision = copies[weight] = weight.detach().to(dtype, copy=True)
    return copies


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None = None) -> Tensor:
    """``x`` [..., in] times ``weight`` [out, in]^T, plus ``bias`` -> [..., out].

    ``low``, a copy of the weight, takes part if it is of the type that autocast asks for.
    """
    dtype = compute_dtype(x)
    if low is None or low.dtype != dtype or low.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, low, dtype)


def norm_linear(x: Tensor, norm: nn.LayerNorm, layer: Linear, part: slice | None = None) -> Tensor:
    """``layer(norm(x))``, [T, in] -> [T, out], that keeps ``x`` alone; ``part`` selects among the outputs.

    Without gradients it is just that, so that hooks of both modules see their features.
    """
    if part is None and not torch.is_grad_enabled():
        return layer(norm(x))
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    low = layer.low_precision
    if part is not None:
        weight = weight[part]
        bias, low = (None if x is None else x[part] for x in (bias, low))
    return _NormLinear.apply(x, norm.weight, norm.bias, weight, bias, low, norm.eps, compute_dtype(x))


def gelu_linear(h: Tensor, layer: Linear) -> Tensor:
    """``layer(gelu(h))``, [T, in] -> [T, out], that keeps ``h`` alone."""
    if not torch.is_grad_enabled():
        return layer(F.gelu(h))
    return _GeluLinear.apply(h, layer.weight, layer.bias, layer.low_precision, compute_dtype(h))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which a linear layer multiplies ``x``: autocast's where that is on, but never for fp64."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
        y = x.to(dtype)
        ctx.save_for_backward(y, weight, bias, low)
        ctx.dtype = x.dtype
        return _product(y, weight, bias, low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        y, weight, bias, low = ctx.saved_tensors
        dw, db = _parameter_gradients(ctx, 1, grad, y, weight, bias)
        dx = (grad @ _cast(weight, low, y.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return dx, dw, db, None, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        low: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, gain, shift, weight, bias, low)
        ctx.eps, ctx.dtype = eps, dtype
        y = F.layer_norm(_wide(x, gain), x.shape[-1:], gain, shift, eps).to(dtype)
        return _product(y, weight, bias, low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, gain, shift, weight, bias, low = ctx.saved_tensors
        wide, shape, needs = _wide(x, gain), x.shape[-1:], ctx.needs_input_grad[:3]
        y, mean, rstd = torch.native_layer_norm(wide, shape, gain, shift, ctx.eps)
        dw, db = _parameter_gradients(ctx, 3, grad, y.to(ctx.dtype), weight, bias)
        del y
        dx = dgain = dshift = None
        if any(needs):
            dy = (grad @ _cast(weight, low, ctx.dtype)).to(wide.dtype)
            dx, dgain, dshift = torch.ops.aten.native_layer_norm_backward(
                dy, wide, shape, mean, rstd, gain, shift, needs
            )
        return None if dx is None else dx.to(x.dtype), dgain, dshift, dw, db, None, None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, low: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(h, weight, bias, low)
        ctx.dtype = dtype
        return _product(F.gelu(h).to(dtype), weight, bias, low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        h, weight, bias, low = ctx.saved_tensors
        dw, db = _parameter_gradients(ctx, 1, grad, F.gelu(h).to(ctx.dtype), weight, bias)
        dh = None
        if ctx.needs_input_grad[0]:
            dy = (grad @ _cast(weight, low, ctx.dtype)).to(h.dtype)
            dh = torch.ops.aten.gelu_backward(dy, h)
        return dh, dw, db, None, None


def _wide(x: Tensor, gain: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, gain.dtype))


def _product(y: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None) -> Tensor:
    w, b = _cast(weight, low, y.dtype), None if bias is None else bias.to(y.dtype)
    if _by_onednn(y) and not torch.compiler.is_compiling():  # Inductor lowers it for packed weights only
        # Adds the bias as it writes the product, while F.linear writes the bias first and reads it again.
        return torch.ops.mkldnn._linear_pointwise(y, w, b, "none", [], "")
    return F.linear(y, w, b)


def _cast(weight: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
    return low if low is not None and low.dtype == dtype else weight.to(dtype)


def _parameter_gradients(
    ctx: Any, first: int, grad: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, the inputs number ``first`` and the next, in their types; None if not needed."""
    rows = grad.reshape(-1, grad.shape[-1])  # [T, out]
    need_weight, need_bias = ctx.needs_input_grad[first : first + 2]
    dw = (rows.t() @ y.reshape(-1, y.shape[-1])).to(weight.dtype) if need_weight else None
    return dw, _column_sums(rows, bias.dtype) if bias is not None and need_bias else None


def _column_sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if _by_onednn(rows):  # also accumulates in fp32, and faster than a sum
        return (rows.new_ones(1, len(rows)) @ rows)[0].to(dtype)
    # On the CPU a sum of another type than its input's first makes a copy of the whole input.
    return rows.sum(0).to(dtype) if rows.device.type == "cpu" else rows.sum(0, dtype=dtype)


def _by_onednn(x: Tensor) -> bool:
    return ONEDNN and x.dtype == torch.bfloat16 and x.device.type == "cpu"
