from collections.abc import Iterator
from typing import Literal

import torch
from torch.autograd.function import once_differentiable

from falcon_bridge.ops.documents import check_seq_idx, document_numbers


# Elements of x worked on at once, so that the passes over them stay in a core's cache.
_BLOCK_ELEMENTS = 1 << 17


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    seq_idx: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Depthwise causal convolution with an optional SiLU, the short convolution in front of Mamba-2's SSD.

    ``y[t] = act(bias + Σ_j weight[:, j] · x[t - k + 1 + j])``. Autograd keeps x, not the sum before the activation.
    Sums accumulate in float32, or in float64 if an input is float64. Once differentiable.

    Args:
        x: ``[b, l, d]``.
        weight: ``[d, k]``, the last tap on the token itself (``nn.Conv1d``'s ``[d, 1, k]`` without its middle).
        bias: ``[d]``.
        activation: "silu" or None.
        seq_idx: integers ``[b, l]``; wherever they change along ``l`` a new document starts, and taps that reach into
            an earlier document read zero.
        initial_state: ``[b, k - 1, d]``, the inputs before the first token and of that token's document; zero if None.

    Returns:
        ``[b, l, d]`` in x's dtype.

    Raises:
        ValueError: shapes do not fit together, or the activation is unknown.
    """
    _check(x, weight, bias, activation, seq_idx, initial_state)
    documents = None if seq_idx is None else document_numbers(seq_idx)
    return _CausalConv1d.apply(x, weight, bias, initial_state, documents, activation == "silu")


def causal_conv1d_final_state(
    x: torch.Tensor, k: int, initial_state: torch.Tensor | None = None, *, seq_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the last ``k - 1`` inputs, the ``initial_state`` with which causal_conv1d goes on after x.

    Args:
        x: ``[b, l, d]``.
        k: number of taps.
        initial_state: ``[b, k - 1, d]``, the inputs before x, which reach into the result if ``l < k - 1``.
        seq_idx: integers ``[b, l]``; inputs of another document than the last token's become zero.

    Returns:
        ``[b, k - 1, d]`` in x's dtype.

    Raises:
        ValueError: shapes do not fit together.
    """
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must be [b, l, d] with no empty dimension, got {list(x.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    b, length, d = x.shape
    if initial_state is None:
        initial_state = x.new_zeros(b, k - 1, d)
    elif initial_state.shape != (b, k - 1, d):
        raise ValueError(f"initial_state must be [b, k - 1, d] = {[b, k - 1, d]}, got {list(initial_state.shape)}")
    state = torch.cat([initial_state.to(x.dtype), x[:, max(length - k + 1, 0) :]], dim=1)[:, -(k - 1) :]
    if seq_idx is None:
        return state
    check_seq_idx(seq_idx, b, length)
    documents = document_numbers(seq_idx)
    documents = torch.cat([documents[:, :1].expand(-1, k - 1), documents], dim=1)
    return state.masked_fill((documents[:, documents.shape[1] - (k - 1) :] != documents[:, -1:])[..., None], 0)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, documents, silu):
        ctx.save_for_backward(x, weight, bias, initial_state, documents)
        ctx.silu = silu
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        taps, bias = _parameters(x, weight, bias, initial_state)
        for start, stop in _spans(x):
            total = _weighted_sum(_taps(x, initial_state, documents, start, stop, taps), taps, bias)
            y[:, start:stop] = torch.nn.functional.silu(total, inplace=True) if silu else total
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, initial_state, documents = ctx.saved_tensors
        taps, wide_bias = _parameters(x, weight, bias, initial_state)
        k = len(taps)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dtaps, dbias = torch.zeros_like(taps), torch.zeros_like(taps[0])
        # gradient of the k - 1 inputs before a block, handed to the block before
        carried = taps.new_zeros(x.shape[0], k - 1, x.shape[2])
        for start, stop in reversed(list(_spans(x))):
            inputs = list(_taps(x, initial_state, documents, start, stop, taps))
            grad = dy[:, start:stop].to(taps.dtype)
            if ctx.silu:
                grad = torch.ops.aten.silu_backward(grad, _weighted_sum(inputs, taps, wide_bias))
            dinputs = torch.cat([torch.zeros_like(carried), grad * taps[-1]], dim=1)
            dinputs[:, dinputs.shape[1] - (k - 1) :] += carried
            for j, rows in enumerate(inputs):
                dtaps[j] += (rows * grad).sum((0, 1))
                if j < k - 1:
                    masked = grad if documents is None else grad * _reaches(documents, start, stop, k - 1 - j)
                    dinputs[:, j : j + stop - start].addcmul_(masked, taps[j])
            dbias += grad.sum((0, 1))
            dx[:, start:stop] = dinputs[:, k - 1 :]
            carried = dinputs[:, : k - 1].clone()
        return (
            dx,
            dtaps.T.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None if initial_state is None else carried.to(initial_state.dtype),
            None,
            None,
        )


def _spans(x: torch.Tensor) -> Iterator[tuple[int, int]]:
    b, length, d = x.shape
    step = max(1, _BLOCK_ELEMENTS // (b * d))
    return ((start, min(start + step, length)) for start in range(0, length, step))


def _parameters(x, weight, bias, initial_state) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the taps ``[k, d]`` and the bias in the accumulation dtype."""
    given = [tensor.dtype for tensor in (x, weight, bias, initial_state) if tensor is not None]
    dtype = torch.float64 if torch.float64 in given else torch.float32
    return weight.T.to(dtype).contiguous(), None if bias is None else bias.to(dtype)


def _taps(x, initial_state, documents, start: int, stop: int, taps) -> Iterator[torch.Tensor]:
    """Yield what each tap reads for the tokens from start to stop: ``[b, stop - start, d]``, first tap first."""
    k = len(taps)
    rows = x[:, max(start - k + 1, 0) : stop].to(taps.dtype)
    missing = k - 1 - min(start, k - 1)
    if missing:
        before = (
            rows.new_zeros(x.shape[0], k - 1, x.shape[2]) if initial_state is None else initial_state.to(taps.dtype)
        )
        rows = torch.cat([before[:, k - 1 - missing :], rows], dim=1)
    for j in range(k):
        read = rows[:, j : j + stop - start]
        yield read if documents is None or j == k - 1 else read * _reaches(documents, start, stop, k - 1 - j)


def _reaches(documents: torch.Tensor, start: int, stop: int, distance: int) -> torch.Tensor:
    """Where the token ``distance`` back is of the same document: bool ``[b, stop - start, 1]``."""
    positions = torch.arange(start - distance, stop - distance, device=documents.device).clamp_(min=0)
    return (documents[:, start:stop] == documents[:, positions])[..., None]


def _weighted_sum(inputs, taps: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    total = None
    for j, rows in enumerate(inputs):
        if total is None:
            total = rows * taps[j] if bias is None else torch.addcmul(bias, rows, taps[j])
        else:
            total.addcmul_(rows, taps[j])
    return total


def _check(x, weight, bias, activation, seq_idx, initial_state) -> None:
    if activation not in ("silu", None):
        raise ValueError(f'activation must be "silu" or None, got {activation!r}')
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must be [b, l, d] with no empty dimension, got {list(x.shape)}")
    b, length, d = x.shape
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] < 1:
        raise ValueError(f"weight must be [d, k] with d={d}, got {list(weight.shape)}")
    k = weight.shape[1]
    for name, tensor, shape in (("bias", bias, [d]), ("initial_state", initial_state, [b, k - 1, d])):
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for x {list(x.shape)}, weight {list(weight.shape)}; got {list(tensor.shape)}"
            )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("initial_state", initial_state)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if seq_idx is not None:
        check_seq_idx(seq_idx, b, length)
