"""Fields that the Hugging Face configs of Falcon-H1 and Falcon-Edge share."""

from typing import Any

import torch


def common_hf_fields(provider: Any) -> dict[str, Any]:
    """What both configs say of a model's attention, MLP, vocabulary and dtype.

    Args:
        provider: A `FalconH1ModelProvider` or a `FalconEdgeModelProvider`, with attention heads.

    Returns:
        Keyword arguments of `FalconH1Config` and `LlamaConfig` alike.
    """
    return {
        "vocab_size": provider.vocab_size,
        "tie_word_embeddings": provider.share_embeddings_and_output_weights,
        "hidden_size": provider.hidden_size,
        "intermediate_size": provider.ffn_hidden_size,
        "num_hidden_layers": provider.num_layers,
        "num_attention_heads": provider.num_attention_heads,
        "num_key_value_heads": provider.num_query_groups or provider.num_attention_heads,
        "head_dim": provider.kv_channels or provider.hidden_size // provider.num_attention_heads,
        "hidden_act": "silu",
        "initializer_range": provider.init_method_std,
        "rms_norm_eps": provider.layernorm_epsilon,
        "max_position_embeddings": provider.max_position_embeddings or provider.seq_length,
        "attention_dropout": provider.attention_dropout,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": provider.rotary_base},
        "bos_token_id": provider.bos_token_id,
        "eos_token_id": provider.eos_token_id,
        "pad_token_id": provider.pad_token_id,
        "dtype": "bfloat16" if provider.params_dtype == torch.bfloat16 else "float32",
    }
