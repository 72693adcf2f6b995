"""Context parallelism of attention by heads (`cp_comm_type="a2a"`), as the SSM branch has it.

Each rank gets whole rows of a part of the heads, and core attention knows nothing of other ranks. So it can be any, on
any device and in any dtype, and documents may begin and end anywhere in a row. Transformer Engine's own "a2a" wants
each document cut into 2·CP equal parts.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_context_parallel import (
    _all_to_all_cp2hp,
    _all_to_all_hp2cp,
    _redo_attention_load_balancing,
    _undo_attention_load_balancing,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


HEADS = "a2a"
"""The `cp_comm_type` that this module stands for."""

_ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@dataclass
class RowsCutWhole(PackedSeqParams):
    """Packed documents of rows that context-parallel ranks share as if each row were one document.

    A row is cut into 2·CP equal parts wherever its documents end, of which rank r has parts r and 2·CP - 1 - r. With a
    plain `PackedSeqParams` each document is cut so.

    Attributes:
        rotary_pos_emb: RoPE's angles for queries and keys, `[max_seqlen, 1, 1, d]`, on their way to where each rank
            has whole documents.
    """

    rotary_pos_emb: tuple[Tensor, Tensor] | None = None


def cut_of(packed_seq_params: PackedSeqParams | None) -> PackedSeqParams | None:
    """What `MambaContextParallel` needs to put rows together: the documents where each is cut, None where rows are."""
    return None if isinstance(packed_seq_params, RowsCutWhole) else packed_seq_params


class HeadParallelAttention(MegatronModule):
    """Core attention of whole rows by a part of the heads.

    Where there are fewer key-value heads than ranks, each is copied to the ranks whose queries use it. Where heads do
    not divide evenly, every query head gets a copy of its own, and heads of zeros make up the number.

    Args:
        core_attention: Class of what attends within a rank.
        config: The model's config.
        pg_collection: Process groups.
        **kwargs: For `core_attention`.
    """

    def __init__(self, core_attention: Callable, *, config, pg_collection, **kwargs):
        super().__init__(config=config)
        self.cp_group, tp = pg_collection.cp, config.tensor_model_parallel_size
        heads, groups = config.num_attention_heads // tp, max(1, config.num_query_groups // tp)
        self.share = HeadShare.of(heads, groups, self.cp_group.size())
        own = copy.copy(config)
        own.context_parallel_size, own.cp_comm_type = 1, None
        own.num_attention_heads, own.num_query_groups = tp * self.share.heads, tp * self.share.groups
        # Transformer Engine excuses that a checkpoint lacks what ends in this name and "._extra_state"
        self.core_attention = core_attention(
            config=own, pg_collection=pg_collection, **{**kwargs, "cp_comm_type": None}
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: This rank's tokens, `[s/cp, b, n, d]`, or `[t/cp, n, d]` for packed rows.
            key: `[s/cp, b, g, d]` or `[t/cp, g, d]`.
            value: As key.
            attention_mask: For the core attention.
            attn_mask_type: Likewise.
            attention_bias: Likewise.
            packed_seq_params: Documents of a packed row.

        Returns:
            `[s/cp, b, n·d]`, or `[t/cp, n·d]` for packed rows.
        """
        cp, packed, cut = self.cp_group.size(), query.dim() == 3, cut_of(packed_seq_params)
        heads = query.shape[-2]
        tensors = [t.unsqueeze(1) if packed else t for t in (query, key, value)]
        tensors[1:] = [t.repeat_interleave(self.share.copies, dim=2) for t in tensors[1:]]
        missing = [cp * n - t.shape[2] for t, n in zip(tensors, self.share.of_tensors, strict=True)]
        tensors = [F.pad(t, (0, 0, 0, n)) if n else t for t, n in zip(tensors, missing, strict=True)]
        # rank by rank that rank's heads of all three, so that they travel together
        shares = torch.cat([t.unflatten(2, (cp, -1)).flatten(3) for t in tensors], dim=-1).flatten(2)
        rows = _undo_attention_load_balancing(_all_to_all_cp2hp(shares, self.cp_group), cp, cut)
        widths = [t.shape[2] // cp * t.shape[3] for t in tensors]
        query, key, value = (
            part.unflatten(-1, (-1, t.shape[3])).contiguous()
            for part, t in zip(rows.split(widths, dim=-1), tensors, strict=True)
        )
        if packed:
            query, key, value = (t.squeeze(1) for t in (query, key, value))
        if cut is not packed_seq_params and packed_seq_params.rotary_pos_emb is not None:
            query, key = (
                apply_rotary_pos_emb(t, angles, self.config, packed_seq_params.cu_seqlens_q, cp_group=_ALONE)
                for t, angles in zip((query, key), packed_seq_params.rotary_pos_emb, strict=True)
            )
        context = self.core_attention(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        context = context.reshape(rows.shape[0], rows.shape[1], -1)
        context = _all_to_all_hp2cp(_redo_attention_load_balancing(context, cp, cut), self.cp_group)
        context = context[..., : heads * value.shape[-1]]
        return context.squeeze(1) if packed else context


@dataclass(frozen=True)
class HeadShare:
    """What of a tensor-parallel rank's heads each of its context-parallel ranks has.

    Attributes:
        heads: Query heads.
        groups: Key-value heads.
        copies: How often each key-value head is there before they are shared out.
    """

    heads: int
    groups: int
    copies: int

    @classmethod
    def of(cls, heads: int, groups: int, cp: int) -> "HeadShare":
        """The share of each of `cp` ranks in `heads` query heads that use `groups` key-value heads."""
        copies = cp // math.gcd(groups, cp)
        if heads % cp == 0 and heads % (groups * copies) == 0:
            return cls(heads // cp, groups * copies // cp, copies)
        each = -(-heads // cp)
        return cls(each, each, heads // groups)

    @property
    def of_tensors(self) -> tuple[int, int, int]:
        """Heads of query, key and value."""
        return self.heads, self.groups, self.groups


def core_attention_under(core_attention: Callable) -> Callable:
    """A builder of `core_attention` that splits heads over context-parallel ranks where the config says so."""

    def build(*, config, pg_collection, **kwargs):
        if config.context_parallel_size > 1 and kwargs.get("cp_comm_type") == HEADS:
            return HeadParallelAttention(core_attention, config=config, pg_collection=pg_collection, **kwargs)
        return core_attention(config=config, pg_collection=pg_collection, **kwargs)

    return build
