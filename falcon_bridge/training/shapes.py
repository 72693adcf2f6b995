"""Widths of a model on one rank, and which layers and tensors a pipeline stage holds."""

import math
from dataclasses import dataclass
from typing import Any

from falcon_bridge.models.falcon_h1.head_parallel import HEADS, HeadShare
from falcon_bridge.models.falcon_h1.pattern import ATTENTION, MAMBA, MLP, PARALLEL
from falcon_bridge.ops.ssd.backend import default_chunk
from falcon_bridge.training.limits import scan_kernels


@dataclass(frozen=True)
class LayerKind:
    """What a layer is made of."""

    attention: bool
    mamba: bool
    mlp: bool


def layer_kinds(model: Any) -> list[LayerKind]:
    """The layers of `model`, in order; a provider without a layer pattern has attention and MLP in each.

    Args:
        model: a provider.
    """
    if not hasattr(model, "resolve_layer_pattern"):
        return [LayerKind(attention=True, mamba=False, mlp=True)] * model.num_layers
    return [
        LayerKind(
            attention=model.num_attention_heads > 0 and symbol in (PARALLEL, ATTENTION),
            mamba=model.mamba_num_heads > 0 and symbol in (PARALLEL, MAMBA),
            mlp=symbol in (PARALLEL, MLP),
        )
        for symbol in model.resolve_layer_pattern()
    ]


def stage_chunks(model: Any, pipeline_rank: int) -> list[list[LayerKind]]:
    """The layers of a pipeline rank, one list a virtual stage, split as Megatron splits them.

    Args:
        model: a finalized provider.
        pipeline_rank: which.
    """
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    kinds, layout = layer_kinds(model), model.pipeline_model_parallel_layout
    if model.pipeline_model_parallel_size == 1:
        return [kinds]
    virtual = model.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual) if virtual else [None]:
        if layout is not None:
            # as `falcon_h1_block_spec` asks; `stage` None is the layout's only one
            layers = layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=stage or 0, pp_rank=pipeline_rank)
        else:
            first = get_transformer_layer_offset(model, vp_stage=stage, pp_rank=pipeline_rank)
            layers = range(first, first + get_num_layers_to_build(model, vp_stage=stage, pp_rank=pipeline_rank))
        chunks.append([kinds[layer] for layer in layers])
    return chunks


@dataclass(frozen=True)
class RankShapes:
    """Widths on one rank, under tensor and context parallelism.

    Attributes:
        tokens: of a micro-batch on this context-parallel rank.
        sharded_tokens: of the parts that sequence parallelism splits.
        ssm_tokens: in the scan, where context parallelism splits heads instead.
        element: bytes of an activation.
        residual: bytes of an element of the residual stream.
        hidden, ffn, vocab: widths; the vocabulary is padded.
        query, key: widths of queries and of keys (or values).
        core_heads, core_query, core_key: attention heads and the same widths within core attention, for one of
            `tokens`: where context parallelism splits heads, some are copied and others made of zeros.
        ssm_heads, ssm_inner, ssm_bc, ssm_state, ssm_chunk: SSM heads, inner width, width of B (or C), state and the
            chunk with which it scans.
        ssm_channels: inner width on a tensor-parallel rank, before context parallelism.
        packed: whether rows may hold documents that are kept apart.
    """

    tokens: int
    sharded_tokens: int
    ssm_tokens: int
    element: int
    residual: int
    hidden: int
    ffn: int
    vocab: int
    query: int
    key: int
    core_heads: int
    core_query: int
    core_key: int
    ssm_heads: int
    ssm_inner: int
    ssm_bc: int
    ssm_state: int
    ssm_chunk: int
    ssm_channels: int
    packed: bool

    @property
    def in_proj(self) -> int:
        """Width of z, x, B, C and dt."""
        return 2 * self.ssm_inner + 2 * self.ssm_bc + self.ssm_heads


def rank_shapes(model: Any, rows: int, *, half: bool, packed: bool = True) -> RankShapes:
    """The widths of `model` on a rank.

    Args:
        model: a finalized provider.
        rows: micro-batch size.
        half: whether activations have 16 bits.
        packed: whether rows may hold documents that are kept apart.
    """
    tp, cp = model.tensor_model_parallel_size, model.context_parallel_size or 1
    tokens = rows * model.seq_length // cp
    element = 2 if half else 4
    head_dim = _head_dim(model)
    groups = model.num_query_groups or model.num_attention_heads
    mamba = model.mamba_num_heads if hasattr(model, "d_ssm") else 0
    # more ranks than groups: each has the whole of one group, see `GatheredGroups`
    ssm_groups = max(1, model.mamba_num_groups // tp // cp) if mamba else 0
    inner = model.d_ssm // tp if mamba else 0
    heads, keys = model.num_attention_heads // tp, max(1, groups // tp)
    core_heads, core_keys = heads, keys
    if splits_heads(model):
        share = HeadShare.of(heads, keys, cp)
        core_heads, core_keys = cp * share.heads, cp * share.groups
    return RankShapes(
        tokens=tokens,
        sharded_tokens=tokens // tp if model.sequence_parallel else tokens,
        ssm_tokens=rows * model.seq_length,
        element=element,
        residual=4 if model.fp32_residual_connection else element,
        hidden=model.hidden_size,
        ffn=model.ffn_hidden_size // tp,
        vocab=padded_vocab_size(model) // tp,
        query=heads * head_dim,
        key=keys * head_dim,
        core_heads=core_heads,
        core_query=core_heads * head_dim,
        core_key=core_keys * head_dim,
        ssm_heads=mamba // tp // cp,
        ssm_inner=inner // cp,
        ssm_bc=ssm_groups * model.mamba_state_dim if mamba else 0,
        ssm_state=model.mamba_state_dim if mamba else 0,
        ssm_chunk=_scan_chunk(model, element) if mamba else 1,
        ssm_channels=inner,
        packed=packed,
    )


def _scan_chunk(model: Any, element: int) -> int:
    return default_chunk(element) if scan_kernels(model) == "triton" else model.chunk_size


def splits_heads(model: Any) -> bool:
    """Whether context-parallel ranks have heads of attention each (`models.falcon_h1.head_parallel`)."""
    cp = model.context_parallel_size or 1
    return cp > 1 and hasattr(model, "d_ssm") and model.num_attention_heads > 0 and model.cp_comm_type == HEADS


def padded_vocab_size(model: Any) -> int:
    """Rows of the embedding over all tensor-parallel ranks, as Bridge pads the vocabulary."""
    multiple = model.make_vocab_size_divisible_by * model.tensor_model_parallel_size
    return math.ceil(model.vocab_size / multiple) * multiple


def _head_dim(model: Any) -> int:
    if not model.num_attention_heads:
        return 0
    return model.kv_channels or model.hidden_size // model.num_attention_heads
