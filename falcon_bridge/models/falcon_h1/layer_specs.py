"""Module specs: which classes a Falcon-H1 layer is made of, with and without Transformer Engine and BitNet."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from falcon_bridge.bitnet.linear import BitNetColumnParallelLinear, BitNetRowParallelLinear
from falcon_bridge.models.falcon_h1.attention import FalconH1SelfAttention, TorchDotProductAttention
from falcon_bridge.models.falcon_h1.head_parallel import core_attention_under
from falcon_bridge.models.falcon_h1.mixer import FalconH1Mixer, FalconH1MixerSubmodules
from falcon_bridge.models.falcon_h1.mlp import FalconH1MLP
from falcon_bridge.models.falcon_h1.norm import RMSNorm
from falcon_bridge.models.falcon_h1.pattern import ATTENTION, MAMBA, MLP, PARALLEL
from falcon_bridge.models.falcon_h1.ssm import FalconH1MambaMixer
from falcon_bridge.models.residual import get_residual_add


class FalconH1Layer(TransformerLayer):
    """mcore's `TransformerLayer` with a `FalconH1Mixer` as self-attention and a `FalconH1MLP` as MLP.

    Parameters have the same names under both implementations: norms are modules of their own, never fused into a
    linear layer, since both branches of the mixer share one.
    """


@dataclass(frozen=True)
class Backend:
    """The building blocks of one implementation, each a class or what builds one.

    Attributes:
        column_parallel_linear: For a single matrix.
        row_parallel_linear: Likewise.
        qkv_linear: Column-parallel, for the fused q, k and v.
        gate_up_linear: Column-parallel, for the fused gate and up.
        norm: RMSNorm.
        residual_norm: RMSNorm of what also goes on as the residual; may give both, so that their gradients add up in
            its backward kernel.
        core_attention: Attention of q, k and v.
    """

    column_parallel_linear: Callable
    row_parallel_linear: Callable
    qkv_linear: Callable
    gate_up_linear: Callable
    norm: Callable
    residual_norm: Callable
    core_attention: type


def backend_for(config) -> Backend:
    """Transformer Engine's blocks or Megatron's local ones; with `use_bitnet`, BitNet linears among either.

    Args:
        config: Any TransformerConfig; `transformer_impl` and, where there is one, `use_bitnet` are read.

    Raises:
        ValueError: If the implementation is not one of "transformer_engine" and "local".
    """
    if config.transformer_impl == "local":
        blocks, core_attention = LocalSpecProvider(), TorchDotProductAttention
        norm = residual_norm = RMSNorm
    elif config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        blocks = TESpecProvider()
        norm, core_attention = blocks.layer_norm(), blocks.core_attention()
        # takes effect with fused_residual_rmsnorm
        residual_norm = blocks.layer_norm(has_residual=True)
    else:
        raise ValueError(
            f"transformer_impl={config.transformer_impl!r} is not supported: use 'transformer_engine' or 'local'"
        )
    if getattr(config, "use_bitnet", False):
        column, row = BitNetColumnParallelLinear, BitNetRowParallelLinear
        qkv, gate_up = partial(column, matrices="qkv"), partial(column, matrices="gate_up")
    else:
        column, row = blocks.column_parallel_linear(), blocks.row_parallel_linear()
        qkv = gate_up = column
    return Backend(column, row, qkv, gate_up, norm, residual_norm, core_attention)


def falcon_h1_layer_spec(config, symbol: str = PARALLEL) -> ModuleSpec:
    """Spec of one layer.

    Args:
        config: A finalized `FalconH1ModelProvider`.
        symbol: Kind of the layer, one of `pattern.SYMBOLS`.

    Returns:
        The spec of a `FalconH1Layer`.
    """
    backend = backend_for(config)
    submodules = TransformerLayerSubmodules()
    branches = FalconH1MixerSubmodules(
        attention=_attention(backend) if _has_attention(config, symbol) else None,
        mamba_mixer=_mamba_mixer(backend) if _has_mamba(config, symbol) else None,
    )
    if symbol != MLP:
        submodules.input_layernorm = backend.residual_norm
        submodules.self_attention = ModuleSpec(module=FalconH1Mixer, submodules=branches)
        submodules.self_attn_bda = get_residual_add
    if symbol in (PARALLEL, MLP):
        submodules.pre_mlp_layernorm = backend.residual_norm
        submodules.mlp = partial(
            FalconH1MLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=backend.gate_up_linear, linear_fc2=backend.row_parallel_linear),
        )
        submodules.mlp_bda = get_residual_add
    return ModuleSpec(module=FalconH1Layer, submodules=submodules)


def falcon_h1_block_spec(config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline rank and virtual stage build.

    Args:
        config: A finalized `FalconH1ModelProvider`.
        vp_stage: Virtual pipeline stage.

    Returns:
        Layer specs in order, and the final norm.
    """
    pp_rank = config._pg_collection.pp.rank() if config._pg_collection is not None else None
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        layers = layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank)
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))
    pattern = config.resolve_layer_pattern()
    return TransformerBlockSubmodules(
        layer_specs=[falcon_h1_layer_spec(config, pattern[layer]) for layer in layers],
        layer_norm=backend_for(config).norm,
    )


def _has_attention(config, symbol: str) -> bool:
    return symbol == ATTENTION or (symbol == PARALLEL and config.num_attention_heads > 0)


def _has_mamba(config, symbol: str) -> bool:
    return symbol == MAMBA or (symbol == PARALLEL and config.mamba_num_heads > 0)


def _attention(backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=FalconH1SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.qkv_linear,
            core_attention=core_attention_under(backend.core_attention),
            linear_proj=backend.row_parallel_linear,
        ),
    )


def _mamba_mixer(backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=FalconH1MambaMixer,
        submodules=MambaMixerSubmodules(in_proj=backend.column_parallel_linear, out_proj=backend.row_parallel_linear),
    )
