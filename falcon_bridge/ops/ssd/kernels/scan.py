"""Mamba-2's SSD scan, forward and backward, by the Triton kernels of this package.

Forward: step sizes and decays, the state entering each chunk, the outputs. Backward: the same steps and states again,
the gradients of the states, then those of x (with all that x's products tell about steps and decays), of B and C, and
of the step sizes. Each of the six larger kernels reads its inputs once; what passes between them are states and their
gradients in the model's dtype, the gradient of C·B, and fp32 numbers a token and head. There are no atomics, so a
result is the same in every run. `tests/unit/ops/ssd_terms.py` has the formulas, written out.
"""

import torch

from falcon_bridge.ops.ssd.kernels.decay import step_decay, step_gradients
from falcon_bridge.ops.ssd.kernels.group_gradients import group_gradients
from falcon_bridge.ops.ssd.kernels.input_gradients import input_gradients
from falcon_bridge.ops.ssd.kernels.output import chunk_outputs
from falcon_bridge.ops.ssd.kernels.states import chunk_state_gradients, chunk_states


def scan_forward(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    raw_dt: torch.Tensor,
    dt_scale: float,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    d: torch.Tensor,
    seq_idx: torch.Tensor | None,
    chunk: int,
) -> torch.Tensor:
    """The scan of ``softplus(dt_scale · raw_dt + dt_bias)`` (`ops.ssd.naive.ssd_recurrent`).

    Args:
        x: `[b, s, heads, head_dim]`, contiguous in its last two dimensions, bf16, fp16 or fp32.
        b: `[b, s, groups, d_state]`, contiguous in its last two dimensions, of x's dtype.
        c: As b.
        raw_dt: `[b, s, heads]`, any strides.
        dt_scale: Multiplier of raw_dt.
        dt_bias: `[heads]`, fp32.
        a: `[heads]`, fp32, negative.
        d: `[heads]`, fp32, weight of the skip connection.
        seq_idx: Document of each token, int32 `[b, s]`, contiguous; the state restarts where it changes. No number may
            come back for another document.
        chunk: Tokens a chunk, a power of two from 16 to 256; the result does not depend on it.

    Returns:
        `[b, s, heads, head_dim]`, contiguous, in x's dtype.
    """
    dt, log2_decay = step_decay(raw_dt, dt_scale, dt_bias, a, chunk)
    states = chunk_states(x, b, dt, log2_decay, seq_idx)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return chunk_outputs(x, b, c, dt, log2_decay, states, d, seq_idx, out)


def scan_backward(
    dy: torch.Tensor,
    y: torch.Tensor | None,
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    raw_dt: torch.Tensor,
    dt_scale: float,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    d: torch.Tensor,
    seq_idx: torch.Tensor | None,
    chunk: int,
    *,
    dx: torch.Tensor,
    db: torch.Tensor,
    dc: torch.Tensor,
    draw_dt: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `scan_forward`.

    Args:
        dy: Gradient of the result, as x.
        y: The result; not needed here.
        x: As in the forward pass, like all that follow.
        b: As in the forward pass.
        c: As in the forward pass.
        raw_dt: As in the forward pass.
        dt_scale: As in the forward pass.
        dt_bias: As in the forward pass.
        a: As in the forward pass.
        d: As in the forward pass.
        seq_idx: As in the forward pass.
        chunk: As in the forward pass.
        dx: Where to write x's gradient, as x.
        db: Where to write b's, as b.
        dc: Where to write c's, as c.
        draw_dt: Where to write raw_dt's, as raw_dt.

    Returns:
        Gradients of a, dt_bias and d, fp32 `[heads]` each.
    """
    dt, log2_decay = step_decay(raw_dt, dt_scale, dt_bias, a, chunk)
    states = chunk_states(x, b, dt, log2_decay, seq_idx)
    dstates, decay_grad = chunk_state_gradients(dy, c, log2_decay, states, seq_idx)
    dscores, ddt, pair, key, dd = input_gradients(dy, x, b, c, dt, log2_decay, dstates, d, seq_idx, dx)
    query = group_gradients(dy, x, b, c, dt, log2_decay, states, dstates, dscores, seq_idx, db, dc)
    return step_gradients(
        ddt, pair, key, query, decay_grad, dd, dt, raw_dt, dt_scale, dt_bias, a, draw_dt
    )  # fmt: skip
