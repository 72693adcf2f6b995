"""Token generation that recomputes the whole prefix at every step: slow, simple, exact."""

from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule

from falcon_bridge.inference.sampling import Sampling, TokenSampler


@torch.no_grad()
def generate(
    model: MegatronModule,
    prompt: list[int],
    *,
    max_new_tokens: int,
    vocab_size: int,
    eos_token_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue `prompt`; collective over the tensor-parallel ranks, each of which returns the same.

    Args:
        model: a whole model (no pipeline parallelism), without DDP.
        prompt: token ids, at least one.
        max_new_tokens: where to stop at the latest.
        vocab_size: of the checkpoint; the padded rest of the logits is never chosen.
        eos_token_ids: tokens that end the text; the one that did is part of the result.
        sampling: None is greedy.
        on_token: called with each new token.

    Returns:
        The new tokens.
    """
    model.eval()
    sampler = TokenSampler(sampling or Sampling())
    tokens = list(prompt)
    device = next(model.parameters()).device
    for _ in range(max_new_tokens):
        input_ids = torch.tensor([tokens], device=device)
        position_ids = torch.arange(len(tokens), device=device)[None]
        logits = model(input_ids=input_ids, position_ids=position_ids, attention_mask=None)
        token = sampler(_gather_vocabulary(logits[0, -1].float())[:vocab_size].cpu())
        tokens.append(token)
        if on_token:
            on_token(token)
        if token in eos_token_ids:
            break
    return tokens[len(prompt) :]


def _gather_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """`[padded_vocab / tp]` to `[padded_vocab]`."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards)
