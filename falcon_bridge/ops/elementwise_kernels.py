"""Triton kernels of `elementwise`: each piece is one read and one write, computed in fp32."""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl


_BLOCK = 1024


@triton.jit
def _scale_columns_kernel(x_ptr, scales_ptr, out_ptr, D, B, x_s, x_b, out_s, out_b, BLOCK: tl.constexpr):
    """``out[s, b, d] = x[s, b, d] · scales[d]`` with any strides but 1 over d; a row (s, b) and a block a program."""
    row = tl.program_id(0).to(tl.int64)
    s, b = row // B, row % B
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    x = tl.load(x_ptr + s * x_s + b * x_b + columns, mask=mask).to(tl.float32)
    out = x * tl.load(scales_ptr + columns, mask=mask)
    tl.store(out_ptr + s * out_s + b * out_b + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_kernel(x_ptr, y_ptr, F, gate_scale, out_scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    gate = tl.load(x_ptr + row * 2 * F + columns, mask=mask).to(tl.float32) * gate_scale
    up = tl.load(x_ptr + row * 2 * F + F + columns, mask=mask).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up * out_scale
    tl.store(y_ptr + row * F + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(grad_ptr, x_ptr, grad_x_ptr, F, gate_scale, out_scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    gate = tl.load(x_ptr + row * 2 * F + columns, mask=mask).to(tl.float32) * gate_scale
    up = tl.load(x_ptr + row * 2 * F + F + columns, mask=mask).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + columns, mask=mask).to(tl.float32) * out_scale
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid)) * gate_scale
    dtype = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + row * 2 * F + columns, grad_gate.to(dtype), mask=mask)
    tl.store(grad_x_ptr + row * 2 * F + F + columns, (grad * silu).to(dtype), mask=mask)


def scale_columns(x: torch.Tensor, sizes: Sequence[int], scales: Sequence[float], batch_first: bool) -> torch.Tensor:
    """Multiply segments of x `[s, b, d]` by their scales.

    Args:
        x: `[s, b, d]`, any strides.
        sizes: Widths of the segments, d in sum.
        scales: One factor a segment.
        batch_first: Lay the result out as a contiguous `[b, s, d]`.

    Returns:
        `[s, b, d]` in x's dtype: contiguous, or a transposed view with `batch_first`.
    """
    s, b, d = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    out = torch.empty((b, s, d) if batch_first else (s, b, d), dtype=x.dtype, device=x.device)
    out = out.transpose(0, 1) if batch_first else out
    factors = _factors(tuple(sizes), tuple(scales), x.device)
    _scale_columns_kernel[(s * b, triton.cdiv(d, _BLOCK))](
        x, factors, out, d, b, x.stride(0), x.stride(1), out.stride(0), out.stride(1), BLOCK=_BLOCK
    )
    return out


def swiglu(x: torch.Tensor, gate_scale: float, out_scale: float) -> torch.Tensor:
    """``silu(gate·gate_scale)·up·out_scale`` `[..., f]` of x `[..., 2·f]`."""
    x = x.contiguous()
    f = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], f), dtype=x.dtype, device=x.device)
    if y.numel():
        _swiglu_kernel[_grid(y)](x, y, f, gate_scale, out_scale, BLOCK=_BLOCK)
    return y


def swiglu_backward(grad: torch.Tensor, x: torch.Tensor, gate_scale: float, out_scale: float) -> torch.Tensor:
    """Gradient `[..., 2·f]` of `swiglu` from that of its result `[..., f]`."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    if grad.numel():
        _swiglu_backward_kernel[_grid(grad)](grad, x, grad_x, grad.shape[-1], gate_scale, out_scale, BLOCK=_BLOCK)
    return grad_x


def _grid(y: torch.Tensor) -> tuple[int, int]:
    f = y.shape[-1]
    return y.numel() // f, triton.cdiv(f, _BLOCK)


@cache
def _factors(sizes: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The scale of each column, fp32 `[d]`; made once, since copying it to the device waits for it."""
    repeated = torch.tensor(scales, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    return repeated.float().to(device)
