"""Which Hugging Face matrix each row of a fused Megatron weight belongs to.

BitNet has one scale per Hugging Face matrix, so a weight that holds several of them row-wise needs this map: an int64
tensor `[out]` with an id in `0 … num_segments-1` for every row.
"""

import torch


Q, K, V = range(3)
GATE, UP = range(2)


def qkv_row_segments(num_attention_heads: int, num_query_groups: int, head_dim: int) -> torch.Tensor:
    """Rows of Megatron's full `linear_qkv.weight`: for each query group its q heads, then its k, then its v head.

    Contiguous row ranges of it are the maps of tensor-parallel shards, also where a shard ends inside a group (source:
    `merge_qkv_weights` in megatron/bridge/models/conversion/param_mapping.py).

    Args:
        num_attention_heads: Query heads of the whole model.
        num_query_groups: Key/value heads of the whole model.
        head_dim: Rows a head.

    Returns:
        int64 `[(num_attention_heads + 2·num_query_groups)·head_dim]` of `Q`, `K`, `V` (0, 1, 2).

    Raises:
        ValueError: The heads do not divide into the groups.
    """
    if min(num_attention_heads, num_query_groups, head_dim) < 1 or num_attention_heads % num_query_groups:
        raise ValueError(
            f"num_attention_heads ({num_attention_heads}) must be a positive multiple of num_query_groups "
            f"({num_query_groups}), and head_dim ({head_dim}) positive"
        )
    heads = [Q] * (num_attention_heads // num_query_groups) + [K, V]
    return torch.tensor(heads * num_query_groups).repeat_interleave(head_dim)


def gate_up_row_segments(ffn_hidden_size: int) -> torch.Tensor:
    """Rows of Megatron's gated `linear_fc1.weight`: the gate rows, then the up rows.

    Every tensor-parallel rank holds its part of both, so a rank's map is this function of `ffn_hidden_size // tp`,
    not a slice of the full map (source: `GatedMLPMapping` in megatron/bridge/models/conversion/param_mapping.py).

    Args:
        ffn_hidden_size: Gate rows of the weight at hand, which has twice as many rows.

    Returns:
        int64 `[2·ffn_hidden_size]` of `GATE`, `UP` (0, 1).
    """
    return torch.tensor([GATE, UP]).repeat_interleave(ffn_hidden_size)


def check_row_segments(row_segments: torch.Tensor, num_segments: int, out_features: int) -> None:
    """Refuse a map that does not fit a weight.

    The ids themselves are looked at on the CPU only, since on a GPU this would stop the host: call it where the map is
    built, before it moves to the device.

    Args:
        row_segments: The map.
        num_segments: Hugging Face matrices in the weight.
        out_features: Rows of the weight.

    Raises:
        ValueError: With one line that says what does not fit.
    """
    if row_segments.dtype not in (torch.int32, torch.int64) or list(row_segments.shape) != [out_features]:
        raise ValueError(
            f"row_segments must be int32 or int64 [{out_features}], one id a row of the weight; got "
            f"{row_segments.dtype} {list(row_segments.shape)}"
        )
    if row_segments.device.type == "cpu" and row_segments.numel():
        lowest, highest = (int(bound) for bound in row_segments.aminmax())
        if lowest < 0 or highest >= num_segments:
            raise ValueError(
                f"row_segments must lie in 0 … {num_segments - 1} for {num_segments} segments; got ids from {lowest} "
                f"to {highest}"
            )


def check_weight(W: torch.Tensor, row_segments: torch.Tensor | None, num_segments: int) -> None:
    """Refuse a weight that is no floating-point matrix `[out, in]`, or a map that does not fit it.

    Args:
        W: The weight.
        row_segments: The map, or None where the weight is one matrix.
        num_segments: Hugging Face matrices in the weight.

    Raises:
        ValueError: With one line that says what does not fit.
    """
    if W.dim() != 2 or not W.is_floating_point():
        raise ValueError(f"W must be a floating-point matrix [out, in], got {W.dtype} {list(W.shape)}")
    if row_segments is not None:
        check_row_segments(row_segments, num_segments, W.shape[0])
    elif num_segments != 1:
        raise ValueError(f"a weight of {num_segments} segments needs row_segments, the segment of each row")
