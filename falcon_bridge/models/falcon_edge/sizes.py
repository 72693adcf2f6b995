"""The released sizes of Falcon-Edge as providers.

Widths and depths are those of the published models. RoPE base, norm epsilon and context are choices for training from
scratch: for a released checkpoint `AutoBridge` takes them, as everything else, from its config.
"""

from dataclasses import dataclass

from falcon_bridge.models.falcon_edge.provider import FalconEdgeModelProvider


@dataclass
class FalconEdgeModelProvider1B(FalconEdgeModelProvider):
    """Shape of Falcon-E-1B (1,719,764,992 parameters)."""

    num_layers: int = 24
    hidden_size: int = 2048
    num_attention_heads: int = 16
    num_query_groups: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 9216
    vocab_size: int = 32768
    max_position_embeddings: int = 32768


@dataclass
class FalconEdgeModelProvider3B(FalconEdgeModelProvider):
    """Shape of Falcon-E-3B (3,053,586,432 parameters)."""

    num_layers: int = 32
    hidden_size: int = 2048
    num_attention_heads: int = 16
    num_query_groups: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 13312
    vocab_size: int = 32768
    max_position_embeddings: int = 32768
