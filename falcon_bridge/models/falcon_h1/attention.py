"""The attention branch of Falcon-H1, and scaled dot-product attention for machines without Transformer Engine."""

from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from falcon_bridge.models.attention import FusedRopeSelfAttention
from falcon_bridge.models.falcon_h1.head_parallel import RowsCutWhole


class FalconH1SelfAttention(FusedRopeSelfAttention):
    """Grouped-query attention with NeoX RoPE, without biases or q/k norms.

    The µP multipliers cost next to nothing: `key_multiplier` and the square of `attention_in_multiplier` are part of
    the softmax scale (RoPE commutes with both; the provider sets it), and the `attention_in_multiplier` of the values
    and `attention_out_multiplier`, with which attention and `linear_proj` commute, scale the values' few channels.
    """

    @property
    def value_scale(self) -> float:
        """`attention_in_multiplier` times `attention_out_multiplier`."""
        return self.config.attention_in_multiplier * self.config.attention_out_multiplier

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, packed_seq_params=None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and result are those of Megatron's `SelfAttention`."""
        if isinstance(packed_seq_params, RowsCutWhole):
            # positions within documents are known where each rank has whole ones, in `HeadParallelAttention`
            angles = kwargs.pop("rotary_pos_emb", None)
            angles = angles if angles is None or isinstance(angles, tuple) else (angles, angles)
            packed_seq_params = replace(packed_seq_params, rotary_pos_emb=angles, total_tokens=None)
        return super().forward(hidden_states, attention_mask, packed_seq_params=packed_seq_params, **kwargs)


class TorchDotProductAttention(MegatronModule):
    """Causal attention by `torch.nn.functional.scaled_dot_product_attention`, for the local spec.

    Unlike mcore's `DotProductAttention` it takes packed rows (each document attends to itself only), and it needs
    neither fused-softmax kernels nor a [b, n, s, s] buffer. Dropout draws from the tensor-parallel RNG stream.

    Args:
        config: The model's TransformerConfig.
        layer_number: Unused; part of the interface.
        attn_mask_type: Only causal masks are supported.
        attention_type: Only "self".
        attention_dropout: Overrides the config's.
        softmax_scale: Scale of q·k; head_dim^-0.5 where None.
        cp_comm_type: Unused; context parallelism needs Transformer Engine.
        pg_collection: Process groups.

    Raises:
        ValueError: Under context parallelism or for any mask but the causal one.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError(
                "context parallelism of the attention branch needs Transformer Engine, or cp_comm_type='a2a', which "
                "splits heads: set that, or context_parallel_size=1"
            )
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal) or attention_type != "self":
            raise ValueError(f"only causal self-attention is supported, got {attn_mask_type} and {attention_type!r}")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: `[s, b, n, d]`, or `[t, n, d]` for packed rows.
            key: `[s, b, g, d]` or `[t, g, d]`, g dividing n.
            value: As key.
            attention_mask: Ignored: the mask is causal by construction.
            attn_mask_type: As in the constructor.
            attention_bias: Not supported.
            packed_seq_params: Document borders (`cu_seqlens_q`) of a packed row.

        Returns:
            `[s, b, n·d]`, or `[t, n·d]` for packed rows.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by Falcon-H1's attention")
        if packed_seq_params is None:
            # [s, b, n, d] -> [b, n, s, d]
            context = self._attend(*(t.permute(1, 2, 0, 3) for t in (query, key, value)))
            return context.permute(2, 0, 1, 3).flatten(2)
        # [t, n, d] -> [1, n, t, d]
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        lengths = document_lengths(packed_seq_params, query.shape[2])
        documents = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
        context = torch.cat([self._attend(*document) for document in documents], dim=2)
        return context.squeeze(0).transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        # under sequence parallelism the whole block runs in that stream; recompute would not find a fork within it
        fork = dropout and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=dropout,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )


def document_lengths(packed_seq_params: PackedSeqParams, total: int) -> list[int]:
    """Lengths of the documents of a packed row of `total` tokens; what follows the last border is one more."""
    borders = packed_seq_params.cu_seqlens_q_padded
    if borders is None:
        borders = packed_seq_params.cu_seqlens_q
    borders = [min(int(border), total) for border in borders.flatten().tolist()] + [total]
    return [end - start for start, end in zip([0, *borders], borders, strict=False) if end > start]
