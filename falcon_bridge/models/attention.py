"""Self-attention of all families: what lies between `linear_qkv` and core attention in one kernel each way."""

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from falcon_bridge.ops.qkv_rope import qkv_rope


class FusedRopeSelfAttention(SelfAttention):
    """Megatron's `SelfAttention` with one kernel each way between `linear_qkv` and core attention.

    `ops.qkv_rope` splits, rotates and scales in one pass where Megatron would run Transformer Engine's fused RoPE.
    Packed rows stay with the latter: their positions start again at each document.
    """

    _angles: Tensor | None = None  # of the forward pass under way, where `qkv_rope` is to use them

    @property
    def value_scale(self) -> float:
        """Multiplier of the values."""
        return 1.0

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, rotary_pos_emb=None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and result are those of Megatron's `SelfAttention`."""
        angles = rotary_pos_emb if self._fuses(rotary_pos_emb, **kwargs) else None
        rotary_pos_emb = rotary_pos_emb if angles is None else None
        previous, self._angles = self._angles, angles
        try:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **kwargs)
        finally:
            self._angles = previous

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values as Megatron splits them, the values scaled, and behind RoPE where that is fused."""
        if self._angles is not None:
            mixed_qkv, _ = super().get_query_key_value_tensors(hidden_states, key_value_states, split_qkv=False)
            return qkv_rope(mixed_qkv, self._angles, self.value_scale)
        tensors = super().get_query_key_value_tensors(hidden_states, key_value_states, **kwargs)
        if self.value_scale == 1.0:
            return tensors
        query, key, value, *rest = tensors
        return query, key, value * self.value_scale, *rest

    def _fuses(
        self, angles, *, packed_seq_params=None, inference_context=None, inference_params=None, **_kwargs
    ) -> bool:
        """Whether `qkv_rope` does all that Megatron would do between `linear_qkv` and core attention."""
        config = self.config
        return (
            config.apply_rope_fusion
            and not config.fused_single_qkv_rope
            and isinstance(angles, Tensor)
            and packed_seq_params is None
            and inference_context is None
            and inference_params is None
            and self.q_layernorm is None
            and self.k_layernorm is None
            # else ranks share groups: their heads are gathered, and each rank keeps a part of the queries
            and config.num_query_groups >= self.world_size
        )
