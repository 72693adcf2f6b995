"""What a model with BitNet linears cannot be or do, said in one line before anything is built."""

from falcon_bridge.bitnet.backends import check_choice


def check_bitnet(config) -> None:
    """Refuse what BitNet linears would leave dense, get wrong or fail on; without `use_bitnet`, what it would need.

    Args:
        config: A model provider with the fields `use_bitnet`, `bitnet_backend` and `bitnet_warmup_steps`, not
            necessarily finalized.

    Raises:
        ValueError: With one line that names the field and says what to change.
    """
    check_choice(config.bitnet_backend)
    if not isinstance(config.bitnet_warmup_steps, int) or config.bitnet_warmup_steps < 0:
        raise ValueError(f"bitnet_warmup_steps must be an integer of 0 or more, not {config.bitnet_warmup_steps}")
    if not config.use_bitnet:
        if config.bitnet_warmup_steps:
            raise ValueError(
                f"bitnet_warmup_steps={config.bitnet_warmup_steps} would do nothing: set use_bitnet=True, or keep 0"
            )
        if config.bitnet_backend != "auto":
            raise ValueError(
                f"bitnet_backend={config.bitnet_backend!r} would do nothing: set use_bitnet=True, or keep 'auto'"
            )
        return
    graphs = "BitNet quantises weights once a step, outside of what a graph would replay"
    unsupported = {
        "num_moe_experts": (config.num_moe_experts, "experts have no ternary weights"),
        "multi_latent_attention": (config.multi_latent_attention, "its projections have no ternary weights"),
        "mtp_num_layers": (config.mtp_num_layers, "multi-token prediction has no ternary weights"),
        "fp8": (config.fp8, "FP8 cannot hold BitNet's int8 activations"),
        "fp4": (config.fp4, "FP4 cannot hold BitNet's int8 activations"),
        "attention_output_gate": (config.attention_output_gate, "a gate's matrix has no scale in BitNet's linear_qkv"),
        "defer_embedding_wgrad_compute": (
            config.defer_embedding_wgrad_compute,
            "Megatron would also defer the gradients of BitNet's column-parallel linears, which have no buffer",
        ),
        "cpu_offloading": (config.cpu_offloading, "int8 activations are not offloaded"),
        "cuda_graph_impl": (config.cuda_graph_impl != "none" and config.cuda_graph_impl, graphs),
        "enable_cuda_graph": (config.enable_cuda_graph, graphs),
        "external_cuda_graph": (config.external_cuda_graph, graphs),
    }
    for name, (value, reason) in unsupported.items():
        if value:
            raise ValueError(f"{name}={value!r} is not supported with use_bitnet=True: {reason}; unset one of the two")
