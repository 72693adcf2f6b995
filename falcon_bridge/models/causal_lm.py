"""What the models of all families do at their output layer: mask the padding, and compute the loss without logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from falcon_bridge.ops.linear_cross_entropy import linear_cross_entropy


class CausalLM(GPTModel):
    """GPTModel whose config is one of our providers.

    - The columns that pad the vocabulary get the lowest finite logit, so that loss and sampling see only real tokens.
    - With `config.fuse_linear_cross_entropy`, the loss of given labels comes from `ops.linear_cross_entropy`, which
      holds the logits of a chunk of tokens at a time. Without labels, and where logits are to be gathered, nothing
      changes.

    Raises:
        ValueError: If the output layer is to do what the fused loss does not.
    """

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        if config.fuse_linear_cross_entropy and self.post_process:
            _check_fusible(config, self.output_layer)

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        labels: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        output_processor: Callable[..., Tensor] | None = None,
        **kwargs,
    ):
        gathers = self.post_process and (runtime_gather_output or self.output_layer.gather_output)
        if self.config.fuse_linear_cross_entropy:
            if labels is not None and output_processor is None and not gathers:
                output_processor = self._loss_without_logits
            elif self.post_process and torch.is_grad_enabled():
                self._take_gradients_of_logits()
        return super()._postprocess(
            hidden_states,
            labels=labels,
            runtime_gather_output=runtime_gather_output,
            output_processor=output_processor,
            **kwargs,
        )

    def _loss_without_logits(
        self,
        *,
        hidden_states: Tensor,
        labels: Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: Tensor | None,
        **_,
    ) -> Tensor:
        """The loss of each token, fp32 `[b, s]`, of hidden states `[s, b, h]` and labels `[b, s]`.

        With sequence parallelism the hidden states are those of `s/tp` positions.
        """

        def forward(hidden: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden.flatten(0, 1),
                output_layer.weight if output_weight is None else output_weight,
                labels.transpose(0, 1).flatten(),
                vocab_size=self.config.vocab_size,
                tp_group=output_layer.tp_group,
                sequence_parallel=output_layer.sequence_parallel,
            )

        with _computing(output_layer, forward):
            loss = output_layer(hidden_states.contiguous())
        return loss.view(labels.shape[1], labels.shape[0]).transpose(0, 1).contiguous()

    def _take_gradients_of_logits(self) -> None:
        """Have Megatron add what autograd brings to the head's weight, also where the fused loss has added its share.

        The fused loss marks the weight as done for the step, upon which Megatron's hook would drop other gradients. By
        its flag for tied embeddings it adds them in any case, and the fused loss gives zeros for it to add.
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        weight.zero_out_wgrad = True

    def _scale_logits(self, logits: Tensor) -> Tensor:
        padding = self._padded_columns(logits.shape[-1])
        if padding:
            logits[..., -padding:] = torch.finfo(logits.dtype).min
        return logits

    def _padded_columns(self, width: int) -> int:
        """How many of the last columns of logits of this width (gathered, or this rank's shard) are padding."""
        last_column = self.vocab_size if width == self.vocab_size else width * (self.pg_collection.tp.rank() + 1)
        return max(0, min(width, last_column - self.config.vocab_size))


@contextmanager
def _computing(module: torch.nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Have calls of `module` compute `forward`, with the module's hooks: data parallelism waits for weights there."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _check_fusible(config, output_layer: torch.nn.Module) -> None:
    """Refuse an output layer that the fused loss cannot stand in for."""
    reasons = {
        "defer_embedding_wgrad_compute": config.defer_embedding_wgrad_compute,
        "fp8_output_proj": not isinstance(output_layer, ColumnParallelLinear),
        "gtp_weight_remat_size": getattr(output_layer, "gtp_remat_size", 1) > 1,
    }
    for name, in_the_way in reasons.items():
        if in_the_way:
            raise ValueError(
                f"{name}={getattr(config, name)!r} needs the logits of all tokens: set "
                f"fuse_linear_cross_entropy=False, or leave {name} unset"
            )
