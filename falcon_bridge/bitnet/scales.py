"""The statistics behind BitNet b1.58's scales, in a form that adds up over shards.

A weight's scale needs the mean over the whole Hugging Face matrix, an activation's the maximum over the whole row.
What a rank has is a shard, so each statistic comes in two steps: a local one whose results combine over ranks with one
all-reduce (`abs_sums`: sum; `token_absmax`: max), and the scale of the combined statistic. `abs_sums` of all layers
concatenate into a single vector.

A NaN or infinity makes the scale NaN, so that it reaches every output that depends on it although int8 codes cannot
hold it. Nothing here waits for the device.
"""

import torch

from falcon_bridge.bitnet.segments import check_weight


FLOOR = 1e-5
"""The least mean and the least maximum that a scale is computed from; keeps all-zero matrices and rows at zero."""


@torch.no_grad()
def abs_sums(
    W_local: torch.Tensor,
    row_segments: torch.Tensor | None = None,
    num_segments: int = 1,
    counted_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of |W| for each Hugging Face matrix of a shard.

    Accumulated in fp64, without atomics: sums over any sharding differ by about 1e-16 of their value, 1e-9 of the
    fp32 spacing of the scales made from them.

    Args:
        W_local: `[out, in]`, any floating dtype; a shard of rows, of columns or of both.
        row_segments: Integers `[out]`, the matrix each row belongs to; None where the weight is one matrix.
        num_segments: Matrices in the weight.
        counted_rows: bool `[out]`, False for rows that another rank counts already (replicated ones); None for all.

    Returns:
        fp64 `[num_segments]`; 0 where the shard has no row of a matrix.

    Raises:
        ValueError: The weight is not a floating-point matrix, or the map does not fit it.
    """
    check_weight(W_local, row_segments, num_segments)
    return sum_by_segment(abs_row_sums(W_local), row_segments, num_segments, counted_rows)


def abs_row_sums(W_local: torch.Tensor) -> torch.Tensor:
    """Sums of |W| over each row of `[out, in]`, fp64 `[out]`."""
    return W_local.abs().sum(dim=1, dtype=torch.float64)


@torch.no_grad()
def element_counts(
    W_local: torch.Tensor,
    row_segments: torch.Tensor | None = None,
    num_segments: int = 1,
    counted_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Number of elements for each Hugging Face matrix of a shard: the counterpart of `abs_sums`, with its arguments.

    Reads only W_local's shape, and does not change in training.

    Returns:
        fp64 `[num_segments]`, so that it travels in the same vector as the sums; exact.
    """
    check_weight(W_local, row_segments, num_segments)
    out_features, in_features = W_local.shape
    row_counts = torch.full((out_features,), in_features, dtype=torch.float64, device=W_local.device)
    return sum_by_segment(row_counts, row_segments, num_segments, counted_rows)


def scales_from(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Weight scales ``s = 1 / max(mean|W|, 1e-5)``.

    Args:
        sums: fp64 of any shape: `abs_sums`, added up over all shards of a matrix.
        counts: fp64 of the same shape: `element_counts`, added up likewise.

    Returns:
        fp32 of the same shape; NaN where a weight is NaN or infinite, or there is none.
    """
    return 1.0 / _nan_unless_finite((sums / counts).float()).clamp(min=FLOOR)


@torch.no_grad()
def token_absmax(x_local: torch.Tensor) -> torch.Tensor:
    """Maximum of |x| over the last dimension: what ranks that hold parts of a row combine by their maximum.

    Args:
        x_local: `[..., k]`, any floating dtype, k > 0.

    Returns:
        fp32 `[..., 1]`; infinite or NaN where the row is. An all-reduce may drop another rank's NaN from a maximum:
        `reference.quantize_activation` therefore looks at its own part of the row as well.
    """
    return x_local.abs().amax(dim=-1, keepdim=True).float()


def activation_scale(absmax: torch.Tensor) -> torch.Tensor:
    """Activation scales ``a = 127 / max(max|x|, 1e-5)``.

    Args:
        absmax: fp32 of any shape: `token_absmax`, combined over all parts of the row.

    Returns:
        fp32 of the same shape; NaN where `absmax` is NaN or infinite.
    """
    return 127.0 / _nan_unless_finite(absmax).clamp(min=FLOOR)


def _nan_unless_finite(statistic: torch.Tensor) -> torch.Tensor:
    return torch.where(statistic.isfinite(), statistic, torch.nan)


def sum_by_segment(
    row_values: torch.Tensor,
    row_segments: torch.Tensor | None = None,
    num_segments: int = 1,
    counted_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums of values of rows for each Hugging Face matrix, fp64 `[num_segments]`.

    Args:
        row_values: fp64 `[out]`.
        row_segments: Integers `[out]` on its device, the matrix each row belongs to; None where there is one.
        num_segments: Matrices in the weight.
        counted_rows: bool `[out]`, False for rows that are left out; None for all.
    """
    if row_segments is None:
        row_segments = torch.zeros(row_values.shape, dtype=torch.int64, device=row_values.device)
    chosen = row_segments == torch.arange(num_segments, device=row_values.device)[:, None]
    if counted_rows is not None:
        chosen = chosen & counted_rows
    # where, not a product with the mask: NaN · 0 would carry one matrix's NaN into the others
    return torch.where(chosen, row_values, 0.0).sum(dim=1)
