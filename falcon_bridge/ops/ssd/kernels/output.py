"""Triton kernel of the SSD scan's output: what reaches a chunk's tokens from its own tokens and from its state.

A program takes a block of a chunk's rows and a block of a group's heads. C·Bᵀ, which the heads share, and its mask of
causality and documents are computed once and stay in registers; each head then costs two matrix products, and one
exponential for each pair of tokens.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from falcon_bridge.ops.launch import FastLaunch, stride_unit


# heads that a program takes: fewer give more programs, more pay less for C·Bᵀ, which costs as much as one or two heads
_HEADS = (24, 12, 8, 6, 4)
# that many programs at least: an H100 runs one or two on each of 132 processors at once
_PROGRAMS = 256


@triton.jit
def _row_block_outputs(
    x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, states_ptr, d_ptr, doc_ptr, out_ptr,
    left, entering, head, end_head, per_head, x_s, b_s, c_s, out_s,
    FIRST: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows FIRST to FIRST + BLOCK_M of a chunk, where FIRST is 0 or BLOCK_M.

    The pointers are those of the chunk's first token and, of what has heads, of the row's first head; `left` tokens of
    the row are left from there on. Pairs of a row i and a column j before the block need no exponential each: with r
    the row in front of the block, 2^(a_i - a_j) is 2^(a_i - a_r)·2^(a_r - a_j), neither of which is above 1.
    """
    rows, p, n = FIRST + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P), tl.arange(0, N)
    tokens = tl.minimum(rows, left - 1)  # behind the row's end its last token again: there dt is 0, nothing is written
    c_rows = c_ptr + tokens[:, None] * c_s * UNIT
    b_rows = b_ptr + tokens[:, None] * b_s * UNIT
    scores = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
    if FIRST > 0:
        before = tl.arange(0, FIRST)
        b_before = b_ptr + before[:, None] * b_s * UNIT
        offsets_before = before[:, None] * x_s * UNIT + p[None, :]
        scores_before = tl.zeros((BLOCK_M, FIRST), dtype=tl.float32)
    for start in range(0, N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        c_part = tl.load(c_rows + k[None, :])
        scores = tl.dot(c_part, tl.trans(tl.load(b_rows + k[None, :])), scores)
        if FIRST > 0:
            scores_before = tl.dot(c_part, tl.trans(tl.load(b_before + k[None, :])), scores_before)
    seen = rows[:, None] >= rows[None, :]
    if HAS_SEQ_IDX:
        documents = tl.load(doc_ptr + tokens)
        seen &= documents[:, None] == tl.load(doc_ptr + tokens)[None, :]
        enters = documents == entering
        if FIRST > 0:
            scores_before = tl.where(documents[:, None] == tl.load(doc_ptr + before)[None, :], scores_before, 0.0)
    scores = tl.where(seen, scores, 0.0)

    c = tl.load(c_rows + n[None, :])
    # offsets, not pointers, which would take twice as many registers
    x_offsets = tokens[:, None] * x_s * UNIT + p[None, :]
    state_offsets = p[:, None] * N + n[None, :]
    out_offsets = rows[:, None] * out_s * UNIT + p[None, :]
    for h in range(head, end_head):
        decay_head, dt_head = decay_ptr + h * per_head, dt_ptr + h * per_head
        decay, dt = tl.load(decay_head + rows), tl.load(dt_head + rows)
        state, x = tl.load(states_ptr + h * (P * N) + state_offsets), tl.load(x_ptr + h * P + x_offsets)
        if FIRST > 0:
            reference = tl.load(decay_head + FIRST - 1)
            factor = tl.exp2(reference - tl.load(decay_head + before)) * tl.load(dt_head + before)
            earlier = tl.load(x_ptr + h * P + offsets_before)
            carried = tl.full((BLOCK_M,), 1.0, tl.float32) * tl.exp2(reference)
        else:
            carried = tl.exp2(decay)
        if HAS_SEQ_IDX:
            carried = tl.where(enters, carried, 0.0)
        acc = tl.dot(c, tl.trans(state)) * carried[:, None]
        if FIRST > 0:
            acc = tl.dot((scores_before * factor[None, :]).to(x.dtype), earlier, acc)
            acc *= tl.exp2(decay - reference)[:, None]
        # of the pairs that are not seen some would overflow without the bound; their score is 0
        weights = tl.exp2(tl.minimum(decay[:, None] - decay[None, :], 0.0)) * dt[None, :]
        acc = tl.dot((scores * weights).to(x.dtype), x, acc)
        acc += x.to(tl.float32) * tl.load(d_ptr + h)
        tl.store(out_ptr + h * P + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=(rows < left)[:, None])


@triton.jit
def _chunk_outputs_kernel(
    x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, states_ptr, d_ptr, doc_ptr, out_ptr,
    S, BATCH, CHUNKS, GROUPS, GROUP_HEADS, BLOCK_HEADS, x_b, x_s, b_b, b_s, c_b, c_s, out_b, out_s,
    HAS_SEQ_IDX: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Programs that read the same memory run side by side, and the chunks whose states were written last run first."""
    row_blocks: tl.constexpr = L // BLOCK_M
    p_blocks: tl.constexpr = P // BLOCK_P
    index = tl.program_id(0)
    row_block, index = index % row_blocks, index // row_blocks
    first_p, index = index % p_blocks * BLOCK_P, index // p_blocks
    head_blocks = tl.cdiv(GROUP_HEADS, BLOCK_HEADS)
    first_head, index = index % head_blocks * BLOCK_HEADS, index // head_blocks
    group, index = index % GROUPS, index // GROUPS
    batch, chunk = (index % BATCH).to(tl.int64), CHUNKS - 1 - (index // BATCH).to(tl.int64)
    head = group * GROUP_HEADS + first_head
    end_head = head + tl.minimum(BLOCK_HEADS, GROUP_HEADS - first_head)

    token, heads, per_head = chunk * L, GROUPS * GROUP_HEADS, CHUNKS * L
    left = (S - token).to(tl.int32)
    x_ptr += (batch * x_b + token * x_s) * UNIT + first_p
    out_ptr += (batch * out_b + token * out_s) * UNIT + first_p
    b_ptr += (batch * b_b + token * b_s) * UNIT + group * N
    c_ptr += (batch * c_b + token * c_s) * UNIT + group * N
    dt_ptr += batch * heads * per_head + token
    decay_ptr += batch * heads * per_head + token
    states_ptr += (batch * CHUNKS + chunk) * heads * (P * N) + first_p * N
    entering = 0
    if HAS_SEQ_IDX:
        doc_ptr += batch * S + token
        entering = tl.load(doc_ptr - tl.where(chunk > 0, 1, 0))
    for block in tl.static_range(row_blocks):
        if (row_block == block) & (block * BLOCK_M < left):
            _row_block_outputs(
                x_ptr, b_ptr, c_ptr, dt_ptr, decay_ptr, states_ptr, d_ptr, doc_ptr, out_ptr,
                left, entering, head, end_head, per_head, x_s, b_s, c_s, out_s,
                block * BLOCK_M, P, N, HAS_SEQ_IDX, BLOCK_M, BLOCK_P, BLOCK_K, UNIT,
            )  # fmt: skip


def chunk_outputs(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    dt: torch.Tensor,
    log2_decay: torch.Tensor,
    states: torch.Tensor,
    d: torch.Tensor,
    seq_idx: torch.Tensor | None,
    out: torch.Tensor,
    *,
    config: dict[str, int | None] | None = None,
) -> torch.Tensor:
    """The scan's result from the states that enter its chunks (arXiv 2405.21060, section 6).

    y_i = D·x_i + Σ_{j ≤ i} (C_i·B_j)·2^(a_i - a_j)·dt_j·x_j + 2^(a_i)·S·C_i, with a `log2_decay` and S the chunk's
    state; the sum over tokens of i's document, the last term where it reaches back into the chunk before.

    Args:
        x: `[b, s, heads, head_dim]`, contiguous over the last two dimensions.
        b: `[b, s, groups, d_state]`, contiguous over the last two dimensions, in x's dtype.
        c: As b.
        dt: Step sizes, fp32 `[b, heads, chunks, chunk]`, contiguous; 0 behind the row's end.
        log2_decay: Sum of the chunk's log2 decays up to and with each token, as dt.
        states: `[b, chunks, heads, head_dim, d_state]`, contiguous, in x's dtype.
        d: Weights of the skip connection, fp32 `[heads]`.
        seq_idx: Documents of the tokens, int32 `[b, s]`, contiguous; None for one.
        out: Where to write the result, as x.
        config: In place of parts of the launch configuration for these sizes: heads (a program), block_m (rows, the
            chunk or half of it), block_p (of head_dim), block_k (of d_state, for C·Bᵀ), num_warps, num_stages and
            maxnreg.

    Returns:
        `out`.

    Raises:
        ValueError: If block_m is neither the chunk nor half of it.
    """
    batch, length, heads, head_dim = x.shape
    groups, d_state = b.shape[2:]
    chunks, chunk = log2_decay.shape[2:]
    chosen = {**_configuration(head_dim, d_state, chunk, x.element_size()), **(config or {})}
    programs = chunk // chosen["block_m"] * (head_dim // chosen["block_p"]) * groups * batch * chunks
    block_heads = chosen.pop("heads", None) or _heads(heads // groups, programs)
    unit = stride_unit(x, b, c, out)
    strides = [t.stride(dim) // unit for t in (x, b, c, out) for dim in (0, 1)]
    launch = _launch(seq_idx is not None, chunk, head_dim, d_state, unit, **chosen)
    launch(
        (programs * triton.cdiv(heads // groups, block_heads),),
        *(x, b, c, dt, log2_decay, states, d, seq_idx, out),
        *(length, batch, chunks, groups, heads // groups, block_heads, *strides),
    )
    return out


def _configuration(head_dim: int, d_state: int, chunk: int, itemsize: int) -> dict[str, int | None]:
    """Timed by `benchmarks/ssd_gpu.py` for two bytes an element: loads two heads ahead, before more programs."""
    most_p = 64 if itemsize == 2 else 32 if d_state <= 128 else 16
    block_m = max(min(chunk, 64), chunk // 2)
    return {
        "block_m": block_m,
        "block_p": min(head_dim, most_p),
        "block_k": min(d_state, 64),
        "num_warps": 4 if block_m <= 64 else 8,
        "num_stages": 3 if itemsize == 2 and block_m <= 64 else 1,
        "maxnreg": None,
    }


def _heads(group_heads: int, programs: int) -> int:
    """Heads a program takes, where there are `programs` for each block of a group's heads."""
    enough = (heads for heads in _HEADS if programs * triton.cdiv(group_heads, heads) >= _PROGRAMS)
    return min(group_heads, next(enough, _HEADS[-1]))


@cache
def _launch(
    documents: bool,
    chunk: int,
    head_dim: int,
    d_state: int,
    unit: int,
    *,
    block_m: int,
    block_p: int,
    block_k: int,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None,
) -> FastLaunch:
    if block_m not in (chunk, chunk // 2):
        raise ValueError(f"block_m {block_m}: give {chunk} or {chunk // 2}, the scan's chunk or half of it")
    return FastLaunch(
        _chunk_outputs_kernel,
        HAS_SEQ_IDX=documents,
        L=chunk,
        P=head_dim,
        N=d_state,
        BLOCK_M=block_m,
        BLOCK_P=block_p,
        BLOCK_K=block_k,
        UNIT=unit,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg,
    )
