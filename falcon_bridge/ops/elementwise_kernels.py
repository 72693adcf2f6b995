"""Triton kernels of `elementwise`: each piece is one read and one write, computed in fp32."""

import torch
import triton
import triton.language as tl


_BLOCK = 1024


@triton.jit
def _residual_sum_kernel(residual_ptr, first_ptr, second_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    out = tl.load(residual_ptr + offsets, mask=mask).to(tl.float32)
    out += tl.load(first_ptr + offsets, mask=mask).to(tl.float32)
    out += tl.load(second_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


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


def residual_sum(residual: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``residual + first + second``, all of one shape, in the residual's dtype."""
    residual, first, second = residual.contiguous(), first.contiguous(), second.contiguous()
    out = torch.empty_like(residual)
    _residual_sum_kernel[(triton.cdiv(out.numel(), _BLOCK),)](residual, first, second, out, out.numel(), BLOCK=_BLOCK)
    return out


def swiglu(x: torch.Tensor, gate_scale: float, out_scale: float, y: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate·gate_scale)·up·out_scale`` `[..., f]` of x `[..., 2·f]`, into a contiguous y if there is one."""
    x = x.contiguous()
    f = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], f), dtype=x.dtype, device=x.device) if y is None else y
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
