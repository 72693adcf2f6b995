"""The container: mcore's GPTModel with Falcon-H1's embedding and head multipliers.

What to change, with `models/causal_lm.py`, when Megatron's HybridModel (which mcore 0.19 recommends over GPTModel)
learns virtual pipeline stages, uneven pipelines and layers that own both a KV and an SSM cache.
"""

from megatron.core.utils import WrappedTensor
from torch import Tensor

from falcon_bridge.models.causal_lm import CausalLM


class FalconH1Model(CausalLM):
    """GPTModel whose config is a `FalconH1ModelProvider`; see `CausalLM` for its output layer.

    - Token embeddings are scaled by `embedding_multiplier`; embeddings given as `decoder_input` are not, as in
      transformers.
    - The hidden state, not the logits, is scaled by `lm_head_multiplier`: no second logits tensor.
    """

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **kwargs):
        first, *rest = super()._preprocess(input_ids, position_ids, decoder_input=decoder_input, **kwargs)
        multiplier = self.config.embedding_multiplier
        if self.pre_process and decoder_input is None and multiplier != 1.0:
            if isinstance(first, WrappedTensor):
                first = WrappedTensor(first.unwrap() * multiplier)
            else:
                first = first * multiplier
        return (first, *rest)

    def _postprocess(self, hidden_states: Tensor, **kwargs):
        multiplier = self.config.lm_head_multiplier
        if self.post_process and multiplier != 1.0:
            hidden_states = hidden_states * multiplier
        return super()._postprocess(hidden_states=hidden_states, **kwargs)
