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
        "transformer_impl": (
            config.transformer_impl == "inference_optimized" and config.transformer_impl,
            "its layers are dense",
        ),
        "use_kitchen": (config.use_kitchen, "its layers would be quantised in another way"),
        "tp_comm_overlap": (
            config.tp_comm_overlap,
            "BitNet's linears gather int8 codes and overlap that themselves, past Transformer Engine's buffers",
        ),
        "cuda_graph_impl": (
            config.cuda_graph_impl != "none" and config.bitnet_warmup_steps and config.cuda_graph_impl,
            f"the strength of bitnet_warmup_steps={config.bitnet_warmup_steps} changes from step to step, and an "
            "iteration that is captured keeps one",
        ),
    }
    for name, (value, reason) in unsupported.items():
        if value:
            raise ValueError(f"{name}={value!r} is not supported with use_bitnet=True: {reason}; unset one of the two")
