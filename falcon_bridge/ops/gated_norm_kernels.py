"""Triton kernels of `gated_norm`: one read and one write a direction, computed in fp32, between two layouts.

The scan's result is batch first, Megatron's linear layers are sequence first: y and its gradient are contiguous
`[b, s, d]`, the result and its gradient `[s, b, d]`, and z with its gradient are views into wider rows.
"""

import torch
import triton
import triton.language as tl

from falcon_bridge.ops.launch import stride_unit


_LARGEST_GROUP = 16384
# programs that add up the weight's gradient over many rows each, to few partial sums; four a processor of the H100
_PROGRAMS = 528


@triton.jit
def _gated_norm_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, rstd_ptr, B, GROUPS, WIDTH, D,
    y_b, y_s, z_s, z_b, out_s, out_b, gate_scale, out_scale, eps,
    NORM: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, b = row // B, row % B
    inner = tl.arange(0, BLOCK)
    columns = group * WIDTH + inner
    mask = (inner < WIDTH) & (columns < D)
    y = tl.load(y_ptr + b * y_b + s * y_s + columns, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + (s * z_s + b * z_b) * UNIT + columns, mask=mask, other=0.0).to(tl.float32) * gate_scale
    out = y * z * tl.sigmoid(z)
    if NORM:
        rstd = 1.0 / tl.sqrt(tl.sum(out * out) / WIDTH + eps)
        tl.store(rstd_ptr + row * GROUPS + group, rstd)
        out = out * rstd * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + s * out_s + b * out_b + columns, (out * out_scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_norm_backward_kernel(
    grad_ptr, y_ptr, z_ptr, weight_ptr, rstd_ptr, dy_ptr, dz_ptr, dweight_ptr, ROWS, B, GROUPS, WIDTH, D,
    grad_s, grad_b, y_b, y_s, z_s, z_b, dz_s, dz_b, gate_scale, out_scale,
    NORM: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    first, group = tl.program_id(0), tl.program_id(1)
    inner = tl.arange(0, BLOCK)
    columns = group * WIDTH + inner
    mask = (inner < WIDTH) & (columns < D)
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in range(first, ROWS, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + index
        s, b = row // B, row % B
        y = tl.load(y_ptr + b * y_b + s * y_s + columns, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + (s * z_s + b * z_b) * UNIT + columns, mask=mask, other=0.0).to(tl.float32) * gate_scale
        grad = tl.load(grad_ptr + s * grad_s + b * grad_b + columns, mask=mask, other=0.0).to(tl.float32) * out_scale
        sigmoid = tl.sigmoid(z)
        silu = z * sigmoid
        if NORM:
            rstd = tl.load(rstd_ptr + row * GROUPS + group)
            normed = y * silu * rstd
            dweight += grad * normed
            grad = grad * weight
            grad = (grad - normed * (tl.sum(grad * normed) / WIDTH)) * rstd
        dz = grad * y * (sigmoid + silu * (1 - sigmoid)) * gate_scale
        tl.store(dz_ptr + (s * dz_s + b * dz_b) * UNIT + columns, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        tl.store(dy_ptr + b * y_b + s * y_s + columns, (grad * silu).to(dy_ptr.dtype.element_ty), mask=mask)
    if NORM:
        tl.store(dweight_ptr + first.to(tl.int64) * D + columns, dweight, mask=mask)


def gated_norm(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    gate_scale: float,
    out_scale: float,
    group_width: int | None = None,
    eps: float = 1e-5,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`gated_norm.gated_norm_reference` from a batch-first y into a sequence-first result, in one pass.

    Args:
        y: `[b, s, d]`, contiguous.
        z: `[s, b, d]`, contiguous along d.
        weight: `[d]`, or None for no norm.
        gate_scale: Multiplier inside the SiLU.
        out_scale: Multiplier of the result.
        group_width: Channels normalised together, dividing d; d where None.
        eps: Added to the mean square.
        out: Where to write the result, contiguous `[s, b, d]`; a new tensor where None.

    Returns:
        `[s, b, d]` in y's dtype, and the reciprocal root mean squares fp32 `[s, b, groups]` where there is a norm.

    Raises:
        ValueError: If a group is wider than a program can hold.
    """
    batch, length, d = y.shape
    width, block, groups = _blocks(d, weight, group_width)
    unit = stride_unit(z)
    out = torch.empty((length, batch, d), dtype=y.dtype, device=y.device) if out is None else out
    rstd = None if weight is None else torch.empty((length, batch, groups), dtype=torch.float32, device=y.device)
    _gated_norm_kernel[(length * batch, groups)](
        y, z, weight, out, rstd, batch, groups, width, d,
        y.stride(0), y.stride(1), z.stride(0) // unit, z.stride(1) // unit, out.stride(0), out.stride(1),
        gate_scale, out_scale, eps, NORM=weight is not None, BLOCK=block, UNIT=unit, num_warps=_warps(block),
    )  # fmt: skip
    return out, rstd


def gated_norm_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor | None,
    dz: torch.Tensor,
    *,
    gate_scale: float,
    out_scale: float,
    group_width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `gated_norm`.

    Args:
        grad: Of the result, `[s, b, d]`.
        y: As in the forward pass.
        z: As in the forward pass.
        weight: As in the forward pass.
        rstd: What the forward pass returned.
        dz: Where to write z's gradient, `[s, b, d]`, contiguous along d.
        gate_scale: As in the forward pass.
        out_scale: As in the forward pass.
        group_width: As in the forward pass.

    Returns:
        y's gradient `[b, s, d]`, and the weight's, fp32 `[d]`, where there is a norm.
    """
    batch, length, d = y.shape
    width, block, groups = _blocks(d, weight, group_width)
    if grad.stride(2) != 1:
        grad = grad.contiguous()
    rows, unit = batch * length, stride_unit(z, dz)
    programs = min(rows, _PROGRAMS) if weight is not None else rows
    dy = torch.empty_like(y)
    partial = None if weight is None else torch.empty((programs, d), dtype=torch.float32, device=y.device)
    _gated_norm_backward_kernel[(programs, groups)](
        grad, y, z, weight, rstd, dy, dz, partial, rows, batch, groups, width, d,
        grad.stride(0), grad.stride(1), y.stride(0), y.stride(1), z.stride(0) // unit, z.stride(1) // unit,
        dz.stride(0) // unit, dz.stride(1) // unit,
        gate_scale, out_scale, NORM=weight is not None, BLOCK=block, UNIT=unit, num_warps=_warps(block),
    )  # fmt: skip
    return dy, None if partial is None else partial.sum(0)


def _blocks(d: int, weight: torch.Tensor | None, group_width: int | None) -> tuple[int, int, int]:
    """Channels and block size of a program, and how many programs a row takes."""
    if weight is None:
        block = next((block for block in (1024, 512, 256) if d % block == 0), 1024)
        return block, block, triton.cdiv(d, block)
    width = group_width or d
    if width > _LARGEST_GROUP:
        raise ValueError(
            f"the gated norm's groups of {width} channels are wider than {_LARGEST_GROUP}: use more groups"
        )
    return width, triton.next_power_of_2(width), d // width


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))
