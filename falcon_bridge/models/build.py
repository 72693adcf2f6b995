"""What all providers do alike: refusals, fields that follow from machine and layout, building this rank's model."""

import contextlib
from functools import partial
from importlib.util import find_spec

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.vocab_utils import calculate_padded_vocab_size
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer import ModuleSpec


def default_transformer_impl() -> str:
    """Transformer Engine where it can run, Megatron's local implementation elsewhere."""
    return "transformer_engine" if runs_transformer_engine() else "local"


def runs_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and there is a GPU: also the default of its fused kernels."""
    return find_spec("transformer_engine") is not None and torch.cuda.is_available()


def refuse(unsupported: dict[str, tuple[object, str]]) -> None:
    """Refuse the first field that is set.

    Args:
        unsupported: By a field's name, its value, which is refused if true, and what to do instead.

    Raises:
        ValueError: With one line that names the field and says what to change.
    """
    for name, (value, remedy) in unsupported.items():
        if value:
            raise ValueError(f"{name}={value!r} is not supported; {remedy}")


def check_architecture(config: GPTModelProvider, family: str) -> None:
    """Refuse Megatron's layers and losses that no family has.

    Args:
        config: The provider, not necessarily finalized.
        family: What errors call it.

    Raises:
        ValueError: With one line that names the field and says what to change.
    """
    refuse(
        {
            "num_moe_experts": (config.num_moe_experts, f"{family} is dense: leave it unset"),
            "multi_latent_attention": (
                config.multi_latent_attention,
                f"{family} has grouped-query attention: unset it",
            ),
            "mtp_num_layers": (config.mtp_num_layers, "multi-token prediction is not supported: unset it"),
            "add_bias_linear": (config.add_bias_linear, f"{family}'s linear layers have no bias: set it to False"),
            "add_qkv_bias": (config.add_qkv_bias, f"{family}'s linear layers have no bias: set it to False"),
            "qk_layernorm": (config.qk_layernorm, f"{family} normalises neither queries nor keys: set it to False"),
            "rope_scaling": (config.rope_scaling, "RoPE scaling is not supported: set it to False"),
            "window_size": (config.window_size, f"{family}'s attention sees the whole document: unset it"),
            "activation_func_fp8_input_store": (
                config.activation_func_fp8_input_store,
                f"{family}'s SwiGLU keeps its input in the model's dtype: set it to False",
            ),
            "use_te_activation_func": (
                config.use_te_activation_func,
                f"{family}'s SwiGLU is a fused kernel already: set it to False",
            ),
            "cross_entropy_fusion_impl": (
                config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "te" and "te",
                "Megatron warns that it is unstable: use 'native'",
            ),
        }
    )


def check_pipeline(config: GPTModelProvider) -> None:
    """Refuse layers that do not split over the pipeline stages, unless the configuration says how.

    Args:
        config: The provider, not necessarily finalized.

    Raises:
        ValueError: With one line that names the fields and says what to change.
    """
    uneven = (
        config.num_layers_in_first_pipeline_stage is not None
        or config.num_layers_in_last_pipeline_stage is not None
        or config.pipeline_model_parallel_layout is not None
        or config.account_for_embedding_in_pipeline_split
        or config.account_for_loss_in_pipeline_split
    )
    stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    if config.num_layers % stages and not uneven:
        raise ValueError(
            f"num_layers={config.num_layers} does not split evenly over {stages} pipeline stages: set "
            "num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage or pipeline_model_parallel_layout"
        )


def check_expressible(config: GPTModelProvider, family: str) -> None:
    """Refuse what the Hugging Face config of either family cannot say: an export would be another model.

    Args:
        config: The provider, not necessarily finalized.
        family: What errors call it.

    Raises:
        ValueError: With one line that names the field and the value that is supported.
    """
    wanted = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "no_rope_freq": None,
        "seq_len_interpolation_factor": None,
        "softmax_type": "vanilla",
        "glu_linear_offset": 0.0,
        "activation_func_clamp_value": None,
        "layernorm_zero_centered_gamma": False,
        "apply_residual_connection_post_layernorm": False,
    }
    for name, supported in wanted.items():
        value = getattr(config, name)
        if value != supported:
            shown = getattr(supported, "__name__", repr(supported))
            raise ValueError(f"{name}={value!r} is not supported by {family}; use {shown}")


def check_cuda_graph(config: GPTModelProvider) -> None:
    """Refuse CUDA graphs of a model that cannot be captured, and any but those of whole iterations.

    `training.cuda_graph` does the same for the rest of a run's configuration.

    Args:
        config: The provider, not necessarily finalized.

    Raises:
        ValueError: With one line that names the field and says what to change.
    """
    for name in ("enable_cuda_graph", "external_cuda_graph"):
        if getattr(config, name):
            raise ValueError(f"{name}=True is not supported; see cuda_graph_impl: set it to False")
    if config.cuda_graph_impl == "none":
        return
    if config.cuda_graph_impl != "full_iteration":
        raise ValueError(
            f"cuda_graph_impl={config.cuda_graph_impl!r} is not supported; whole iterations can be captured, single "
            "layers cannot: set it to 'full_iteration', or to 'none'"
        )
    dropout = config.attention_dropout or config.hidden_dropout
    recomputes = config.recompute_granularity or getattr(config, "recompute_mixer", False)
    refused = {
        "cuda_graph_modules": (
            config.cuda_graph_modules not in (None, "", "full", []) and config.cuda_graph_modules,
            "it names parts to capture, and the whole iteration is captured: set it to []",
        ),
        "cuda_graph_warmup_steps": (
            config.cuda_graph_warmup_steps < 1 and f"{config.cuda_graph_warmup_steps}",
            "kernels are compiled and tuned in steps before the capture: set it to 1 or more",
        ),
        "pipeline_model_parallel_size": (
            config.pipeline_model_parallel_size > 1 and config.pipeline_model_parallel_size,
            "what pipeline stages send each other has not been shown to be right in a graph: set it to 1",
        ),
        "fp8": (config.fp8, "scaling factors have not been shown to be right in a graph: unset it"),
        "attention_dropout or hidden_dropout": (
            recomputes and dropout,
            "recomputation in a graph would drop other elements: set them to 0, or recompute nothing",
        ),
    }
    for name, (value, remedy) in refused.items():
        if value:
            raise ValueError(
                f"{name}={value} is not supported with cuda_graph_impl='full_iteration'; {remedy}, or set "
                "cuda_graph_impl='none'"
            )


def recomputed_modules(config) -> set[str]:
    """The names in force of Megatron's selective recompute: none of them under another granularity.

    Args:
        config: Any TransformerConfig, not necessarily finalized.
    """
    # where the names are unset, Megatron recomputes this one
    return set(config.recompute_modules or ["core_attn"]) if config.recompute_granularity == "selective" else set()


def settle_execution(provider: GPTModelProvider) -> None:
    """Set the fields that other fields and the installed packages decide; for `finalize()`."""
    if provider.fp32_residual_connection or "layernorm" in recomputed_modules(provider):
        # the fused backward pass adds in the norm's dtype, and recompute wants a norm with one output
        provider.fused_residual_rmsnorm = False
    if provider.transformer_impl == "local":
        provider.persist_layer_norm = False
        provider.fused_residual_rmsnorm = False
        provider.apply_rope_fusion = False
        provider.masked_softmax_fusion = False
    if provider.gradient_accumulation_fusion and find_spec("fused_weight_gradient_mlp_cuda") is None:
        # Transformer Engine's linears could do it, but the output layer is Megatron's own, which needs APEX
        provider.gradient_accumulation_fusion = False
    if not provider.bf16 and provider.cross_entropy_fusion_impl == "native":
        # Megatron's fused cross-entropy rounds its gradient to bf16, whatever the model's dtype
        provider.cross_entropy_loss_fusion = False
    if provider.virtual_pipeline_model_parallel_size is not None and provider.pipeline_model_parallel_size > 1:
        # with two pipeline ranks, batched point-to-point calls let the two tensors cross, without an error
        provider.overlap_p2p_comm, provider.batch_p2p_comm = True, False
    if provider.cuda_graph_impl == "full_iteration":
        # Megatron's default names layers; the other random numbers' states are on the host, where no replay moves them
        provider.cuda_graph_modules, provider.use_te_rng_tracker = [], True


def build_model(
    provider: GPTModelProvider,
    model_class: type[GPTModel],
    pre_process: bool | None = None,
    post_process: bool | None = None,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build this rank's part of a model, its vocabulary padded for the layout.

    Args:
        provider: Finalized, with process groups.
        model_class: What to build.
        pre_process: Whether the embedding is here; from the pipeline rank where None.
        post_process: Whether the head is here; likewise.
        vp_stage: Virtual pipeline stage.

    Returns:
        The model, on the current device, or on the meta device with `init_model_with_meta_device`.

    Raises:
        ValueError: If vocab_size is not set.
    """
    if provider.vocab_size is None:
        raise ValueError("vocab_size is not set: give the model the vocabulary size of its tokenizer")
    # whatever should_pad_vocab says: Bridge's setup() resets it when the model has a vocab_size of its own
    padded_vocab_size = calculate_padded_vocab_size(
        provider.vocab_size, provider.make_vocab_size_divisible_by, provider.tensor_model_parallel_size
    )
    groups, vp_size = provider._pg_collection, provider.virtual_pipeline_model_parallel_size
    if pre_process is None:
        pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(groups.pp)
    if post_process is None:
        post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(groups.pp)
    provider._vp_stage = vp_stage
    if provider.init_model_with_meta_device and (provider.transformer_impl == "local" or provider.use_bitnet):
        # Megatron's own layers name the current CUDA device, which beats meta, unless told to start on CPU
        provider.use_cpu_initialization = True
    spec = provider.transformer_layer_spec
    if not isinstance(spec, ModuleSpec):
        spec = spec(provider, vp_stage=vp_stage)
    device = partial(torch.device, "meta") if provider.init_model_with_meta_device else contextlib.nullcontext
    with device():
        return model_class(
            provider,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size,
            max_sequence_length=provider.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=provider.fp16_lm_cross_entropy,
            parallel_output=provider.parallel_output,
            share_embeddings_and_output_weights=provider.share_embeddings_and_output_weights,
            position_embedding_type=provider.position_embedding_type,
            rotary_percent=provider.rotary_percent,
            rotary_base=provider.rotary_base,
            scatter_embedding_sequence_parallel=provider.scatter_embedding_sequence_parallel,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
