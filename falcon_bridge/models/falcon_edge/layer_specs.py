"""Module specs: which classes a Falcon-Edge layer is made of, with and without BitNet and Transformer Engine."""

from functools import partial

from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from falcon_bridge.models.attention import FusedRopeSelfAttention
from falcon_bridge.models.falcon_h1.layer_specs import backend_for
from falcon_bridge.models.mlp import SwiGLUMLP
from falcon_bridge.models.residual import get_residual_add


def falcon_edge_layer_spec(config) -> ModuleSpec:
    """Spec of one layer: a Llama layer whose norms are modules of their own, never fused into a linear layer.

    Parameters have the same names with and without BitNet and Transformer Engine, so that their checkpoints are
    interchangeable.

    Args:
        config: A finalized `FalconEdgeModelProvider`.

    Returns:
        The spec of a `TransformerLayer`.
    """
    backend = backend_for(config)
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.qkv_linear,
        core_attention=backend.core_attention,
        linear_proj=backend.row_parallel_linear,
    )
    mlp = MLPSubmodules(linear_fc1=backend.gate_up_linear, linear_fc2=backend.row_parallel_linear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.residual_norm,
            self_attention=ModuleSpec(
                module=FusedRopeSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_residual_add,
            pre_mlp_layernorm=backend.residual_norm,
            mlp=partial(SwiGLUMLP.as_mlp_submodule, submodules=mlp),
            mlp_bda=get_residual_add,
        ),
    )


def falcon_edge_block_spec(config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline rank and virtual stage build.

    Args:
        config: A finalized `FalconEdgeModelProvider`.
        vp_stage: Virtual pipeline stage.

    Returns:
        Layer specs, and the final norm.
    """
    pp_rank = config._pg_collection.pp.rank() if config._pg_collection is not None else None
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=[falcon_edge_layer_spec(config)] * layers, layer_norm=backend_for(config).norm
    )
