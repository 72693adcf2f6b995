"""Triton kernels of the SSD scan's states: the recurrence from chunk to chunk and its gradient, one pass each.

mamba-ssm writes what each chunk adds to the state in fp32, then reads all of it again to sum it up. Here a program
walks the chunks in order, its part of the state in fp32 registers, and writes only what the other kernels read.

x and dy are loaded transposed: so they go through shared memory straight into the operand of the tensor cores, where
the tokens' weights are multiplied in.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from falcon_bridge.ops.launch import FastLaunch, stride_unit


# wide blocks read x and dy less often, but chunks are walked in order: with fewer programs too many of an H100's 132
# processors would have none
_PROGRAMS = 96


@triton.jit
def _chunk_states_kernel(
    x_ptr, b_ptr, dt_ptr, decay_ptr, doc_ptr, states_ptr, S, H, RATIO, CHUNKS, x_b, x_s, b_b, b_s,
    HAS_SEQ_IDX: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (P // BLOCK_P) * (N // BLOCK_N)
    block, row = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = row // H, row % H
    p = block // (N // BLOCK_N) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = block % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, L)
    x_tile = tokens[None, :] * (x_s * UNIT) + p[:, None]
    b_tile = tokens[:, None] * (b_s * UNIT) + n[None, :]
    state_tile = p[:, None] * N + n[None, :]
    state_step = tl.full((), P * N, tl.int64) * H
    x_ptr += batch * x_b * UNIT + head * P
    b_ptr += batch * b_b * UNIT + head // RATIO * N
    states_ptr += batch * CHUNKS * state_step + head * (P * N)
    dt_ptr += row * CHUNKS * L
    decay_ptr += row * CHUNKS * L
    if HAS_SEQ_IDX:
        doc_ptr += batch * S

    state = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for chunk in tl.range(0, CHUNKS - 1, num_stages=STAGES):  # whole ones: nothing reads what the last one adds
        tl.store(states_ptr + chunk * state_step + state_tile, state.to(states_ptr.dtype.element_ty))
        start = tl.full((), L, tl.int64) * chunk
        x = tl.load(x_ptr + start * x_s * UNIT + x_tile)
        b = tl.load(b_ptr + start * b_s * UNIT + b_tile)
        last = tl.load(decay_ptr + start + L - 1)
        weight = tl.exp2(last - tl.load(decay_ptr + start + tokens)) * tl.load(dt_ptr + start + tokens)
        decay = tl.exp2(last)
        if HAS_SEQ_IDX:
            leaving = tl.load(doc_ptr + start + L - 1)
            weight = tl.where(tl.load(doc_ptr + start + tokens) == leaving, weight, 0.0)
            decay = tl.where(tl.load(doc_ptr + tl.maximum(start - 1, 0)) == leaving, decay, 0.0)
        state = tl.dot((x * weight[None, :]).to(b.dtype), b, acc=state * decay)
    tl.store(states_ptr + (CHUNKS - 1) * state_step + state_tile, state.to(states_ptr.dtype.element_ty))


@triton.jit
def _chunk_state_gradients_kernel(
    dy_ptr, c_ptr, decay_ptr, doc_ptr, states_ptr, dstates_ptr, decay_grad_ptr,
    S, H, RATIO, CHUNKS, dy_b, dy_s, c_b, c_s,
    HAS_SEQ_IDX: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (P // BLOCK_P) * (N // BLOCK_N)
    block, row = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = row // H, row % H
    p = block // (N // BLOCK_N) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = block % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, L)
    dy_tile = tokens[None, :] * (dy_s * UNIT) + p[:, None]
    c_tile = tokens[:, None] * (c_s * UNIT) + n[None, :]
    state_tile = p[:, None] * N + n[None, :]
    state_step = tl.full((), P * N, tl.int64) * H
    dy_ptr += batch * dy_b * UNIT + head * P
    c_ptr += batch * c_b * UNIT + head // RATIO * N
    states_ptr += batch * CHUNKS * state_step + head * (P * N)
    dstates_ptr += batch * CHUNKS * state_step + head * (P * N)
    decay_ptr += row * CHUNKS * L
    decay_grad_ptr += (block * (tl.num_programs(0).to(tl.int64) // blocks) + row) * CHUNKS
    if HAS_SEQ_IDX:
        doc_ptr += batch * S

    dstate = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for index in tl.range(0, CHUNKS - 1, num_stages=STAGES):
        chunk = CHUNKS - 1 - index
        tl.store(dstates_ptr + chunk * state_step + state_tile, dstate.to(dstates_ptr.dtype.element_ty))
        start = tl.full((), L, tl.int64) * chunk
        there = tokens < S - start
        dy = tl.load(dy_ptr + start * dy_s * UNIT + dy_tile, mask=there[None, :], other=0.0)
        c = tl.load(c_ptr + start * c_s * UNIT + c_tile, mask=there[:, None], other=0.0)
        state = tl.load(states_ptr + chunk * state_step + state_tile)
        weight = tl.exp2(tl.load(decay_ptr + start + tokens))
        decay = tl.exp2(tl.load(decay_ptr + start + L - 1))
        if HAS_SEQ_IDX:
            entering = tl.load(doc_ptr + start - 1)
            weight = tl.where(tl.load(doc_ptr + start + tokens, mask=there, other=0) == entering, weight, 0.0)
            decay = tl.where(tl.load(doc_ptr + tl.minimum(start + L, S) - 1) == entering, decay, 0.0)
        dstate *= decay
        tl.store(decay_grad_ptr + chunk, tl.sum(dstate * state))
        dstate = tl.dot((dy * weight[None, :]).to(c.dtype), c, acc=dstate)
    tl.store(dstates_ptr + state_tile, dstate.to(dstates_ptr.dtype.element_ty))
    tl.store(decay_grad_ptr, 0.0)  # no state enters the first chunk


def chunk_states(
    x: torch.Tensor,
    b: torch.Tensor,
    dt: torch.Tensor,
    log2_decay: torch.Tensor,
    seq_idx: torch.Tensor | None,
    *,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """The state that enters each chunk: "chunk states" and "inter-chunk recurrence" of arXiv 2405.21060 §6.

    Args:
        x: `[b, s, heads, head_dim]`, any strides of b and s.
        b: `[b, s, groups, d_state]` of the same dtype, any strides of b and s.
        dt: fp32 `[b, heads, chunks, chunk]`, contiguous.
        log2_decay: As dt: the sums of dt·A / ln 2 within a chunk up to and with each token.
        seq_idx: int32 `[b, s]`, contiguous: which document a token is of; None for one document.
        config: Overrides `launch_config`.

    Returns:
        `[b, chunks, heads, head_dim, d_state]` in x's dtype; zeros for the first chunk.
    """
    batch, length, heads, head_dim = x.shape
    groups, d_state = b.shape[2:]
    chunks, size = log2_decay.shape[2:]
    states = torch.empty((batch, chunks, heads, head_dim, d_state), dtype=x.dtype, device=x.device)
    config = launch_config(batch * heads, head_dim, d_state, size, x.element_size()) | (config or {})
    unit = stride_unit(x, b)
    launch = _forward(HAS_SEQ_IDX=seq_idx is not None, L=size, P=head_dim, N=d_state, UNIT=unit, **config)
    launch(
        (head_dim // config["BLOCK_P"] * (d_state // config["BLOCK_N"]) * batch * heads,),
        *(x, b, dt, log2_decay, seq_idx, states, length, heads, heads // groups, chunks),
        *(stride // unit for stride in (*x.stride()[:2], *b.stride()[:2])),
    )
    return states


def chunk_state_gradients(
    dy: torch.Tensor,
    c: torch.Tensor,
    log2_decay: torch.Tensor,
    states: torch.Tensor,
    seq_idx: torch.Tensor | None,
    *,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the states that `chunk_states` carries from chunk to chunk.

    Args:
        dy: Gradient of the scan's result, `[b, s, heads, head_dim]`, any strides of b and s.
        c: `[b, s, groups, d_state]` of the same dtype, any strides of b and s.
        log2_decay: As in `chunk_states`.
        states: What `chunk_states` returned.
        seq_idx: As in `chunk_states`.
        config: Overrides `launch_config`.

    Returns:
        The gradient of the state that leaves each chunk, as states; and that of the decay over the whole chunk times
        this decay, fp32 `[parts, b, heads, chunks]`, to be summed over the parts of the state.
    """
    batch, length, heads, head_dim = dy.shape
    groups, d_state = c.shape[2:]
    chunks, size = log2_decay.shape[2:]
    config = launch_config(batch * heads, head_dim, d_state, size, dy.element_size(), backward=True) | (config or {})
    parts = head_dim // config["BLOCK_P"] * (d_state // config["BLOCK_N"])
    dstates = torch.empty_like(states)
    decay_grad = torch.empty((parts, batch, heads, chunks), dtype=torch.float32, device=dy.device)
    unit = stride_unit(dy, c)
    launch = _backward(HAS_SEQ_IDX=seq_idx is not None, L=size, P=head_dim, N=d_state, UNIT=unit, **config)
    launch(
        (parts * batch * heads,),
        *(dy, c, log2_decay, seq_idx, states, dstates, decay_grad, length, heads, heads // groups, chunks),
        *(stride // unit for stride in (*dy.stride()[:2], *c.stride()[:2])),
    )
    return dstates, decay_grad


def launch_config(
    rows: int, head_dim: int, d_state: int, chunk: int, itemsize: int, *, backward: bool = False
) -> dict[str, int | None]:
    """Blocks of the state and launch options; timed by `benchmarks/ssd_gpu.py` for chunks of 128.

    Args:
        rows: Heads of all batch rows.
        head_dim: P.
        d_state: N.
        chunk: Tokens a chunk.
        itemsize: Bytes an element of x.
        backward: Of `chunk_state_gradients`.

    Returns:
        `BLOCK_P` and `BLOCK_N`, which divide head_dim and d_state, `STAGES` of the loads, `num_warps` and `maxnreg`.
    """
    most_p, most_n, stages, registers = 64, 64, 2, None
    if itemsize > 2:
        most_p = most_n = 32
    elif chunk <= 128 and d_state <= 128:
        most_n, stages = 64 if backward else 128, 3
    elif chunk <= 128:
        registers = 168  # three programs a processor
    block_p, block_n = min(head_dim, most_p), min(d_state, most_n)
    while block_n > 32 and rows * (head_dim // block_p) * (d_state // block_n) < _PROGRAMS:
        block_n //= 2
    warps = 8 if chunk > 128 else 4
    return {"BLOCK_P": block_p, "BLOCK_N": block_n, "STAGES": stages, "num_warps": warps, "maxnreg": registers}


@cache
def _forward(**meta: Any) -> FastLaunch:
    return FastLaunch(_chunk_states_kernel, **meta)


@cache
def _backward(**meta: Any) -> FastLaunch:
    return FastLaunch(_chunk_state_gradients_kernel, **meta)
