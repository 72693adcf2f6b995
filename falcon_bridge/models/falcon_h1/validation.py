"""What a Falcon-H1 model cannot be or do, said in one line before anything is built."""

from falcon_bridge.models.falcon_h1.pattern import ATTENTION, MAMBA, PARALLEL


def check_supported(config) -> None:
    """Refuse configurations that would fail later or be ignored.

    Args:
        config: A `FalconH1ModelProvider`, not necessarily finalized.

    Raises:
        ValueError: With one line that names the field and says what to change.
    """
    pattern = config.resolve_layer_pattern()
    if config.num_attention_heads < 0 or config.mamba_num_heads < 0:
        raise ValueError("num_attention_heads and mamba_num_heads must not be negative")
    _check_heads(config, pattern)
    _check_parallel_layout(config)
    unsupported = {
        "num_moe_experts": (config.num_moe_experts, "Falcon-H1 is dense: leave it unset"),
        "multi_latent_attention": (config.multi_latent_attention, "Falcon-H1 has grouped-query attention: unset it"),
        "mtp_num_layers": (config.mtp_num_layers, "multi-token prediction is not supported: unset it"),
        "use_mup": (config.use_mup, "Falcon-H1 has multipliers of its own (mup.falcon_h1_multipliers): unset it"),
        "add_bias_linear": (config.add_bias_linear, "Falcon-H1's linear layers have no bias: set it to False"),
        "add_qkv_bias": (config.add_qkv_bias, "Falcon-H1's linear layers have no bias: set it to False"),
        "qk_layernorm": (config.qk_layernorm, "Falcon-H1 normalises neither queries nor keys: set it to False"),
        "rope_scaling": (config.rope_scaling, "RoPE scaling is not supported: set it to False"),
        "fp16": (config.fp16, "fp16 overflows in the SSM: use bf16"),
    }
    for name, (value, remedy) in unsupported.items():
        if value:
            raise ValueError(f"{name}={value!r} is not supported; {remedy}")
    for name, length in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
        if len(getattr(config, name)) != length:
            raise ValueError(f"{name} must hold {length} numbers, got {getattr(config, name)!r}")
    if config.position_embedding_type != "rope":
        raise ValueError(f"position_embedding_type={config.position_embedding_type!r} is not supported; use 'rope'")


def _check_heads(config, pattern: str) -> None:
    attention, mamba = config.num_attention_heads, config.mamba_num_heads
    if PARALLEL in pattern and attention == 0 and mamba == 0:
        raise ValueError("num_attention_heads and mamba_num_heads are both 0: a parallel block needs one of them")
    if ATTENTION in pattern and attention == 0:
        raise ValueError(f"layer_pattern has {ATTENTION!r} layers but num_attention_heads is 0")
    if MAMBA in pattern and mamba == 0:
        raise ValueError(f"layer_pattern has {MAMBA!r} layers but mamba_num_heads is 0")
    groups = config.num_query_groups
    if attention and groups and attention % groups:
        raise ValueError(f"num_attention_heads={attention} must be a multiple of num_query_groups={groups}")
    if mamba and mamba % config.mamba_num_groups:
        raise ValueError(f"mamba_num_heads={mamba} must be a multiple of mamba_num_groups={config.mamba_num_groups}")


def _check_parallel_layout(config) -> None:
    tp = config.tensor_model_parallel_size
    for name in ("num_attention_heads", "mamba_num_heads", "ffn_hidden_size"):
        value = getattr(config, name)
        if value and value % tp:
            raise ValueError(
                f"tensor_model_parallel_size={tp} must divide {name}={value}: use one of {_divisors(config)}"
            )
    groups, d_state = config.mamba_num_groups, config.mamba_state_dim
    if config.mamba_num_heads and groups % tp and (tp % groups or groups * d_state % tp):
        raise ValueError(
            f"tensor_model_parallel_size={tp} must divide mamba_num_groups={groups}, or be a multiple of it that "
            f"divides groups·state = {groups * d_state}"
        )
    pp, layers = config.pipeline_model_parallel_size, config.num_layers
    uneven = (
        config.num_layers_in_first_pipeline_stage is not None
        or config.num_layers_in_last_pipeline_stage is not None
        or config.pipeline_model_parallel_layout is not None
        or config.account_for_embedding_in_pipeline_split
        or config.account_for_loss_in_pipeline_split
    )
    stages = pp * (config.virtual_pipeline_model_parallel_size or 1)
    if layers % stages and not uneven:
        raise ValueError(
            f"num_layers={layers} does not split evenly over {stages} pipeline stages: set "
            "num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage or pipeline_model_parallel_layout"
        )


def _divisors(config) -> list[int]:
    widths = [w for w in (config.num_attention_heads, config.mamba_num_heads, config.ffn_hidden_size) if w]
    groups = [g for g in (config.num_query_groups if config.num_attention_heads else 0, config.mamba_num_groups) if g]
    return [
        tp
        for tp in range(1, max(widths) + 1)
        if all(width % tp == 0 for width in widths) and all(g % tp == 0 or tp % g == 0 for g in groups)
    ][:8]
