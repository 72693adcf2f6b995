"""Whole tensors from what tensor-, context-, data- and pipeline-parallel ranks hold."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule

from falcon_bridge.verification.batch import Batch


def gather_logits(outputs: list[torch.Tensor], batch: Batch, vocab_size: int, device: str) -> torch.Tensor:
    """The logits of the global batch, on every rank.

    Args:
        outputs: on the last pipeline stage this rank's shard of each microbatch, `[b/dp/m, s/cp, padded_vocab/tp]`;
            empty on the other stages.
        batch: the global batch.
        vocab_size: of the checkpoint, without padding.
        device: of the communication.

    Returns:
        `[b, s, vocab_size]` fp32 on CPU.
    """
    rows, seq_length = batch.tokens.shape
    shape = (rows // parallel_state.get_data_parallel_world_size(), seq_length, vocab_size)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        shard = torch.cat([output.float() for output in outputs])
        logits = torch.cat(_all_gather(shard, parallel_state.get_tensor_model_parallel_group()), dim=-1)
        logits = logits[..., :vocab_size].contiguous()
        logits = _join_context(_all_gather(logits, parallel_state.get_context_parallel_group())).contiguous()
    else:
        logits = torch.empty(shape, device=device)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(logits, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    return torch.cat(_all_gather(logits, parallel_state.get_data_parallel_group())).cpu()


def sum_over_ranks(sums: list[torch.Tensor], device: str) -> list[float]:
    """Sum vectors `[2]` fp64 over the microbatches and the data- and context-parallel ranks, on every rank."""
    # summed on the last stage only: elsewhere the list is empty
    total = torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.float64, device=device)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(total, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total.tolist()


def gather_gradients(chunks: list[MegatronModule]) -> None:
    """Complete the gradient buffers that the distributed optimizer has left reduce-scattered, in place."""
    for chunk in chunks:
        for buffer in chunk.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if group.size() == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    return shards


def _join_context(shards: list[torch.Tensor]) -> torch.Tensor:
    """Undo mcore's zigzag split of dimension 1: rank r of n holds chunks r and 2n - 1 - r."""
    if len(shards) == 1:
        return shards[0]
    halves = [shard.chunk(2, dim=1) for shard in shards]
    return torch.cat([half[0] for half in halves] + [half[1] for half in reversed(halves)], dim=1)
