"""Floating-point operations of a Falcon-H1 training step, counted from its shapes."""

from falcon_bridge.models.falcon_h1.pattern import ATTENTION, MAMBA, MLP, PARALLEL


def falcon_h1_flops(
    config, batch_size: int, seqlen_sum: int | None = None, seqlen_squared_sum: int | None = None
) -> int:
    """FLOPs of forward and backward over a batch; a multiply-add counts two, the backward twice the forward.

    Counted are the matrix products: projections, causal attention (half of the square), the chunked scan in the form
    that the kernels compute (chunk-local scores, their product with the inputs, chunk states and their readout),
    the convolution and the logits. Norms, activations and the optimizer are not.

    Args:
        config: A `FalconH1ModelProvider`.
        batch_size: Rows of the global batch.
        seqlen_sum: Tokens of the batch; `batch_size·seq_length` where None.
        seqlen_squared_sum: Sum over documents of their squared lengths; where None each row is one document.

    Returns:
        The number of operations.
    """
    tokens = batch_size * config.seq_length if seqlen_sum is None else seqlen_sum
    squares = tokens**2 / max(batch_size, 1) if seqlen_squared_sum is None else seqlen_squared_sum
    pattern = config.resolve_layer_pattern()
    attention_layers = sum(symbol in (PARALLEL, ATTENTION) for symbol in pattern)
    mamba_layers = sum(symbol in (PARALLEL, MAMBA) for symbol in pattern)
    mlp_layers = sum(symbol in (PARALLEL, MLP) for symbol in pattern)
    multiply_adds = (
        attention_layers * _attention(config, tokens, squares)
        + mamba_layers * _mamba(config, tokens)
        + mlp_layers * 3 * tokens * config.hidden_size * config.ffn_hidden_size
        + tokens * config.hidden_size * config.vocab_size
    )
    return int(3 * 2 * multiply_adds)


def _attention(config, tokens: float, squares: float) -> float:
    if not config.num_attention_heads:
        return 0
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    groups = config.num_query_groups or config.num_attention_heads
    width = config.num_attention_heads * head_dim
    projections = tokens * config.hidden_size * (2 * width + 2 * groups * head_dim)
    # scores and their product with the values, over the causal half
    return projections + squares / 2 * width * 2


def _mamba(config, tokens: float) -> float:
    if not config.mamba_num_heads:
        return 0
    width, heads, chunk = config.d_ssm, config.mamba_num_heads, config.chunk_size
    bc = 2 * config.mamba_num_groups * config.mamba_state_dim
    projections = tokens * config.hidden_size * (2 * width + bc + heads + width)
    conv = tokens * (width + bc) * config.conv_kernel
    # per chunk: C·B a group, the masked scores times x a head, the chunk's state and its readout a head
    scan = tokens * (chunk * bc / 2 + chunk * width + 2 * width * config.mamba_state_dim)
    return projections + conv + scan
