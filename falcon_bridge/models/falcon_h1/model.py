"""The container: mcore's GPTModel with Falcon-H1's embedding and head multipliers and a masked vocabulary padding.

The one file to change when Megatron's HybridModel (which mcore 0.19 recommends over GPTModel) learns virtual pipeline
stages, uneven pipelines and layers that own both a KV and an SSM cache.
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import WrappedTensor
from torch import Tensor


class FalconH1Model(GPTModel):
    """GPTModel whose config is a `FalconH1ModelProvider`.

    - Token embeddings are scaled by `embedding_multiplier`; embeddings given as `decoder_input` are not, as in
      transformers.
    - The hidden state, not the logits, is scaled by `lm_head_multiplier`: no second logits tensor.
    - The columns that pad the vocabulary get the lowest finite logit, so that loss and sampling see only real tokens.
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

    def _scale_logits(self, logits: Tensor) -> Tensor:
        padding = self._padded_columns(logits.shape[-1])
        if padding:
            logits[..., -padding:] = torch.finfo(logits.dtype).min
        return logits

    def _padded_columns(self, width: int) -> int:
        """How many of the last columns of logits of this width (gathered, or this rank's shard) are padding."""
        last_column = self.vocab_size if width == self.vocab_size else width * (self.pg_collection.tp.rank() + 1)
        return max(0, min(width, last_column - self.config.vocab_size))
