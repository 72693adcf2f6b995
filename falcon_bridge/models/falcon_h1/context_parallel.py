"""Collectives of the SSM branch: groups of B and C shared by tensor-parallel ranks, heads split over context ranks."""

import torch
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region


class GatheredGroups(MambaContextParallel):
    """`MambaContextParallel` for more tensor-parallel ranks than groups.

    Each rank's `in_proj` and conv hold an equal share of every group's B and C channels. Before the conv and the scan
    the shares are gathered over the tensor-parallel ranks, activations and conv parameters alike, and the rank keeps
    the one group that its heads use. The gather's backward is a reduce-scatter, so each share gets the sum of what all
    ranks contributed. Everything after it (context parallelism, the kernels) sees a plain model with one group a rank.

    Args:
        tp_group: Tensor-parallel process group.
        num_groups: Groups over all ranks; fewer than ranks and dividing them.
        d_state: SSM state size.
        d_inner_local_tp: Inner width on this rank.
        nheads_local_tp: SSM heads on this rank.
        **kwargs: The remaining arguments of `MambaContextParallel`.
    """

    def __init__(
        self, *, tp_group, num_groups: int, d_state: int, d_inner_local_tp: int, nheads_local_tp: int, **kwargs
    ):
        self.tp_group, self.num_groups = tp_group, num_groups
        self.group = tp_group.rank() * num_groups // tp_group.size()
        self.bc_local = num_groups * d_state // tp_group.size()
        super().__init__(
            d_inner_local_tp=d_inner_local_tp,
            nheads_local_tp=nheads_local_tp,
            ngroups_local_tp=1,
            d_state=d_state,
            **kwargs,
        )

    def pre_conv_ssm(self, input_: torch.Tensor, packed_seq_params=None) -> torch.Tensor:
        """Replace the rank's share of B and C by its whole group: `[s, b, ·]` to `[s·cp, b, ·]`, wider in B and C."""
        z_x, bc, dt = input_.split([2 * self.d_inner_local_tp, 2 * self.bc_local, self.nheads_local_tp], dim=-1)
        gathered = torch.cat([z_x, *self._own_group(bc), dt], dim=-1)
        return super().pre_conv_ssm(gathered, packed_seq_params)

    def _slice_conv_param(self, param: torch.Tensor) -> torch.Tensor:
        x, bc = param.split([self.d_inner_local_tp, 2 * self.bc_local], dim=0)
        whole = torch.cat([x.movedim(0, -1), *self._own_group(bc.movedim(0, -1))], dim=-1).movedim(-1, 0)
        return super()._slice_conv_param(whole.contiguous())

    def _own_group(self, bc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[..., B share | C share]` to the whole of this rank's group: B and C, `[..., d_state]` each."""
        # B and C travel in one all-gather, which lays out B0 C0 B1 C1 …: put the ranks' shares of each together
        ranks = all_gather_last_dim_from_tensor_parallel_region(bc.contiguous(), group=self.tp_group)
        shares = ranks.unflatten(-1, (self.tp_group.size(), 2, self.bc_local))
        b, c = (share.flatten(-2) for share in shares.unbind(-2))
        start = self.group * self.d_state
        return b.narrow(-1, start, self.d_state), c.narrow(-1, start, self.d_state)
