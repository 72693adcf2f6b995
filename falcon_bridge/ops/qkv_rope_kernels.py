"""Triton kernels of `qkv_rope`: one read and one write a direction, computed in fp32.

A program has one group's heads of a few tokens. It computes the cosines and sines of its tokens once, then takes head
after head, each as two halves `[tokens, d/2]`, which is what RoPE mixes.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from falcon_bridge.ops.launch import FastLaunch


_BLOCK = 1024  # of half a head's channels, 8 a thread: 16 bytes at once in bf16
_WARPS = 4


@triton.jit
def _cosine_and_sine(angles):
    """Of fp32 angles up to some 2^20, to fp32's precision.

    Triton's own come with a rare branch through local memory for angles beyond 1e5, which long rows have, and reduce
    the angle once each. The polynomials are those of Cephes' sinf and cosf.
    """
    quarters = tl.floor(angles * 0.636619772367581343 + 0.5)
    # in fp64: hundreds of thousands of turns would leave fp32 a few digits
    x = (angles.to(tl.float64) - quarters.to(tl.float64) * 1.57079632679489662).to(tl.float32)
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quarter = quarters.to(tl.int32) & 3
    odd, left, lower = (quarter & 1) == 1, (quarter == 1) | (quarter == 2), quarter >= 2
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(left, -first, first), tl.where(lower, -second, second)


@triton.jit
def _qkv_rope_kernel(
    mixed_ptr, angles_ptr, q_ptr, k_ptr, v_ptr, TOKENS, B, GROUPS, angles_s, value_scale,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    inner = tl.arange(0, COLUMNS)[None, :]
    mask = (tokens < TOKENS) & (inner < HALF)
    angles = tl.load(angles_ptr + (tokens // B).to(tl.int64) * angles_s + inner, mask=mask, other=0.0)
    cosine, sine = _cosine_and_sine(angles)
    rows = tokens.to(tl.int64) * GROUPS + group
    mixed = mixed_ptr + rows * ((HEADS + 2) * 2 * HALF) + inner
    q, k, v = q_ptr + rows * (HEADS * 2 * HALF) + inner, k_ptr + rows * (2 * HALF) + inner, v_ptr + rows * (2 * HALF)
    dtype = q_ptr.dtype.element_ty
    for head in tl.static_range(HEADS + 1):
        x = tl.load(mixed + head * 2 * HALF, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(mixed + head * 2 * HALF + HALF, mask=mask, other=0.0).to(tl.float32)
        out = q + head * 2 * HALF if head < HEADS else k
        tl.store(out, (x * cosine - y * sine).to(dtype), mask=mask)
        tl.store(out + HALF, (y * cosine + x * sine).to(dtype), mask=mask)
    for half in tl.static_range(2):
        x = tl.load(mixed + (HEADS + 1) * 2 * HALF + half * HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(v + half * HALF + inner, (x * value_scale).to(dtype), mask=mask)


@triton.jit
def _qkv_rope_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, angles_ptr, dmixed_ptr, TOKENS, B, GROUPS,
    dq_s, dq_b, dq_h, dk_s, dk_b, dk_g, dv_s, dv_b, dv_g, angles_s, value_scale,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    inner = tl.arange(0, COLUMNS)[None, :]
    mask = (tokens < TOKENS) & (inner < HALF)
    s, b = (tokens // B).to(tl.int64), (tokens % B).to(tl.int64)
    group = group.to(tl.int64)
    cosine, sine = _cosine_and_sine(tl.load(angles_ptr + s * angles_s + inner, mask=mask, other=0.0))
    dmixed = dmixed_ptr + (tokens.to(tl.int64) * GROUPS + group) * ((HEADS + 2) * 2 * HALF) + inner
    dq = dq_ptr + s * dq_s + b * dq_b + group * HEADS * dq_h + inner
    dk = dk_ptr + s * dk_s + b * dk_b + group * dk_g + inner
    dv = dv_ptr + s * dv_s + b * dv_b + group * dv_g + inner
    dtype = dmixed_ptr.dtype.element_ty
    for head in tl.static_range(HEADS + 1):
        grad = dq + head * dq_h if head < HEADS else dk
        x = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(grad + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(dmixed + head * 2 * HALF, (x * cosine + y * sine).to(dtype), mask=mask)
        tl.store(dmixed + head * 2 * HALF + HALF, (y * cosine - x * sine).to(dtype), mask=mask)
    for half in tl.static_range(2):
        x = tl.load(dv + half * HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(dmixed + (HEADS + 1) * 2 * HALF + half * HALF, (x * value_scale).to(dtype), mask=mask)


def qkv_rope(
    mixed_qkv: torch.Tensor, angles: torch.Tensor, value_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`qkv_rope.qkv_rope_reference` in one pass.

    Args:
        mixed_qkv: `[s, b, g, (n/g + 2)·d]`.
        angles: fp32 `[s, 1, 1, d]`, contiguous along d; only the first of their two equal halves is read.
        value_scale: Multiplier of the values.

    Returns:
        q `[s, b, n, d]`, k and v `[s, b, g, d]`, contiguous, in mixed_qkv's dtype.
    """
    mixed_qkv = mixed_qkv.contiguous()
    s, b, groups, width = mixed_qkv.shape
    d = angles.shape[-1]
    heads = width // d - 2
    q = mixed_qkv.new_empty(s, b, groups * heads, d)
    k, v = mixed_qkv.new_empty(s, b, groups, d), mixed_qkv.new_empty(s, b, groups, d)
    launch, block = _launch(_qkv_rope_kernel, heads, d // 2)
    launch(
        (triton.cdiv(s * b, block), groups),
        *(mixed_qkv, angles, q, k, v, s * b, b, groups, angles.stride(0), value_scale),
    )
    return q, k, v


def qkv_rope_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, angles: torch.Tensor, value_scale: float
) -> torch.Tensor:
    """Gradient of `qkv_rope`'s mixed_qkv, contiguous `[s, b, g, (n/g + 2)·d]`.

    Args:
        dq: `[s, b, n, d]` with any strides.
        dk: `[s, b, g, d]`, likewise.
        dv: `[s, b, g, d]`, likewise.
        angles: As in the forward pass.
        value_scale: As in the forward pass.
    """
    dq, dk, dv = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (dq, dk, dv))
    s, b, groups, d = dk.shape
    heads = dq.shape[2] // groups
    dmixed = dq.new_empty(s, b, groups, (heads + 2) * d)
    launch, block = _launch(_qkv_rope_backward_kernel, heads, d // 2)
    launch(
        (triton.cdiv(s * b, block), groups),
        *(dq, dk, dv, angles, dmixed, s * b, b, groups),
        *(*dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], angles.stride(0), value_scale),
    )
    return dmixed


@cache
def _launch(kernel, heads: int, half: int) -> tuple[FastLaunch, int]:
    """A kernel for `heads` query heads a group and heads of ``2·half`` channels, and its tokens a program."""
    columns = triton.next_power_of_2(half)
    block = max(1, _BLOCK // columns)
    return FastLaunch(kernel, HEADS=heads, HALF=half, BLOCK=block, COLUMNS=columns, num_warps=_WARPS), block
