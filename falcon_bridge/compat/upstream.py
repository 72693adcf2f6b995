"""The upstream internals that falcon_bridge leans on, by name, in one place.

Everything here is private to Megatron Core, Megatron Bridge, transformers, Triton or packages that only a GPU needs
(an underscore name, or an attribute that we replace or set), so a minor release may move it.
``tests/unit/compat/test_upstream.py`` resolves the table, ``tests/gpu/test_upstream_gpu.py`` the part that needs a
GPU machine's packages; they say which name moved, and find imports of private names that are not listed here.
"""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Private(NamedTuple):
    """One private name.

    Attributes:
        path: where it lives, as ``module:attribute.path``.
        why: what we use it for.
        mentions: a name that upstream's code at `path` must read, where the dependence is an attribute that we set.
    """

    path: str
    why: str
    mentions: str | None = None


GPU_PACKAGES = ("mamba_ssm", "causal_conv1d")
"""Packages that are installed with falcon-bridge[gpu] only."""

PRIVATE: dict[str, Private] = {
    "compile_helpers": Private(
        "megatron.core.datasets.utils:compile_helpers",
        "runs make in the installed package; replaced where the wheel ships the built helper but no Makefile",
    ),
    "initialize.compile_helpers": Private(
        "megatron.bridge.training.initialize:compile_helpers", "the same function, bound by name at import"
    ),
    "initialize._set_random_seed": Private(
        "megatron.bridge.training.initialize:_set_random_seed",
        "seeds Megatron's RNG streams only where torch counts a GPU; cpu_runtime seeds them too",
    ),
    "setup.initialize_megatron": Private(
        "megatron.bridge.training.setup:initialize_megatron",
        "has allow_no_cuda, which setup() does not pass on; cpu_runtime does",
    ),
    "temporary_distributed_context": Private(
        "megatron.bridge.training.model_load_save:temporary_distributed_context",
        "seeds the RNG streams of a conversion only where there is a GPU; cpu_runtime seeds them too",
    ),
    "mamba_mixer.HAVE_MAMBA_SSM": Private(
        "megatron.core.ssm.mamba_mixer:HAVE_MAMBA_SSM",
        "MambaMixer.__init__ refuses to run where it is false; true while ours is built (compat/mamba.py)",
    ),
    "mamba_context_parallel._all_to_all_cp2hp": Private(
        "megatron.core.ssm.mamba_context_parallel:_all_to_all_cp2hp",
        "tokens for heads among context-parallel ranks, as in the SSM (models/falcon_h1/head_parallel.py)",
    ),
    "mamba_context_parallel._all_to_all_hp2cp": Private(
        "megatron.core.ssm.mamba_context_parallel:_all_to_all_hp2cp", "the way back"
    ),
    "mamba_context_parallel._undo_attention_load_balancing": Private(
        "megatron.core.ssm.mamba_context_parallel:_undo_attention_load_balancing",
        "puts the parts of rows in order (models/falcon_h1/head_parallel.py)",
    ),
    "mamba_context_parallel._redo_attention_load_balancing": Private(
        "megatron.core.ssm.mamba_context_parallel:_redo_attention_load_balancing", "the way back"
    ),
    "gpt_step._partition_packed_batch_for_cp": Private(
        "megatron.bridge.training.gpt_step:_partition_packed_batch_for_cp",
        "cuts packed rows document by document; replaced where rows are cut whole (training/context_parallel.py)",
    ),
    "_mamba_chunk_scan_combined_fwd": Private(
        "mamba_ssm.ops.triton.ssd_combined:_mamba_chunk_scan_combined_fwd", "mamba-ssm's scan (ops/ssd/mamba_scan.py)"
    ),
    "_mamba_chunk_scan_combined_bwd": Private(
        "mamba_ssm.ops.triton.ssd_combined:_mamba_chunk_scan_combined_bwd",
        "its gradients (ops/ssd/mamba_scan.py)",
    ),
    "causal_conv1d_fwd_function": Private(
        "causal_conv1d.cpp_functions:causal_conv1d_fwd_function", "the convolution on GPU (ops/ssm_scan.py)"
    ),
    "causal_conv1d_bwd_function": Private(
        "causal_conv1d.cpp_functions:causal_conv1d_bwd_function", "its gradients, written into a given tensor"
    ),
    "Autotuner.cache": Private(
        "triton.runtime.autotuner:Autotuner.run",
        "asked once a call, and holds each key's configuration; replaced by shipped choices (ops/tuning)",
        mentions="not in self.cache",
    ),
    "triton.native_specialize_impl": Private(
        "triton.runtime.jit:native_specialize_impl", "ops/launch.py finds compiled kernels by what it returns"
    ),
    "triton.CompiledKernel.packed_metadata": Private(
        "triton.runtime.jit:JITFunction.run", "ops/launch.py hands it to the C launcher", mentions="packed_metadata"
    ),
    "triton.CudaLauncher.launch": Private(
        "triton.backends.nvidia.driver:CudaLauncher.__call__",
        "ops/launch.py calls Triton's C launcher as this does",
        mentions="launch_pdl",
    ),
    "ColumnParallelLinear._forward_impl": Private(
        "megatron.core.tensor_parallel.layers:ColumnParallelLinear.forward",
        "BitNetColumnParallelLinear overrides it",
        mentions="_forward_impl",
    ),
    "RowParallelLinear._forward_impl": Private(
        "megatron.core.tensor_parallel.layers:RowParallelLinear.forward",
        "BitNetRowParallelLinear overrides it",
        mentions="_forward_impl",
    ),
    "grad_added_to_main_grad": Private(
        "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel._make_backward_post_hook",
        "BitNet linears and the fused loss set it once they have added to main_grad",
        mentions="grad_added_to_main_grad",
    ),
    "get_dummy_wgrad": Private(
        "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward",
        "Transformer Engine's placeholder gradient",
        mentions="get_dummy_wgrad",
    ),
    "GPTModel._preprocess": Private(
        "megatron.core.models.gpt.gpt_model:GPTModel.forward",
        "FalconH1Model overrides it to scale the token embeddings",
        mentions="_preprocess",
    ),
    "GPTModel._postprocess": Private(
        "megatron.core.models.gpt.gpt_model:GPTModel.forward",
        "FalconH1Model overrides it to scale the hidden state before the head, CausalLM for the loss without logits",
        mentions="_postprocess",
    ),
    "GPTModel._scale_logits": Private(
        "megatron.core.models.gpt.gpt_model:GPTModel._postprocess",
        "CausalLM overrides it to mask the columns that pad the vocabulary",
        mentions="_scale_logits",
    ),
    "GPTModel.output_processor": Private(
        "megatron.core.models.gpt.gpt_model:GPTModel._postprocess",
        "CausalLM computes the loss from the hidden states in it (models/causal_lm.py)",
        mentions="output_processor",
    ),
    "zero_out_wgrad": Private(
        "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
        "tells the fused loss that a tied embedding adds a gradient of its own",
        mentions="zero_out_wgrad",
    ),
    "MambaContextParallel._slice_conv_param": Private(
        "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.get_conv1d_weight",
        "GatheredGroups overrides it to gather the conv parameters of B and C",
        mentions="_slice_conv_param",
    ),
    "_keep_in_float32_parameter_names": Private(
        "megatron.bridge.models.model_provider:_apply_mixed_precision_wrapper",
        "keeps A_log, D and dt_bias in fp32 when the model is cast to bf16",
        mentions="_keep_in_float32_parameter_names",
    ),
    "DistributedOptimizer._build_optimizer_group_ranges": Private(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        "wrapped so that fp32 parameters come first in a group (compat/optimizer.py)",
        mentions="_build_optimizer_group_ranges",
    ),
    "DistributedOptimizer._set_main_param_and_optimizer_states": Private(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        "wrapped so that torch's Adam keeps its step count (compat/optimizer.py)",
    ),
    "MegatronOptimizer._extract_common_per_param_step": Private(
        "megatron.core.optimizer.optimizer:MegatronOptimizer._extract_common_per_param_step",
        "the step count that a checkpoint of a bf16 model keeps (compat/optimizer.py)",
    ),
    "RotaryEmbedding.forward": Private(
        "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.forward",
        "its cache holds process groups; emptied before ranks are forked (ranks.py)",
        mentions="lru_cache",
    ),
    "_pg_collection": Private(
        "megatron.bridge.models.model_provider:ModelProviderMixin.provide_distributed_model",
        "sets the process groups that our provider and block spec read",
        mentions="_pg_collection",
    ),
    "_get_num_floating_point_operations_with_runtime_stats": Private(
        "megatron.bridge.training.utils.flop_utils:num_floating_point_operations",
        "asks our provider for the FLOPs of a batch",
        mentions="_get_num_floating_point_operations_with_runtime_stats",
    ),
    "_pretrain_common": Private(
        "megatron.bridge.recipes.common:_pretrain_common", "upstream's defaults, under our recipes"
    ),
    "_sft_common": Private(
        "megatron.bridge.recipes.common:_sft_common", "upstream's defaults, under our fine-tuning recipes"
    ),
    "_peft_common": Private(
        "megatron.bridge.recipes.common:_peft_common", "upstream's defaults, under our adapter recipes"
    ),
    "AdapterWrapper._adapter_enabled": Private(
        "megatron.bridge.peft.adapter_wrapper:AdapterWrapper.__init__",
        "LoRA and DoRA honour it: adapters can be switched off",
        mentions="_adapter_enabled",
    ),
    "train_utils.report_theoretical_memory": Private(
        "megatron.bridge.training.utils.train_utils:report_theoretical_memory",
        "prints a GPT's memory and divides by the attention heads, which may be 0; silenced while we train",
    ),
    "gpt_step.get_packed_seq_params": Private(
        "megatron.bridge.training.gpt_step:_forward_step_common",
        "replaced: ours numbers documents without waiting for the device (training/static_documents.py)",
        mentions="get_packed_seq_params",
    ),
    "gpt_step.accumulate_flops_metadata": Private(
        "megatron.bridge.training.gpt_step:_forward_step_common",
        "replaced: counts whole rows and their documents under context parallelism (training/context_parallel.py)",
        mentions="accumulate_flops_metadata",
    ),
    "FullCudaGraphWrapper.cuda_graph": Private(
        "megatron.core.full_cuda_graph:FullCudaGraphWrapper.cuda_graph",
        "its graphs of the whole process are dropped before and after a training (training/cuda_graph.py)",
    ),
    "_shared_graph_pool": Private(
        "megatron.core.full_cuda_graph:_shared_graph_pool",
        "forgotten with its graphs: a pool whose graphs are gone takes no others (training/cuda_graph.py)",
    ),
    "_flops_seqlen_sq_sum": Private(
        "megatron.bridge.training.utils.flop_utils:accumulate_flops_metadata",
        "restored after replays, which count nothing in Python (training/cuda_graph.py)",
        mentions="_flops_seqlen_sq_sum",
    ),
    "reset_param_sync_dispatch_state": Private(
        "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.reset_param_sync_dispatch_state",
        "called so that a captured step gathers parameters (training/cuda_graph.py)",
    ),
    "optim._get_scheduler": Private(
        "megatron.bridge.training.optim:setup_optimizer",
        "bitnet/schedule.py wraps it to build the two-stage scheduler",
        mentions="_get_scheduler",
    ),
    "get_model_bridge._exact_types": Private(
        "megatron.bridge.models.conversion.model_bridge:get_model_bridge._exact_types",
        "upstream's entry for Llama, kept for every Llama that is not BitNet",
    ),
    "_split_tensor_factory": Private(
        "megatron.core.ssm.utils:_split_tensor_factory",
        "writes the rows of a fused layer's adapter as parts that reload under another tensor parallelism",
    ),
    "DataLoader": Private(
        "torch.utils.data.dataloader:_BaseDataLoaderIter.__init__",
        "draws a seed from the default CPU generator; beside the model's stream in cpu_runtime",
    ),
    "_get_cuda_rng_state": Private(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state", "read by the RNG streams; the CPU's in cpu_runtime"
    ),
    "_set_cuda_rng_state": Private(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state", "set by the RNG streams; the CPU's in cpu_runtime"
    ),
}


def resolve(name: str) -> Any:
    """The private upstream object that :data:`PRIVATE` lists as ``name``.

    Raises:
        ImportError: upstream moved it; the message says what it was used for.
    """
    private = PRIVATE[name]
    try:
        return pkgutil.resolve_name(private.path)
    except (AttributeError, ImportError) as error:
        raise ImportError(f"{private.path} ({private.why}) moved or was renamed upstream: {error}") from error


def patch_missing_helpers_makefile() -> bool:
    """Keep Megatron from running ``make`` in an installed package that has nothing left to make.

    ``initialize_megatron`` compiles the C++ dataset helpers with ``make`` and exits if that fails. The megatron-core
    wheel ships them built but leaves the Makefile out, so every ``pretrain()`` from a wheel would exit, also with a
    GPU. Where the Makefile is there (a source checkout) or the built helper is not, nothing is changed. Megatron
    Bridge's training modules are not imported by this.

    Returns:
        Whether ``compile_helpers`` is now a function that does nothing.
    """
    utils = importlib.import_module(PRIVATE["compile_helpers"].path.partition(":")[0])
    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if not built or Path(utils.__file__).with_name("Makefile").exists():
        return False

    importers = [utils]
    initialize = PRIVATE["initialize.compile_helpers"].path.partition(":")[0]
    if initialize in sys.modules:
        importers.append(sys.modules[initialize])
    for module in importers:
        module.compile_helpers = helpers_are_compiled
    return True


def helpers_are_compiled() -> None:
    """Stands in for ``compile_helpers`` where the dataset helpers are already built: nothing to do."""
