"""Floating-point operations of a Falcon-H1 training step, counted from its shapes."""

from collections.abc import Iterator
from typing import Any


# path of a branch within a layer, as adapters are matched against
_PATHS = {"attention": "self_attention.attention", "mamba": "self_attention.mamba_mixer", "mlp": "mlp"}


def falcon_h1_flops(
    config: Any,
    batch_size: int,
    seqlen_sum: int | None = None,
    seqlen_squared_sum: int | None = None,
    *,
    peft: Any | None = None,
) -> int:
    """FLOPs of forward and backward over a batch; a multiply-add counts two, the backward twice the forward.

    Counted are the matrix products: projections, causal attention (half of the square), the chunked scan in the form
    that the kernels compute (chunk-local scores, their product with the inputs, chunk states and their readout),
    the convolution and the logits. Norms, activations and the optimizer are not; nor is what is recomputed.

    With adapters the backward of a frozen weight is as much as its forward (there is no gradient of the weight), and
    the layers below the lowest adapter have none. That lowest layer's input needs no gradient either, which is not
    subtracted (0.6 % of the smallest released model).

    Args:
        config: A `FalconH1ModelProvider`.
        batch_size: Rows of the global batch.
        seqlen_sum: Tokens of the batch; `batch_size·seq_length` where None.
        seqlen_squared_sum: Sum over documents of their squared lengths; where None each row is one document.
        peft: The adapters that are trained, a `peft.LoRA`; where None, those that the built model has got.

    Returns:
        The number of operations.
    """
    tokens = batch_size * config.seq_length if seqlen_sum is None else seqlen_sum
    squares = tokens**2 / max(batch_size, 1) if seqlen_squared_sum is None else seqlen_squared_sum
    peft = peft or getattr(config, "trained_adapters", None)
    layers = [_branches(config, symbol, tokens, squares) for symbol in config.resolve_layer_pattern()]
    if peft is None:
        forward = sum(weights + others for layer in layers for _, weights, others in layer)
        return int(2 * 3 * (forward + tokens * config.hidden_size * config.vocab_size))
    adapters = [list(_adapters(config, peft, number, layer)) for number, layer in enumerate(layers)]
    lowest = next((number for number, ranks in enumerate(adapters) if ranks), len(layers))
    multiply_adds = 2 * tokens * config.hidden_size * config.vocab_size
    for number, layer in enumerate(layers):
        frozen, both = (1, 1) if number < lowest else (2, 3)
        multiply_adds += sum(frozen * weights + both * others for _, weights, others in layer)
        multiply_adds += 3 * tokens * sum(adapters[number])
    return int(2 * multiply_adds)


def _branches(config: Any, symbol: str, tokens: float, squares: float) -> list[tuple[str, float, float]]:
    """Multiply-adds of a layer's forward: branch, products with its weights, products of its activations."""
    # the provider imports this module while Megatron Bridge, and with it falcon_bridge.models, is being imported
    from falcon_bridge.models.falcon_h1.pattern import ATTENTION, MAMBA, MLP, PARALLEL

    others = {}
    if symbol in (PARALLEL, ATTENTION) and config.num_attention_heads:
        others["attention"] = squares * _attention(config)
    if symbol in (PARALLEL, MAMBA) and config.mamba_num_heads:
        others["mamba"] = tokens * _scan(config)
    if symbol in (PARALLEL, MLP):
        others["mlp"] = 0
    weights = {branch: sum(width * out for _, width, out in _linears(config, branch)) for branch in others}
    if "mamba" in weights:
        weights["mamba"] += (config.d_ssm + _bc(config)) * config.conv_kernel
    return [(branch, tokens * weights[branch], others[branch]) for branch in others]


def _linears(config: Any, branch: str) -> Iterator[tuple[str, int, int]]:
    """Name, input and output width of the linear layers of a branch."""
    hidden = config.hidden_size
    if branch == "attention":
        head_dim = config.kv_channels or hidden // config.num_attention_heads
        groups = config.num_query_groups or config.num_attention_heads
        width = config.num_attention_heads * head_dim
        yield "linear_qkv", hidden, width + 2 * groups * head_dim
        yield "linear_proj", width, hidden
    elif branch == "mamba":
        yield "in_proj", hidden, 2 * config.d_ssm + _bc(config) + config.mamba_num_heads
        yield "out_proj", config.d_ssm, hidden
    else:
        yield "linear_fc1", hidden, 2 * config.ffn_hidden_size
        yield "linear_fc2", config.ffn_hidden_size, hidden


def _adapters(config: Any, peft: Any, number: int, layer: list[tuple[str, float, float]]) -> Iterator[int]:
    """Multiply-adds a token of the adapters of a layer."""
    for branch, _, _ in layer:
        for name, width, out in _linears(config, branch):
            if peft.adapts(f"decoder.layers.{number}.{_PATHS[branch]}.{name}"):
                yield peft.dim * (width + out)


def _attention(config: Any) -> float:
    """Per pair of a document's tokens: scores and their product with the values, over the causal half."""
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim


def _scan(config: Any) -> float:
    """Per token: C·B a group, the masked scores times x a head, the chunk's state and its readout a head."""
    width, chunk = config.d_ssm, config.chunk_size
    return chunk * _bc(config) / 2 + chunk * width + 2 * width * config.mamba_state_dim


def _bc(config: Any) -> int:
    return 2 * config.mamba_num_groups * config.mamba_state_dim
