import torch
from torch.autograd.function import once_differentiable

from falcon_bridge.ops.documents import document_numbers
from falcon_bridge.ops.ssd.blocks import SSDBlock, block_spans
from falcon_bridge.ops.ssd.checks import accumulate_dtype, check_ssd_inputs


def ssd_chunked(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    chunk_size: int | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's state-space recurrence by chunks, with a hand-written backward: the training path on CPU.

    The block decomposition of arXiv 2405.21060 §6: matrix products inside a chunk, a recurrence from chunk to chunk.
    Autograd keeps the inputs alone; the backward recomputes chunk states and decays block by block, so memory grows
    linearly in the length. Sums accumulate in float32, or in float64 if an input is float64; cumulated log-decays are
    float64 throughout, so that strong decays lose nothing to cancellation. Once differentiable.

    Args:
        x: ``[b, l, h, p]``, the heads' inputs; any length ≥ 1.
        dt: ``[b, l, h]``, step sizes after bias and softplus, so ≥ 0.
        A: ``[h]``, negative.
        B: ``[b, l, g, n]``; head ``i`` reads group ``i // (h // g)``.
        C: ``[b, l, g, n]``.
        D: ``[h]``, weight of the skip connection.
        chunk_size: tokens per chunk; the result does not depend on it, time and memory do. None takes the size that
            is fastest on CPU for this head and state size.
        initial_states: ``[b, h, p, n]``, the state before the first token and of that token's document; zero if None.
        seq_idx: integers ``[b, l]``; wherever they change along ``l`` a new document starts from the zero state.

    Returns:
        ``y`` ``[b, l, h, p]`` in x's dtype, and the state after the last token ``[b, h, p, n]`` in the accumulation
        dtype.

    Raises:
        ValueError: shapes do not fit together, or chunk_size < 1.
    """
    check_ssd_inputs(x, dt, A, B, C, D, initial_states, seq_idx)
    if chunk_size is None:
        chunk_size = default_chunk_size(x.shape[-1], B.shape[-1])
    elif chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    documents = None if seq_idx is None else document_numbers(seq_idx)
    return _ChunkedSSD.apply(x, dt, A, B, C, D, initial_states, documents, chunk_size)


def default_chunk_size(head_dim: int, state_size: int) -> int:
    """Return the chunk size that balances the two costs of a token on CPU.

    Work inside a chunk grows with its length q, work on states with ``head_dim · state_size / q``; where two sizes
    were as fast in ``benchmarks/ssd_cpu.py sweep``, the larger one, which holds fewer states.
    """
    if head_dim * state_size <= 32 * 64:
        return 32
    return 64 if head_dim * state_size <= 64 * 128 else 128


class _ChunkedSSD(torch.autograd.Function):
    """States inside are ``[b, g, n, r·p]`` (r heads a group), so that a group's heads share one matrix product."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_states, documents, chunk_size):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D, initial_states, documents)
        ctx.chunk_size = chunk_size
        dtype = accumulate_dtype(x, dt, A, B, C, D, initial_states)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            state = _internal_states(initial_states, x, B, dtype)
            for span in block_spans(x, B.shape[-1], chunk_size):
                block = SSDBlock(span, x, dt, A, B, documents, dtype)
                entering, state = block.scan_states(state)
                y[:, span.start : span.stop] = block.outputs(C, D, entering)
        return y, _public_states(state, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, initial_states, documents = ctx.saved_tensors
        dtype = accumulate_dtype(x, dt, A, B, C, D, initial_states)
        dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        dA = torch.zeros(A.shape, dtype=torch.float64, device=A.device)
        dD = None if D is None else torch.zeros(D.shape, dtype=torch.float64, device=D.device)
        if dy is None:
            dy = torch.zeros((), dtype=dtype, device=x.device).expand(x.shape)
        spans = block_spans(x, B.shape[-1], ctx.chunk_size)
        with torch.autocast(x.device.type, enabled=False):
            state = _internal_states(initial_states, x, B, dtype)
            entering = []
            for span in spans:
                block = SSDBlock(span, x, dt, A, B, documents, dtype)
                states, state = block.scan_states(state)
                entering.append(states)
            dstate = _internal_states(dfinal, x, B, dtype)
            for span in reversed(spans):
                block = SSDBlock(span, x, dt, A, B, documents, dtype)
                rows = slice(span.start, span.stop)
                grads = block.gradients(C, D, entering.pop(), dy, dstate)
                dx[:, rows], ddt[:, rows], dB[:, rows], dC[:, rows] = grads.x, grads.dt, grads.B, grads.C
                dA += grads.A
                if D is not None:
                    dD += grads.D
                dstate = grads.state
        dinitial = None if initial_states is None else _public_states(dstate, x).to(initial_states.dtype)
        return dx, ddt, dA.to(A.dtype), dB, dC, None if D is None else dD.to(D.dtype), dinitial, None, None


def _internal_states(
    states: torch.Tensor | None, x: torch.Tensor, B: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``[b, h, p, n]`` (or None for zeros) to ``[b, g, n, r·p]``."""
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    if states is None:
        return torch.zeros(b, g, n, h // g * p, dtype=dtype, device=x.device)
    return states.to(dtype).reshape(b, g, h // g * p, n).transpose(2, 3)


def _public_states(states: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``[b, g, n, r·p]`` to a fresh contiguous ``[b, h, p, n]``."""
    return (
        states.transpose(2, 3)
        .reshape(x.shape[0], *x.shape[2:], states.shape[2])
        .clone(memory_format=torch.contiguous_format)
    )
