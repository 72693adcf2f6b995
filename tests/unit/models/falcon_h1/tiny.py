"""A provider that is small in every way, for tests of what providers refuse and compute."""

from falcon_bridge import FalconH1ModelProvider


TINY = {
    "num_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 80,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_state_dim": 16,
    "vocab_size": 131,
    "seq_length": 64,
    "transformer_impl": "local",
}


def tiny(**fields):
    """A provider that is not finalized."""
    return FalconH1ModelProvider(**{**TINY, **fields})
