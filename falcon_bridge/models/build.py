"""What all providers do alike: fields that follow from the machine and the layout, and building this rank's model."""

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


def settle_execution(provider: GPTModelProvider) -> None:
    """Set the fields that other fields and the installed packages decide; for `finalize()`."""
    if provider.transformer_impl == "local":
        provider.persist_layer_norm = False
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
