"""Triton kernel of the scan's backward: the gradients of B and C, which all heads of a group share.

A program holds a tile of one of the two gradients of a chunk and a group, block_m tokens by block_n of N, in fp32, and
walks over the group's heads: a matrix product whose inner size is heads a group times head size. Its limit is the rate
of the memory: dy, x and the states are read once where a tile is as large as the chunk and N, so tiles that share
rows or columns run side by side.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from falcon_bridge.ops.launch import FastLaunch, stride_unit


_INNER = 64  # columns of dscores that one product takes


@triton.jit
def _add_products(acc, score_ptrs, other_ptrs, start, stop, column_stride, other_stride, split_stride, left,
                  SPLITS: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Acc `[BM, BN]` plus columns start to stop of dscores times these rows of B or C, of which `left` are tokens."""
    stages: tl.constexpr = 2 if SPLITS <= 2 else 1  # each split would have its own buffers
    inner = tl.arange(0, BK)
    for first in tl.range(start, stop, BK, num_stages=stages):
        column = first + inner
        pointers = score_ptrs + column[None, :] * column_stride
        scores = tl.load(pointers)
        for split in tl.static_range(1, SPLITS):
            scores += tl.load(pointers + split * split_stride)
        other = tl.load(other_ptrs + column[:, None] * other_stride, mask=(column < left)[:, None], other=0.0)
        acc = tl.dot(scores.to(other.dtype), other, acc)
    return acc


@triton.jit
def _group_gradients_kernel(
    dy_ptr, x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, states_ptr, dstates_ptr, dscores_ptr, seq_ptr,
    db_ptr, dc_ptr, query_ptr, LENGTH, CHUNKS, HEADS, GROUPS, split_stride, part_stride,
    dy_b, dy_s, x_b, x_s, b_b, b_s, c_b, c_s, db_b, db_s, dc_b, dc_s,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, SIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`SIDE` 0 for C's gradient and query, 1 for B's gradient, 2 for both: the grid's second axis is the side."""
    blocks: tl.constexpr = N // BN
    tiles: tl.constexpr = L // BM * blocks
    program = tl.program_id(0)
    tile, cell = program % tiles, program // tiles  # side by side: what reads the same memory
    group, cell = (cell % GROUPS).to(tl.int64), cell // GROUPS
    chunk, batch = (cell % CHUNKS).to(tl.int64), (cell // CHUNKS).to(tl.int64)
    start, part = tile // blocks * BM, tile % blocks
    row, column, inner = start + tl.arange(0, BM), part * BN + tl.arange(0, BN), tl.arange(0, P)
    token = chunk * L
    left = (LENGTH - token).to(tl.int32)  # tokens of the row from this chunk's first on
    inside = row < left
    group_heads = HEADS // GROUPS
    head = group * group_heads

    # one head after the other: tokens P further, states P·N, what is per token and chunk CHUNKS·L
    state = ((batch * CHUNKS + chunk) * HEADS + head) * (P * N)
    state_tile = inner[:, None] * N + column[None, :]
    per_token = ((batch * HEADS + head) * CHUNKS + chunk) * L
    scores = dscores_ptr + ((batch * CHUNKS + chunk) * GROUPS + group) * (L * L)
    b_tile = b_ptr + (batch * b_b + token * b_s) * UNIT + group * N + column[None, :]
    c_tile = c_ptr + (batch * c_b + token * c_s) * UNIT + group * N + column[None, :]
    if HAS_SEQ_IDX:
        documents = seq_ptr + batch * LENGTH + token
        document = tl.load(documents + row, mask=inside, other=0)
    acc = tl.zeros((BM, BN), dtype=tl.float32)

    if SIDE == 0 or (SIDE == 2 and tl.program_id(1) == 0):
        dy_ptr += (batch * dy_b + token * dy_s) * UNIT + head * P
        dy_tile = row[:, None] * (dy_s * UNIT) + inner[None, :]
        c = tl.load(c_tile + row[:, None] * (c_s * UNIT), mask=inside[:, None], other=0.0)
        query = query_ptr + part.to(tl.int64) * part_stride + per_token + row
        if HAS_SEQ_IDX:
            enters = document == tl.load(documents - tl.where(chunk > 0, 1, 0))
        for index in range(group_heads):
            factor = tl.exp2(tl.load(decay_ptr + per_token + index * (CHUNKS * L) + row))
            if HAS_SEQ_IDX:
                factor = tl.where(enters, factor, 0.0)
            dy = tl.load(dy_ptr + index * P + dy_tile, mask=inside[:, None], other=0.0)
            states = tl.load(states_ptr + state + index * (P * N) + state_tile)
            output = tl.dot(c, tl.trans(states))
            tl.store(query + index * (CHUNKS * L), tl.sum(dy * output, axis=1) * factor)
            acc = tl.dot((dy * factor[:, None]).to(dy.dtype), states, acc)
        # dscores is zero above its diagonal
        acc = _add_products(acc, scores + row[:, None] * L, b_tile, 0, start + BM, 1, b_s * UNIT, split_stride, left,
                            SPLITS, BK)  # fmt: skip
        dc = dc_ptr + (batch * dc_b + token * dc_s) * UNIT + group * N + row[:, None] * (dc_s * UNIT) + column[None, :]
        tl.store(dc, acc.to(dc_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        x_ptr += (batch * x_b + token * x_s) * UNIT + head * P
        x_tile = row[:, None] * (x_s * UNIT) + inner[None, :]
        if HAS_SEQ_IDX:
            leaves = document == tl.load(documents + tl.minimum(left, L) - 1)
        for index in range(group_heads):
            here = per_token + index * (CHUNKS * L)
            factor = tl.exp2(tl.load(decay_ptr + here + L - 1) - tl.load(decay_ptr + here + row))
            factor *= tl.load(dt_ptr + here + row)
            if HAS_SEQ_IDX:
                factor = tl.where(leaves, factor, 0.0)
            x = tl.load(x_ptr + index * P + x_tile, mask=inside[:, None], other=0.0)
            weighted = (x * factor[:, None]).to(x.dtype)
            dstates = tl.load(dstates_ptr + state + index * (P * N) + state_tile)
            acc = tl.dot(weighted, dstates, acc)
        acc = _add_products(acc, scores + row[:, None], c_tile, start, L, L, c_s * UNIT, split_stride, left,
                            SPLITS, BK)  # fmt: skip
        db = db_ptr + (batch * db_b + token * db_s) * UNIT + group * N + row[:, None] * (db_s * UNIT) + column[None, :]
        tl.store(db, acc.to(db_ptr.dtype.element_ty), mask=inside[:, None])


def group_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    dt: torch.Tensor,
    log2_decay: torch.Tensor,
    states: torch.Tensor,
    dstates: torch.Tensor,
    dscores: torch.Tensor,
    seq_idx: torch.Tensor | None,
    db: torch.Tensor,
    dc: torch.Tensor,
    config: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Gradients of B and C, and what the entering states' share of C's gradient gives to the decays.

    Products are of x's dtype and accumulate in fp32; x and dy are weighted by the decays in fp32 and rounded before
    the product, the scores' gradient after its sum over splits. Views of batch first tensors may have any strides of
    batch and tokens; their last two dimensions are contiguous.

    Args:
        dy: `[b, s, heads, P]`, gradient of the scan's result.
        x: `[b, s, heads, P]`.
        b: `[b, s, groups, N]`.
        c: as b.
        dt: fp32 `[b, heads, chunks, L]`, contiguous, 0 behind the row's end.
        log2_decay: fp32 `[b, heads, chunks, L]`, contiguous: the sum of ``dt·A·log2(e)`` from the chunk's first token.
        states: `[b, chunks, heads, P, N]`, contiguous, x's dtype: the state that enters each chunk.
        dstates: as states: the gradient of the state that leaves each chunk.
        dscores: fp32 `[splits, b, chunks, groups, L, L]`, contiguous: the gradient of ``C_i·B_j``, to be summed over
            splits; 0 above the diagonal.
        seq_idx: int32 `[b, s]`, contiguous, or None where each row is one document.
        db: B's gradient is written here, shape as b, also a view.
        dc: C's gradient is written here, shape as b, also a view.
        config: Replaces entries of `launch_config`.

    Returns:
        query, fp32 `[parts, b, heads, chunks, L]`: of each token C times the entering state's share of C's gradient,
        to be summed over parts; 0 behind the row's end.
    """
    batch, length, heads, head_dim = x.shape
    groups, d_state = b.shape[2:]
    chunks, size = log2_decay.shape[2:]
    config = launch_config(head_dim, d_state, x.element_size()) | (config or {})
    rows, columns = min(config["block_m"], size), min(config["block_n"], d_state)
    query = torch.empty((d_state // columns, *log2_decay.shape), dtype=torch.float32, device=x.device)
    views = (dy, x, b, c, db, dc)
    unit = stride_unit(*views)
    arguments = (
        *(dy, x, b, c, dt, log2_decay, states, dstates, dscores, seq_idx, db, dc, query),
        *(length, chunks, heads, groups, dscores.stride(0), query.stride(0)),
        *(stride // unit for view in views for stride in view.stride()[:2]),
    )
    programs = batch * chunks * groups * (size // rows) * (d_state // columns)
    shape = (size, head_dim, d_state, rows, columns, dscores.shape[0], seq_idx is not None)
    options = (unit, config["num_warps"], config["num_stages"], config["maxnreg"])
    if config["one_launch"]:
        _kernel(*shape, 2, *options)((programs, 2), *arguments)
    else:
        for side in (0, 1):
            _kernel(*shape, side, *options)((programs,), *arguments)
    return query


def launch_config(head_dim: int, d_state: int, itemsize: int) -> dict[str, Any]:
    """How `group_gradients` runs where its `config` does not say otherwise.

    Args:
        head_dim: P.
        d_state: N.
        itemsize: Bytes of an element of x.

    Returns:
        block_m (tokens) and block_n (of N) of a tile, powers of two of at least 16, cut to L and N; num_warps,
        num_stages and maxnreg (None: as many registers as there are) of Triton; one_launch, False for a launch for
        each of the two gradients.
    """
    config = {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 3, "maxnreg": None, "one_launch": True}
    if itemsize > 2:
        return config | {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 2}
    if head_dim * d_state > 64 * 256:
        return config | {"num_stages": 2}
    return config | {"block_n": 256}  # each byte is read once


@cache
def _kernel(
    size: int, head_dim: int, d_state: int, rows: int, columns: int, splits: int, documents: bool, side: int,
    unit: int, num_warps: int, num_stages: int, maxnreg: int | None,
) -> FastLaunch:  # fmt: skip
    return FastLaunch(
        _group_gradients_kernel, L=size, P=head_dim, N=d_state, BM=rows, BN=columns, BK=min(rows, _INNER),
        SPLITS=splits, HAS_SEQ_IDX=documents, SIDE=side, UNIT=unit,
        num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg,
    )  # fmt: skip
