"""Falcon-Edge's Hugging Face config: a LlamaConfig with BitNet's marks, checked, and written from a provider."""

from typing import Any

from falcon_bridge.conversion.bitnet_config import LATENT_ENTRY, check_quantization_entry, quantization_entry
from falcon_bridge.models.hf_config import common_hf_fields


def check_hf_config(config: Any) -> None:
    """Refuse a BitNet LlamaConfig that asks for something the Megatron model would ignore.

    Args:
        config: A transformers LlamaConfig.

    Raises:
        ValueError: With one line that names the field.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    wanted = {
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "hidden_act": (config.hidden_act, "silu"),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
        "rope_parameters.partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
    }
    for name, (value, supported) in wanted.items():
        if value != supported:
            raise ValueError(
                f"config.json: {name}={value!r} is not supported for a BitNet Llama, only {supported!r}; no released "
                "Falcon-Edge uses it"
            )
    check_quantization_entry(quantization_entry(config))


def hf_config_fields(provider: Any) -> dict[str, Any]:
    """The LlamaConfig fields of a provider, with BitNet's marks where it is ternary.

    The marks are those of latent weights (`LATENT_ENTRY`), which is what a provider's model holds.

    Args:
        provider: A `FalconEdgeModelProvider`.

    Returns:
        Keyword arguments of `LlamaConfig`.
    """
    fields = common_hf_fields(provider)
    if provider.use_bitnet:
        fields |= {"is_bitnet_config": True, "quantization_config": dict(LATENT_ENTRY)}
    return fields


def matrix_shape(config: Any, name: str) -> tuple[int, int]:
    """``(out, in)`` of the ternary weight `name` of a LlamaConfig's model."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    kv_width = (config.num_key_value_heads or config.num_attention_heads) * head_dim
    return {
        "q_proj": (width, config.hidden_size),
        "k_proj": (kv_width, config.hidden_size),
        "v_proj": (kv_width, config.hidden_size),
        "o_proj": (config.hidden_size, width),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }[name.split(".")[-2]]


def tensor_names(config: Any) -> list[str]:
    """Names of all tensors that a checkpoint of a LlamaConfig must have; scales of packed weights are not in it."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if config.tie_word_embeddings else ["lm_head.weight"]
    matrices = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    parts = [*matrices, "input_layernorm", "post_attention_layernorm"]
    return names + [f"model.layers.{i}.{part}.weight" for i in range(config.num_hidden_layers) for part in parts]
