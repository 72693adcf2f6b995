"""Elementwise pieces of Falcon-H1 that carry a µP multiplier, each one read and one write, forward and backward.

A multiplier stays a Python float throughout: rounding it to bf16 first would change every value by up to 2^-8. On GPU
the Triton kernels of `elementwise_kernels` compute the same in one pass; what is here is their oracle.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F


class _ScaleSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, sizes: Sequence[int], scales: Sequence[float]) -> torch.Tensor:
        ctx.sizes, ctx.scales = sizes, scales
        return _scaled(x, sizes, scales)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _scaled(grad, ctx.sizes, ctx.scales), None, None


def _scaled(x: torch.Tensor, sizes: Sequence[int], scales: Sequence[float]) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for source, target, scale in zip(x.split(sizes, -1), out.split(sizes, -1), scales, strict=True):
        torch.mul(source, scale, out=target)
    return out


def scale_segments(x: torch.Tensor, sizes: Sequence[int], scales: Sequence[float]) -> torch.Tensor:
    """Multiply each segment of the last dimension by its own scale.

    Args:
        x: `[..., sum(sizes)]`, any floating dtype.
        sizes: Widths of the segments.
        scales: One factor a segment.

    Returns:
        A new contiguous tensor of x's shape and dtype; x itself where every scale is 1.
    """
    if sum(sizes) != x.shape[-1] or len(sizes) != len(scales):
        raise ValueError(f"segments of {list(sizes)} with {len(scales)} scales do not make up {x.shape[-1]} columns")
    if all(scale == 1.0 for scale in scales):
        return x
    return _ScaleSegments.apply(x, tuple(sizes), tuple(scales))


def _has_kernels(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0


class _ScaledSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, gate_scale: float, out_scale: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.gate_scale, ctx.out_scale = gate_scale, out_scale
        return _swiglu(x, gate_scale, out_scale)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (x,) = ctx.saved_tensors
        return _swiglu_backward(grad, x, ctx.gate_scale, ctx.out_scale), None, None


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _swiglu(x: torch.Tensor, gate_scale: float, out_scale: float) -> torch.Tensor:
    if _has_kernels(x):
        from falcon_bridge.ops.elementwise_kernels import swiglu

        return swiglu(x, gate_scale, out_scale)
    gate, up = x.to(_compute_dtype(x)).chunk(2, -1)
    return (F.silu(gate * gate_scale) * up * out_scale).to(x.dtype)


def _swiglu_backward(grad: torch.Tensor, x: torch.Tensor, gate_scale: float, out_scale: float) -> torch.Tensor:
    if _has_kernels(x):
        from falcon_bridge.ops.elementwise_kernels import swiglu_backward

        return swiglu_backward(grad, x, gate_scale, out_scale)
    gate, up = x.to(_compute_dtype(x)).chunk(2, -1)
    gate = gate * gate_scale
    grad = grad.to(gate.dtype) * out_scale
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid)) * gate_scale
    return torch.cat([grad_gate, grad * silu], -1).to(x.dtype)


def scaled_swiglu(x: torch.Tensor, gate_scale: float = 1.0, out_scale: float = 1.0) -> torch.Tensor:
    """`silu(gate·gate_scale)·up·out_scale` for x holding gate and up side by side; saves only x for the backward.

    Args:
        x: `[..., 2·f]`: gate, then up. Computed in fp32 (fp64 for fp64 input).
        gate_scale: Multiplier inside the SiLU.
        out_scale: Multiplier of the result; a linear layer's output multiplier can ride here, since it commutes.

    Returns:
        `[..., f]` in x's dtype.
    """
    return _ScaledSwiGLU.apply(x, gate_scale, out_scale)


def recompute_scaled_swiglu(y: torch.Tensor, x: torch.Tensor, gate_scale: float = 1.0, out_scale: float = 1.0) -> None:
    """Write `scaled_swiglu` of x into a contiguous y `[..., f]`, outside autograd."""
    if _has_kernels(x):
        from falcon_bridge.ops.elementwise_kernels import swiglu

        swiglu(x, gate_scale, out_scale, y)
    else:
        y.copy_(_swiglu(x, gate_scale, out_scale))


class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual: torch.Tensor, *terms: torch.Tensor) -> torch.Tensor:
        ctx.dtypes = [term.dtype for term in terms]
        if len(terms) == 2 and _has_kernels(residual):
            from falcon_bridge.ops.elementwise_kernels import residual_sum

            return residual_sum(residual, *terms)
        wide = _compute_dtype(residual)
        return sum((term.to(wide) for term in terms), residual.to(wide)).to(residual.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        casts = {dtype: grad.to(dtype) for dtype in set(ctx.dtypes)}
        return grad, *[casts[dtype] for dtype in ctx.dtypes]


def residual_sum(residual: torch.Tensor, *terms: torch.Tensor) -> torch.Tensor:
    """`residual + term + …`, added in fp32 and rounded once, to the residual's dtype.

    Args:
        residual: `[..., h]`; fp32 with `fp32_residual_connection`.
        *terms: One or two tensors of its shape.

    Returns:
        A new tensor of the residual's shape and dtype.
    """
    if len(terms) == 1 and terms[0].dtype == residual.dtype:
        return residual + terms[0]
    return _ResidualSum.apply(residual, *terms)


@cache
def column_factors(sizes: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The scale of each column of segments, fp32 `[sum(sizes)]`; made once, since copying it to a GPU waits for it."""
    repeated = torch.tensor(scales, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    return repeated.float().to(device)
