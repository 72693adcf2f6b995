"""Elementwise pieces of Falcon-H1 that carry a µP multiplier, each one read and one write, forward and backward.

A multiplier stays a Python float throughout: rounding it to bf16 first would change every value by up to 2^-8. On GPU
the Triton kernels of `elementwise_kernels` compute the same in one pass; what is here is their oracle.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


class _ScaleSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: torch.Tensor, sizes: Sequence[int], scales: Sequence[float], batch_first: bool
    ) -> torch.Tensor:
        ctx.sizes, ctx.scales = sizes, scales
        return _scaled(x, sizes, scales, batch_first)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _scaled(grad, ctx.sizes, ctx.scales), None, None, None


def _scaled(x: torch.Tensor, sizes: Sequence[int], scales: Sequence[float], batch_first: bool = False) -> torch.Tensor:
    if x.dim() == 3 and _has_kernels(x):
        from falcon_bridge.ops.elementwise_kernels import scale_columns

        return scale_columns(x, sizes, scales, batch_first)
    shape = (x.shape[1], x.shape[0], *x.shape[2:]) if batch_first else x.shape
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    out = out.transpose(0, 1) if batch_first else out
    for source, target, scale in zip(x.split(sizes, -1), out.split(sizes, -1), scales, strict=True):
        torch.mul(source, scale, out=target)
    return out


def scale_segments(
    x: torch.Tensor, sizes: Sequence[int], scales: Sequence[float], *, batch_first: bool = False
) -> torch.Tensor:
    """Multiply each segment of the last dimension by its own scale.

    Args:
        x: `[..., sum(sizes)]`, any floating dtype.
        sizes: Widths of the segments.
        scales: One factor a segment.
        batch_first: Lay the result of an x `[s, b, d]` out as a contiguous `[b, s, d]`, for what reads it so next.

    Returns:
        A new tensor of x's shape and dtype, contiguous or with `batch_first` a transposed view; x itself where every
        scale is 1 and the layout is right.
    """
    if sum(sizes) != x.shape[-1] or len(sizes) != len(scales):
        raise ValueError(f"segments of {list(sizes)} with {len(scales)} scales do not make up {x.shape[-1]} columns")
    if all(scale == 1.0 for scale in scales) and not (batch_first and not x.transpose(0, 1).is_contiguous()):
        return x
    return _ScaleSegments.apply(x, tuple(sizes), tuple(scales), batch_first)


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
