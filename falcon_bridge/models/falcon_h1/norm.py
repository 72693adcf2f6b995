"""RMSNorm without Transformer Engine, and the SSM branch's gated norm, whose groups may span tensor-parallel ranks."""

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm for Megatron's local spec, also under sequence parallelism.

    Megatron's `WrappedTorchNorm` refuses sequence parallelism. What it takes to be right there is the
    `sequence_parallel` mark on the weight: `finalize_model_grads` sums its gradient over the tensor-parallel ranks,
    each of which saw only its own tokens.

    Args:
        config: The model's TransformerConfig.
        hidden_size: Width of the normalised dimension.
        eps: Added to the mean square.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `[..., hidden_size]` into the weight's dtype, also an fp32 stream (`fp32_residual_connection`)."""
        return super().forward(x).to(self.weight.dtype)


class GroupedRMSNorm(nn.Module):
    """RMSNorm over groups of channels that are sharded over tensor-parallel ranks (`mamba_rms_norm` of Falcon-H1).

    A group may lie on one rank or span several: the sum of squares is taken over the whole group, in forward and in
    backward. Source: transformers `FalconH1RMSNormGated` with `norm_before_gate=False`; the gate is applied before.

    Args:
        width: Channels over all ranks.
        num_groups: Groups over all ranks.
        eps: Added to the mean square.
        tp_group: Tensor-parallel process group.
        dtype: Of the weight.
    """

    def __init__(self, width: int, num_groups: int, eps: float, tp_group, dtype: torch.dtype):
        super().__init__()
        self.eps, self.tp_group, self.group_width = eps, tp_group, width // num_groups
        world, rank = tp_group.size(), tp_group.rank()
        self.local_groups = max(1, num_groups // world)
        self.spans_ranks = num_groups < world
        self.num_groups, self.first_group = num_groups, rank * num_groups // world
        self.weight = nn.Parameter(torch.ones(width // world, dtype=dtype, device=torch.cuda.current_device()))
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = 0

    def forward(self, y: torch.Tensor, out_scale: float = 1.0) -> torch.Tensor:
        """Normalise `[..., width/tp]` and scale by weight and `out_scale`; in fp32 (fp64 for fp64), to y's dtype."""
        wide = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(-1, (self.local_groups, -1))
        square_sum = wide.square().sum(-1, keepdim=True)
        if self.spans_ranks:
            square_sum = self._sum_over_the_ranks_of_a_group(square_sum)
        normed = (wide * torch.rsqrt(square_sum / self.group_width + self.eps)).flatten(-2)
        return (normed * (self.weight.to(wide.dtype) * out_scale)).to(y.dtype)

    def _sum_over_the_ranks_of_a_group(self, square_sum: torch.Tensor) -> torch.Tensor:
        # one slot a group, so that one all-reduce over the whole tensor-parallel group serves all of them
        slots = [torch.zeros_like(square_sum)] * self.num_groups
        slots[self.first_group] = square_sum
        total = reduce_from_tensor_model_parallel_region(torch.cat(slots, -2), group=self.tp_group)
        # every rank uses the sum, so the gradients with respect to it are summed too
        total = copy_to_tensor_model_parallel_region(total, group=self.tp_group)
        return total.narrow(-2, self.first_group, 1)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Sharded tensors for distributed checkpoints: the weight is split along its only axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
