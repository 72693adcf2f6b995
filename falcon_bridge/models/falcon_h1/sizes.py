"""The released sizes of Falcon-H1 as providers.

Shapes are those of the published configs; multipliers follow TII's width law (`mup.falcon_h1_multipliers`), which is
what the released 0.5B, 1.5B-Deep, 7B and 34B carry. The released Tiny-90M carries other ones, because its multipliers
were folded into its weights: for that checkpoint `AutoBridge` takes them from its config, as it does for every size.
"""

from dataclasses import dataclass

from falcon_bridge.models.falcon_h1.mup import falcon_h1_multipliers
from falcon_bridge.models.falcon_h1.provider import FalconH1ModelProvider


@dataclass
class _SizedProvider(FalconH1ModelProvider):
    """Sets the multipliers of the class's shape, unless they are given."""

    embedding_multiplier: float | None = None
    lm_head_multiplier: float | None = None
    key_multiplier: float | None = None
    attention_in_multiplier: float | None = None
    attention_out_multiplier: float | None = None
    ssm_in_multiplier: float | None = None
    ssm_out_multiplier: float | None = None
    mlp_multipliers: tuple[float, float] | None = None
    ssm_multipliers: tuple[float, float, float, float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        law = falcon_h1_multipliers(
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            head_dim=self.kv_channels,
            d_ssm=self.d_ssm,
            d_state=self.mamba_state_dim,
        )
        for name, value in law.as_dict().items():
            if getattr(self, name) is None:
                setattr(self, name, value)


@dataclass
class FalconH1ModelProvider90M(_SizedProvider):
    """Shape of Falcon-H1-Tiny-90M."""

    num_layers: int = 24
    hidden_size: int = 512
    num_attention_heads: int = 8
    num_query_groups: int = 2
    kv_channels: int = 64
    ffn_hidden_size: int = 768
    mamba_num_heads: int = 24
    mamba_head_dim: int = 32
    mamba_state_dim: int = 64
    mamba_num_groups: int = 1
    gated_norm: bool = False
    chunk_size: int = 128
    vocab_size: int = 32768
    share_embeddings_and_output_weights: bool = True
    max_position_embeddings: int = 262144


@dataclass
class FalconH1ModelProvider500M(_SizedProvider):
    """Shape of Falcon-H1-0.5B."""

    num_layers: int = 36
    hidden_size: int = 1024
    num_attention_heads: int = 8
    num_query_groups: int = 2
    kv_channels: int = 64
    ffn_hidden_size: int = 2048
    mamba_num_heads: int = 24
    mamba_head_dim: int = 64
    mamba_state_dim: int = 128
    mamba_num_groups: int = 1
    gated_norm: bool = False
    chunk_size: int = 128
    vocab_size: int = 32784
    share_embeddings_and_output_weights: bool = False
    max_position_embeddings: int = 16384


@dataclass
class FalconH1ModelProvider1P5B(_SizedProvider):
    """Shape of Falcon-H1-1.5B."""

    num_layers: int = 24
    hidden_size: int = 2048
    num_attention_heads: int = 8
    num_query_groups: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 4608
    mamba_num_heads: int = 48
    mamba_head_dim: int = 64
    mamba_state_dim: int = 256
    mamba_num_groups: int = 1
    gated_norm: bool = True
    chunk_size: int = 128
    vocab_size: int = 65537
    share_embeddings_and_output_weights: bool = False
    max_position_embeddings: int = 131072


@dataclass
class FalconH1ModelProvider1P5BDeep(_SizedProvider):
    """Shape of Falcon-H1-1.5B-Deep."""

    num_layers: int = 66
    hidden_size: int = 1280
    num_attention_heads: int = 6
    num_query_groups: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 3072
    mamba_num_heads: int = 24
    mamba_head_dim: int = 64
    mamba_state_dim: int = 256
    mamba_num_groups: int = 1
    gated_norm: bool = True
    chunk_size: int = 128
    vocab_size: int = 65537
    share_embeddings_and_output_weights: bool = False
    max_position_embeddings: int = 131072


@dataclass
class FalconH1ModelProvider3B(_SizedProvider):
    """Shape of Falcon-H1-3B."""

    num_layers: int = 32
    hidden_size: int = 2560
    num_attention_heads: int = 10
    num_query_groups: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 6144
    mamba_num_heads: int = 32
    mamba_head_dim: int = 128
    mamba_state_dim: int = 256
    mamba_num_groups: int = 1
    gated_norm: bool = True
    chunk_size: int = 128
    vocab_size: int = 65537
    share_embeddings_and_output_weights: bool = False
    max_position_embeddings: int = 131072


@dataclass
class FalconH1ModelProvider7B(_SizedProvider):
    """Shape of Falcon-H1-7B."""

    num_layers: int = 44
    hidden_size: int = 3072
    num_attention_heads: int = 12
    num_query_groups: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 12288
    mamba_num_heads: int = 24
    mamba_head_dim: int = 128
    mamba_state_dim: int = 256
    mamba_num_groups: int = 1
    gated_norm: bool = True
    chunk_size: int = 256
    vocab_size: int = 130049
    share_embeddings_and_output_weights: bool = False
    max_position_embeddings: int = 262144


@dataclass
class FalconH1ModelProvider34B(_SizedProvider):
    """Shape of Falcon-H1-34B."""

    num_layers: int = 72
    hidden_size: int = 5120
    num_attention_heads: int = 20
    num_query_groups: int = 4
    kv_channels: int = 128
    ffn_hidden_size: int = 21504
    mamba_num_heads: int = 32
    mamba_head_dim: int = 128
    mamba_state_dim: int = 256
    mamba_num_groups: int = 2
    gated_norm: bool = True
    chunk_size: int = 128
    vocab_size: int = 261120
    share_embeddings_and_output_weights: bool = False
    max_position_embeddings: int = 262144
