"""Triton kernel of the scan's gradients of x, dt and D, and of the products C·B, within one chunk.

A program takes a block of a chunk's tokens as keys, for several heads of a group. Tiles are transposed, key tokens j
by query tokens i: a row of the result dx_j is then a row of the tile, and a tile feeds the product that gives dx
without leaving the registers. Of the chunk's blocks of queries only those from the keys' own block on are computed.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from falcon_bridge.ops.launch import FastLaunch


# two programs a processor of the H100 at a time, of the blocks' unequal sizes: about two rounds of them
_PROGRAMS = 512
# each is one more gradient of C·B to read for `group_gradients`
_MOST_SPLITS = 2
# below, what a program does once, C·B of its tokens, begins to count
_FEWEST_HEADS = 4


@triton.jit
def _key_block(
    dy_ptr, x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, dstates_ptr, d_ptr, seq_idx_ptr,
    dx_ptr, dscores_ptr, ddt_ptr, pair_ptr, key_ptr, dd_ptr,
    dy_s, x_s, b_s, c_s, dx_s, head_stride, part_stride, first_head, last_head, tokens,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
):  # fmt: skip
    """The chunk's block `OWN` of keys; every pointer is to the chunk's first token, or to what the chunk has."""
    BLOCKS: tl.constexpr = L // BLOCK
    inner = tl.arange(0, BLOCK)
    keys = OWN * BLOCK + inner
    channels, state = tl.arange(0, P), tl.arange(0, N)
    inside = (keys < tokens)[:, None]
    if HAS_SEQ_IDX:
        docs = tl.load(seq_idx_ptr + keys, mask=keys < tokens, other=0)
        leaves = docs == tl.load(seq_idx_ptr + tokens - 1)

    # B_j·C_i of each block of queries: 0 where a key does not reach a query, and on the diagonal
    b = tl.load(b_ptr + keys[:, None] * b_s + state[None, :], mask=inside, other=0.0)
    scores, dscores = (), ()
    for q in tl.static_range(OWN, BLOCKS):
        queries = q * BLOCK + inner
        c = tl.load(c_ptr + queries[:, None] * c_s + state[None, :], mask=(queries < tokens)[:, None], other=0.0)
        tile = tl.dot(b, tl.trans(c))
        if q == OWN:
            diagonal = tl.sum(tl.where(inner[:, None] == inner[None, :], tile, 0.0), axis=1)
            tile = tl.where(inner[:, None] < inner[None, :], tile, 0.0)
        if HAS_SEQ_IDX:
            query_docs = tl.load(seq_idx_ptr + queries, mask=queries < tokens, other=0)
            tile = tl.where(docs[:, None] == query_docs[None, :], tile, 0.0)
        scores += (tile,)
        dscores += (tl.zeros((BLOCK, BLOCK), dtype=tl.float32),)

    for head in range(first_head, last_head):
        columns = (head * P + channels)[None, :]
        row = head * head_stride
        x = tl.load(x_ptr + keys[:, None] * x_s + columns, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + keys[:, None] * dy_s + columns, mask=inside, other=0.0)
        dstate = tl.load(dstates_ptr + head * (P * N) + channels[:, None] * N + state[None, :])
        dt = tl.load(dt_ptr + row + keys)
        decay = tl.load(decay_ptr + row + keys)
        leaving = tl.exp2(tl.load(decay_ptr + row + L - 1) - decay)
        if HAS_SEQ_IDX:
            leaving = tl.where(leaves, leaving, 0.0)

        # what comes back through the state and on the diagonal; the latter in fp32, without a tile
        dx = tl.dot(b, tl.trans(dstate))
        products = tl.sum(x.to(tl.float32) * dy.to(tl.float32), axis=1)
        ddt = tl.sum(x.to(tl.float32) * dx, axis=1) * leaving
        tl.store(dd_ptr + head, tl.sum(products))
        tl.store(key_ptr + row + keys, ddt * dt)
        ddt += diagonal * products
        dx = dx * (leaving * dt)[:, None] + dy.to(tl.float32) * (tl.load(d_ptr + head) + diagonal * dt)[:, None]

        summed = ()
        for q in tl.static_range(OWN, BLOCKS):
            queries = q * BLOCK + inner
            exponent = tl.load(decay_ptr + row + queries)[None, :] - decay[:, None]
            if q == OWN:
                exponent = tl.minimum(exponent, 0.0)  # positive above the diagonal: unused, but it must be finite
            else:
                dy = tl.load(dy_ptr + queries[:, None] * dy_s + columns, mask=(queries < tokens)[:, None], other=0.0)
            weights = tl.exp2(exponent) * dt[:, None]
            dx = tl.dot((scores[q - OWN] * weights).to(x.dtype), dy, dx)
            grad = tl.dot(x, tl.trans(dy)) * weights
            summed += (dscores[q - OWN] + grad,)
            pairs = grad * scores[q - OWN]
            if q == OWN:
                given, own_taken = tl.sum(pairs, axis=1), tl.sum(pairs, axis=0)
            else:
                given += tl.sum(pairs, axis=1)
                tl.store(pair_ptr + (q - OWN) * part_stride + row + queries, tl.sum(pairs, axis=0))
        dscores = summed
        tl.store(pair_ptr + row + keys, own_taken - given)
        for part in tl.static_range(OWN + 1, BLOCKS):
            tl.store(pair_ptr + part * part_stride + row + keys, tl.zeros((BLOCK,), dtype=tl.float32))
        tl.store(ddt_ptr + row + keys, ddt + given / tl.where(dt > 0, dt, 1.0))
        dx_ptrs = dx_ptr + keys[:, None] * dx_s + columns
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    for q in tl.static_range(BLOCKS):
        queries = q * BLOCK + inner
        tile = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        if q >= OWN:
            tile = tl.trans(dscores[q - OWN])
            reached = queries[:, None] >= keys[None, :]
            if HAS_SEQ_IDX:
                query_docs = tl.load(seq_idx_ptr + queries, mask=queries < tokens, other=0)
                key_docs = tl.load(seq_idx_ptr + keys, mask=keys < tokens, other=0)
                reached &= query_docs[:, None] == key_docs[None, :]
            tile = tl.where(reached, tile, 0.0)
        tl.store(dscores_ptr + queries[:, None] * L + keys[None, :], tile)


@triton.jit
def _input_gradients_kernel(
    dy_ptr, x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, dstates_ptr, d_ptr, seq_idx_ptr,
    dx_ptr, dscores_ptr, ddt_ptr, pair_ptr, key_ptr, dd_ptr,
    length, chunks, H, G, group_heads, program_heads,
    dy_b, dy_s, x_b, x_s, b_b, b_s, c_b, c_s, dx_b, dx_s,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = L // BLOCK
    program, split = tl.program_id(0), tl.program_id(1)
    block, index = program % BLOCKS, program // BLOCKS
    group, chunk, batch = index % G, index // G % chunks, (index // G // chunks).to(tl.int64)
    first_head = group * group_heads + split * program_heads
    last_head = tl.minimum(first_head + program_heads, (group + 1) * group_heads)
    start = (chunk * L).to(tl.int64)
    tokens = tl.minimum(length - chunk * L, L)

    dy_ptr += batch * dy_b + start * dy_s
    x_ptr += batch * x_b + start * x_s
    dx_ptr += batch * dx_b + start * dx_s
    b_ptr += batch * b_b + start * b_s + group * N
    c_ptr += batch * c_b + start * c_s + group * N
    if HAS_SEQ_IDX:
        seq_idx_ptr += batch * length + start
    row_chunk = batch * chunks + chunk
    dstates_ptr += row_chunk * H * (P * N)
    splits_before = split.to(tl.int64) * (tl.num_programs(0) // BLOCKS)
    dscores_ptr += (splits_before + index) * (L * L)
    per_token = batch * H * chunks * L + start
    dt_ptr += per_token
    decay_ptr += per_token
    ddt_ptr += per_token
    pair_ptr += per_token
    key_ptr += per_token
    head_stride = chunks * L
    part_heads = tl.num_programs(0).to(tl.int64) // (BLOCKS * G) * H
    part_stride = part_heads * L
    dd_ptr += block * part_heads + row_chunk * H

    for own in tl.static_range(BLOCKS):
        if block == own:
            _key_block(
                dy_ptr, x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, dstates_ptr, d_ptr, seq_idx_ptr,
                dx_ptr, dscores_ptr, ddt_ptr, pair_ptr, key_ptr, dd_ptr,
                dy_s, x_s, b_s, c_s, dx_s, head_stride, part_stride, first_head, last_head, tokens,
                L, P, N, BLOCK, own, HAS_SEQ_IDX,
            )  # fmt: skip


def input_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    dt: torch.Tensor,
    log2_decay: torch.Tensor,
    dstates: torch.Tensor,
    d: torch.Tensor,
    seq_idx: torch.Tensor | None,
    dx: torch.Tensor,
    *,
    config: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients that stay within a chunk: of x, written to `dx`, of C·B, of D, and what those of dt are made of.

    With `dx_j = D dy_j + dt_j w_j` and `E_ij = (dy_i·x_j) (C_i·B_j) 2^(a_i - a_j) dt_j` for tokens j before i of
    one document, 0 otherwise; `w_j` is the sum of a part of the chunk and of a part of the state that leaves it.

    Args:
        dy: `[b, s, heads, head_dim]`, the gradient of the scan's result; contiguous in the last two dimensions, as
            are x, b, c and dx.
        x: As dy.
        b: `[b, s, groups, d_state]`.
        c: As b.
        dt: fp32 `[b, heads, chunks, chunk]`, contiguous, 0 behind the row's end.
        log2_decay: As dt, the sums a of the chunk's decays to base 2; behind the row's end its last value.
        dstates: `[b, chunks, heads, head_dim, d_state]`, contiguous, in x's dtype: gradients of the states that leave
            the chunks.
        d: fp32 `[heads]`.
        seq_idx: int32 `[b, s]`, contiguous, or None where each row is one document.
        dx: Where to write x's gradient, as dy.
        config: Overrides of `launch_config`, and `heads`, the most heads of a program.

    Returns:
        - dscores, fp32 `[splits, b, chunks, groups, chunk, chunk]`: the gradient of `C_i·B_j` at [i, j], to be summed
          over the splits; 0 above the diagonal.
        - ddt, fp32 `[b, heads, chunks, chunk]`: `x_j·w_j`.
        - pair, fp32 `[parts, b, heads, chunks, chunk]`, to be summed over the parts: the sums of E's rows less those
          of its columns.
        - key, fp32 like ddt: `dt_j` times x_j by the state's part of w_j.
        - dd, fp32 `[parts, b, chunks, heads]`, to be summed over all but heads: the sums of x·dy.

    Raises:
        ValueError: If the configured block of keys does not divide the chunk.
    """
    batch, length, heads, head_dim = x.shape
    groups, d_state = b.shape[2:]
    chunks, chunk = log2_decay.shape[2:]
    options = launch_config(head_dim, d_state, chunk, x.element_size()) | (config or {})
    block, group_heads = options.pop("block"), heads // groups
    if chunk % block:
        raise ValueError(f"a chunk of {chunk} tokens does not divide into blocks of {block} keys")
    parts = chunk // block
    programs = batch * chunks * groups * parts
    enough = triton.cdiv(group_heads * programs, _PROGRAMS)
    shared_heads = max(_FEWEST_HEADS, enough, triton.cdiv(group_heads, _MOST_SPLITS))
    program_heads = min(options.pop("heads", shared_heads), group_heads)
    splits = triton.cdiv(group_heads, program_heads)
    dscores = dt.new_empty((splits, batch, chunks, groups, chunk, chunk))
    ddt, key = torch.empty_like(dt), torch.empty_like(dt)
    pair = dt.new_empty((parts, *dt.shape))
    dd = dt.new_empty((parts, batch, chunks, heads))
    launch = _launch(L=chunk, P=head_dim, N=d_state, BLOCK=block, HAS_SEQ_IDX=seq_idx is not None, **options)
    launch(
        (programs, splits),
        *(dy, x, b, c, dt, log2_decay, dstates, d, seq_idx, dx, dscores, ddt, pair, key, dd),
        *(length, chunks, heads, groups, group_heads, program_heads),
        *(stride for view in (dy, x, b, c, dx) for stride in view.stride()[:2]),
    )
    return dscores, ddt, pair, key, dd


def launch_config(head_dim: int, d_state: int, chunk: int, itemsize: int) -> dict[str, int]:
    """Keys a block (`block`, at least 64 for Hopper's tensor cores), num_warps and num_stages."""
    if itemsize == 4:
        return {"block": min(chunk, 32), "num_warps": 8, "num_stages": 1}
    # a second stage beyond would leave room in shared memory for one program instead of two
    return {"block": min(chunk, 64), "num_warps": 4, "num_stages": 2 if head_dim * d_state <= 64 * 128 else 1}


@cache
def _launch(**meta: Any) -> FastLaunch:
    return FastLaunch(_input_gradients_kernel, **meta)
