"""Falcon-H1's Hugging Face config: what of it the model can do, and how to write it from a provider."""

from typing import Any

from falcon_bridge.models.falcon_h1.pattern import PARALLEL
from falcon_bridge.models.hf_config import common_hf_fields


def check_hf_config(config) -> None:
    """Refuse a FalconH1Config that asks for something the Megatron model would ignore.

    Args:
        config: A transformers FalconH1Config.

    Raises:
        ValueError: With one line that names the field.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    time_step_limit = tuple(getattr(config, "time_step_limit", None) or (0.0, float("inf")))
    wanted = {
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "projectors_bias": (config.projectors_bias, False),
        "mamba_proj_bias": (config.mamba_proj_bias, False),
        "mamba_conv_bias": (config.mamba_conv_bias, True),
        "hidden_act": (config.hidden_act, "silu"),
        "time_step_limit": (time_step_limit, (0.0, float("inf"))),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
        "rope_parameters.partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
    }
    if config.mamba_rms_norm:
        wanted["mamba_norm_before_gate"] = (config.mamba_norm_before_gate, False)
    for name, (value, supported) in wanted.items():
        if value != supported:
            raise ValueError(
                f"config.json: {name}={value!r} is not supported by falcon_bridge, only {supported!r}; no released "
                "Falcon-H1 uses it"
            )
    d_ssm = config.mamba_d_ssm if config.mamba_d_ssm is not None else config.mamba_expand * config.hidden_size
    if d_ssm != config.mamba_n_heads * config.mamba_d_head:
        raise ValueError(
            f"config.json: mamba_d_ssm={d_ssm} is not mamba_n_heads·mamba_d_head = "
            f"{config.mamba_n_heads * config.mamba_d_head}"
        )


def hf_config_fields(provider) -> dict[str, Any]:
    """The FalconH1Config fields of a provider, for a model without a Hugging Face source.

    Args:
        provider: A `FalconH1ModelProvider`.

    Returns:
        Keyword arguments of `FalconH1Config`.

    Raises:
        ValueError: If transformers' Falcon-H1 cannot express the model.
    """
    pattern = provider.resolve_layer_pattern()
    if set(pattern) != {PARALLEL}:
        raise ValueError(
            f"layer_pattern={pattern!r} cannot be exported: transformers' Falcon-H1 has parallel blocks "
            f"({PARALLEL!r}) only; keep the Megatron checkpoint"
        )
    if not provider.num_attention_heads or not provider.mamba_num_heads:
        raise ValueError(
            "a model without attention heads or without SSM heads cannot be exported: transformers' Falcon-H1 has "
            "both in every block; keep the Megatron checkpoint"
        )
    return {
        **common_hf_fields(provider),
        "mamba_d_ssm": provider.d_ssm,
        "mamba_n_heads": provider.mamba_num_heads,
        "mamba_d_head": provider.mamba_head_dim,
        "mamba_n_groups": provider.mamba_num_groups,
        "mamba_d_state": provider.mamba_state_dim,
        "mamba_d_conv": provider.conv_kernel,
        "mamba_expand": 2,
        "mamba_chunk_size": provider.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_norm_before_gate": False,
        "mamba_rms_norm": provider.gated_norm,
        "projectors_bias": False,
        "embedding_multiplier": provider.embedding_multiplier,
        "lm_head_multiplier": provider.lm_head_multiplier,
        "key_multiplier": provider.key_multiplier,
        "attention_in_multiplier": provider.attention_in_multiplier,
        "attention_out_multiplier": provider.attention_out_multiplier,
        "ssm_in_multiplier": provider.ssm_in_multiplier,
        "ssm_out_multiplier": provider.ssm_out_multiplier,
        "mlp_multipliers": list(provider.mlp_multipliers),
        "ssm_multipliers": list(provider.ssm_multipliers),
    }
