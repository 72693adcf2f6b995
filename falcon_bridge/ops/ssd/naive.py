import torch

from falcon_bridge.ops.ssd.checks import accumulate_dtype, check_ssd_inputs


def ssd_recurrent(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's state-space recurrence, one token after the other: the oracle of every faster version.

    ``S_t = exp(dt_t A) S_{t-1} + dt_t x_t ⊗ B_t`` and ``y_t = S_t C_t + D x_t`` (arXiv 2405.21060, §2 and §5).

    Args:
        x: ``[b, l, h, p]``, the heads' inputs.
        dt: ``[b, l, h]``, step sizes after bias and softplus, so ≥ 0.
        A: ``[h]``, negative.
        B: ``[b, l, g, n]``; head ``i`` reads group ``i // (h // g)``.
        C: ``[b, l, g, n]``.
        D: ``[h]``, weight of the skip connection.
        initial_states: ``[b, h, p, n]``, the state before the first token and of that token's document; zero if None.
        seq_idx: integers ``[b, l]``; wherever they change along ``l`` a new document starts from the zero state.

    Returns:
        ``y`` ``[b, l, h, p]`` in x's dtype, and the state after the last token ``[b, h, p, n]`` in float64 if an input
        is float64, else float32.

    Raises:
        ValueError: shapes do not fit together.
    """
    check_ssd_inputs(x, dt, A, B, C, D, initial_states, seq_idx)
    dtype = accumulate_dtype(x, dt, A, B, C, D, initial_states)
    xs, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (tensor.repeat_interleave(heads_per_group, dim=2) for tensor in (B, C))

    if initial_states is None:
        state = xs.new_zeros(*xs[:, 0].shape, B.shape[-1])
    else:
        state = initial_states.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            starts = seq_idx[:, t] != seq_idx[:, t - 1]
            state = state.masked_fill(starts[:, None, None, None], 0)
        decay = torch.exp(dt[:, t] * A)
        update = (dt[:, t, :, None] * xs[:, t])[..., None] * B[:, t, :, None, :]
        state = decay[..., None, None] * state + update
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * xs
    return y.to(x.dtype), state
