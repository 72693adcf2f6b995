"""Floating-point operations of a Falcon-Edge training step, counted from its shapes."""


def falcon_edge_flops(
    config, batch_size: int, seqlen_sum: int | None = None, seqlen_squared_sum: int | None = None
) -> int:
    """FLOPs of forward and backward over a batch; a multiply-add counts two, the backward twice the forward.

    Counted as `training.flops.falcon_h1_flops` counts: projections, causal attention (half of the square) and the
    logits. A product of codes counts as the dense product it stands for, so that figures with and without BitNet
    compare.

    Args:
        config: A `FalconEdgeModelProvider`.
        batch_size: Rows of the global batch.
        seqlen_sum: Tokens of the batch; `batch_size·seq_length` where None.
        seqlen_squared_sum: Sum over documents of their squared lengths; where None each row is one document.

    Returns:
        The number of operations.
    """
    tokens = batch_size * config.seq_length if seqlen_sum is None else seqlen_sum
    squares = tokens**2 / max(batch_size, 1) if seqlen_squared_sum is None else seqlen_squared_sum
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    kv_width = (config.num_query_groups or config.num_attention_heads) * head_dim
    weights_of_layer = config.hidden_size * (2 * width + 2 * kv_width + 3 * config.ffn_hidden_size)
    multiply_adds = (
        tokens * (config.num_layers * weights_of_layer + config.hidden_size * config.vocab_size)
        # scores and their product with the values, over the causal half
        + config.num_layers * squares / 2 * width * 2
    )
    return int(3 * 2 * multiply_adds)
