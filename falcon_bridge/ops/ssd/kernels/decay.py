"""Triton kernels of the scan's step sizes: softplus and summed decays before it, all that depends on them behind it.

Both directions are one pass over tiles `[heads, tokens]` of one chunk: the caller's rows are contiguous along the
heads, the kernels' own tensors along the tokens, and a tile turns from one to the other in registers.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from falcon_bridge.ops.launch import FastLaunch


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(x):
    """`log(1 + exp(x))` to fp32's rounding for every x: where torch turns linear (20), the logarithm has vanished."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # u holds e rounded to an ulp of 1; the quotient, computed from the same u, takes that rounding out again
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _step_decay_kernel(
    raw_ptr, bias_ptr, a_ptr, dt_ptr, decay_ptr, S, H, CHUNKS, raw_b, raw_s, raw_h, dt_scale,
    HEADS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    b, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), (tl.program_id(0) % CHUNKS).to(tl.int64)
    first = tl.program_id(1) * HEADS
    inner, tokens = tl.arange(0, HEADS), tl.arange(0, L)
    heads = first + inner
    mask = (heads < H)[:, None] & (tokens < S - chunk * L)[None, :]
    raw_ptr += b * raw_b + chunk * L * raw_s + first.to(tl.int64) * raw_h
    raw = tl.load(raw_ptr + inner[:, None] * raw_h + tokens[None, :] * raw_s, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + heads, mask=heads < H, other=0.0)
    a = tl.load(a_ptr + heads, mask=heads < H, other=0.0)
    dt = tl.where(mask, _softplus(raw * dt_scale + bias[:, None]), 0.0)
    decay = tl.cumsum(dt * a[:, None], 1) * _LOG2_E
    base = ((b * H + first) * CHUNKS + chunk) * L
    at = inner[:, None] * (CHUNKS * L) + tokens[None, :]
    tl.store(dt_ptr + base + at, dt, mask=(heads < H)[:, None])
    tl.store(decay_ptr + base + at, decay, mask=(heads < H)[:, None])


@triton.jit
def _step_gradients_kernel(
    ddt_ptr, pair_ptr, key_ptr, query_ptr, decay_grad_ptr, dd_ptr, dt_ptr, raw_ptr, bias_ptr, a_ptr, draw_ptr,
    sums_ptr, S, H, CHUNKS, raw_b, raw_s, raw_h, draw_b, draw_s, draw_h, dt_scale,
    PAIRS: tl.constexpr, QUERIES: tl.constexpr, DECAYS: tl.constexpr, SKIPS: tl.constexpr,
    HEADS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, chunk = row // CHUNKS, row % CHUNKS
    first = tl.program_id(1) * HEADS
    inner, tokens = tl.arange(0, HEADS), tl.arange(0, L)
    heads = first + inner
    rows = (heads < H)[:, None]
    mask = rows & (tokens < S - chunk * L)[None, :]
    base = ((b * H + first) * CHUNKS + chunk) * L
    at = inner[:, None] * (CHUNKS * L) + tokens[None, :]
    part = tl.num_programs(0).to(tl.int64) * H

    # what a decay acts on: outputs at or after it, keys before it (without its own, which would drown decayed ones),
    # and the state on its way through the chunk; loads whose mask is the same along the tokens take 16 bytes at once
    after = tl.zeros((HEADS, L), dtype=tl.float32)
    for index in tl.static_range(PAIRS):
        after += tl.load(pair_ptr + index * part * L + base + at, mask=rows, other=0.0)
    for index in tl.static_range(QUERIES):
        after += tl.load(query_ptr + index * part * L + base + at, mask=rows, other=0.0)
    after = tl.where(mask, after, 0.0)
    before = tl.load(key_ptr + base + at - 1, mask=mask & (tokens > 0)[None, :], other=0.0)
    through = tl.zeros((HEADS,), dtype=tl.float32)
    for index in tl.static_range(DECAYS):
        place = index * part + (b * H + first) * CHUNKS + chunk + inner * CHUNKS
        through += tl.load(decay_grad_ptr + place, mask=heads < H, other=0.0)
    dalpha = tl.cumsum(after, 1, reverse=True) + tl.cumsum(before, 1) + through[:, None]

    raw_ptr += b * raw_b + chunk * L * raw_s + first.to(tl.int64) * raw_h
    raw = tl.load(raw_ptr + inner[:, None] * raw_h + tokens[None, :] * raw_s, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + heads, mask=heads < H, other=0.0)
    a = tl.load(a_ptr + heads, mask=heads < H, other=0.0)
    dt = tl.load(dt_ptr + base + at, mask=rows, other=0.0)
    ddt = tl.load(ddt_ptr + base + at, mask=rows, other=0.0) + a[:, None] * dalpha
    dpre = tl.where(mask, ddt * tl.sigmoid(raw * dt_scale + bias[:, None]), 0.0)
    draw_ptr += b * draw_b + chunk * L * draw_s + first.to(tl.int64) * draw_h
    draw = (dpre * dt_scale).to(draw_ptr.dtype.element_ty)
    tl.store(draw_ptr + inner[:, None] * draw_h + tokens[None, :] * draw_s, draw, mask=mask)

    sums_ptr += row * H + heads
    tl.store(sums_ptr, tl.sum(dt * dalpha, 1), mask=heads < H)
    tl.store(sums_ptr + part, tl.sum(dpre, 1), mask=heads < H)
    dd = tl.zeros((HEADS,), dtype=tl.float32)
    for index in tl.static_range(SKIPS):
        dd += tl.load(dd_ptr + index * part + row * H + heads, mask=heads < H, other=0.0)
    tl.store(sums_ptr + 2 * part, dd, mask=heads < H)


def step_decay(
    raw_dt: torch.Tensor,
    dt_scale: float,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    chunk: int,
    *,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step sizes `softplus(dt_scale · raw_dt + dt_bias)` and their decays, summed within each chunk.

    Args:
        raw_dt: `[b, s, heads]`, any strides, bf16, fp16 or fp32.
        dt_scale: Multiplier of raw_dt.
        dt_bias: `[heads]`, fp32, contiguous.
        a: `[heads]`, fp32, contiguous.
        chunk: Tokens a chunk, a power of two.
        config: Overrides of `heads` (a program, a power of two) and `num_warps`.

    Returns:
        dt and log2_decay, both fp32 `[b, heads, ceil(s / chunk), chunk]`. log2_decay is the inclusive sum of `dt · a`
        since the chunk's start, in units of log 2. Behind the row's end dt is 0 and log2_decay keeps its value, up to
        rounding.
    """
    batch, length, heads = raw_dt.shape
    chunks = triton.cdiv(length, chunk)
    dt = torch.empty((batch, heads, chunks, chunk), dtype=torch.float32, device=raw_dt.device)
    log2_decay = torch.empty_like(dt)
    block, warps = _blocks(heads, config)
    _forward(HEADS=block, L=chunk, num_warps=warps)(
        (batch * chunks, triton.cdiv(heads, block)),
        *(raw_dt, dt_bias, a, dt, log2_decay, length, heads, chunks, *raw_dt.stride(), dt_scale),
    )
    return dt, log2_decay


def step_gradients(
    ddt: torch.Tensor,
    pair: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
    decay_grad: torch.Tensor,
    dd: torch.Tensor,
    dt: torch.Tensor,
    raw_dt: torch.Tensor,
    dt_scale: float,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    draw_dt: torch.Tensor,
    *,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of all that `step_decay` took, from what the scan's other kernels found about steps and decays.

    All but raw_dt and draw_dt are fp32 and contiguous. What they hold behind the row's end has no effect; dt must be 0
    there. The gradient of a token's log-decay `dt · a` is the sum of pair and query from that token on, of key before
    it, and decay_grad.

    Args:
        ddt: `[b, heads, chunks, chunk]`, gradient of dt as a factor of x, without its part in the decays.
        pair: `[parts, b, heads, chunks, chunk]`, summed over parts: gradient of each token's summed log-decay from the
            products within the chunk.
        key: `[b, heads, chunks, chunk]`, gradient of the log-decay between a token and the chunk's end.
        query: `[parts, b, heads, chunks, chunk]`, summed over parts: of the one between the chunk's start and a token.
        decay_grad: `[parts, b, heads, chunks]`, summed over parts: of the one across the chunk.
        dd: `[parts, b, chunks, heads]`, summed over parts: each chunk's share of the skip weights' gradient.
        dt: `[b, heads, chunks, chunk]`, from `step_decay`.
        raw_dt: `[b, s, heads]`, as in `step_decay`.
        dt_scale: As in `step_decay`.
        dt_bias: As in `step_decay`.
        a: As in `step_decay`.
        draw_dt: `[b, s, heads]`, any strides: where to write raw_dt's gradient.
        config: As in `step_decay`.

    Returns:
        Gradients of a, of dt_bias, and of the skip weights, fp32 `[heads]` each.
    """
    batch, length, heads = raw_dt.shape
    chunks, chunk = dt.shape[2:]
    sums = torch.empty((3, batch * chunks, heads), dtype=torch.float32, device=dt.device)
    block, warps = _blocks(heads, config)
    parts = {"PAIRS": pair.shape[0], "QUERIES": query.shape[0], "DECAYS": decay_grad.shape[0]}
    _backward(**parts, SKIPS=dd.shape[0], HEADS=block, L=chunk, num_warps=warps)(
        (batch * chunks, triton.cdiv(heads, block)),
        *(ddt, pair, key, query, decay_grad, dd, dt, raw_dt, dt_bias, a, draw_dt, sums),
        *(length, heads, chunks, *raw_dt.stride(), *draw_dt.stride(), dt_scale),
    )
    da, ddt_bias, dd = sums.sum(1).unbind()
    return da, ddt_bias, dd


def _blocks(heads: int, config: dict[str, int] | None) -> tuple[int, int]:
    """Heads a program and its warps."""
    chosen = {"heads": min(8, triton.next_power_of_2(heads)), "num_warps": 4, **(config or {})}
    return chosen["heads"], chosen["num_warps"]


@cache
def _forward(**meta: int) -> FastLaunch:
    return FastLaunch(_step_decay_kernel, **meta)


@cache
def _backward(**meta: int) -> FastLaunch:
    return FastLaunch(_step_gradients_kernel, **meta)
