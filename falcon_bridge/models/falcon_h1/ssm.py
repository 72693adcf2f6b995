"""The SSM branch of Falcon-H1: Mamba-2 with µP multipliers, any group count under any tensor-parallel size."""

import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_context_parallel
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from torch import Tensor

from falcon_bridge.compat.mamba import have_mamba_ssm, mamba_ssm_optional
from falcon_bridge.models.falcon_h1.context_parallel import GatheredGroups
from falcon_bridge.models.falcon_h1.head_parallel import cut_of
from falcon_bridge.models.falcon_h1.norm import GroupedRMSNorm
from falcon_bridge.ops.conv1d import causal_conv1d
from falcon_bridge.ops.elementwise import scale_segments
from falcon_bridge.ops.recomputed import recompute_before_backward_of
from falcon_bridge.ops.ssd.backend import ScanBackend, scan_backend
from falcon_bridge.ops.ssd.chunked import ssd_chunked
from falcon_bridge.ops.ssm_scan import SSMShape, ssm_scan


class _Scanned(NamedTuple):
    """What either scan gives.

    Attributes:
        y: `[s, b, d_ssm/tp/cp]`.
        complete: Whether norm and output multiplier are in it.
        again: Writes y again into the tensor that it is given, where that is cheap.
    """

    y: Tensor
    complete: bool
    again: Callable[[Tensor], None] | None = None


class FalconH1MambaMixer(MambaMixer):
    """`MambaMixer` with what Falcon-H1 adds to Mamba-2.

    - µP: `ssm_in_multiplier` and the five `ssm_multipliers` scale z, x, B, C and dt as they leave `in_proj` (dt before
      its bias is added), `ssm_out_multiplier` what enters `out_proj`, with which it commutes.
    - The gated norm honours `layernorm_epsilon`, normalises over its true group when a group spans tensor-parallel
      ranks, and can be absent (`gated_norm=False`).
    - More tensor-parallel ranks than groups: the parent is built with pseudo-groups, one a rank, whose product with
      the state size is unchanged, so widths, checkpoints and weight mappings stay those of the parent;
      `GatheredGroups` gives the kernels the true groups.
    - `A_log`, `D` and `dt_bias` stay in fp32 under bf16.
    - `ssm_backend` chooses the scan: our Triton kernels, mamba-ssm's, or, as on the CPU, the pure-torch one.

    Args:
        config: A `FalconH1ModelProvider`.
        submodules: `in_proj` and `out_proj`.
        layer_number: Global layer number, from 1.
        pg_collection: Process groups; `tp` and `cp` are used.
        pp_layer_offset: Layers on earlier pipeline stages.
        name: Module name handed down by the parent.
    """

    def __init__(
        self,
        config,
        submodules: MambaMixerSubmodules,
        layer_number: int | None = None,
        pg_collection=None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ):
        tp_group = pg_collection.tp
        with mamba_ssm_optional():
            super().__init__(
                _with_pseudo_groups(config, tp_group.size()),
                submodules,
                config.hidden_size,
                d_conv=config.conv_kernel,
                rmsnorm=False,
                chunk_size=config.chunk_size,
                layer_number=layer_number,
                pg_collection=pg_collection,
                pp_layer_offset=pp_layer_offset,
                name=name,
            )
        for module in (self, self.in_proj, self.out_proj):
            module.config = config
        if config.mamba_num_groups % tp_group.size():
            self.cp = GatheredGroups(
                tp_group=tp_group,
                num_groups=config.mamba_num_groups,
                d_state=config.mamba_state_dim,
                cp_group=pg_collection.cp,
                d_inner_local_tp=self.d_inner_local_tp,
                nheads_local_tp=self.nheads_local_tp,
                conv1d_weight_cp1=self.conv1d_weight,
                conv1d_bias_cp1=self.conv1d_bias,
                conv1d_padding=self.d_conv - 1,
                dt_bias_cp1=self.dt_bias,
                A_log_cp1=self.A_log,
                D_cp1=self.D,
                D_has_hdim=self.D_has_hdim,
            )
        if config.gated_norm:
            self.norm = GroupedRMSNorm(
                self.d_inner, config.mamba_num_groups, config.layernorm_epsilon, tp_group, config.params_dtype
            )
        self.dt_bias.data = self.dt_bias.data.float()
        self._keep_in_float32_parameter_names = ("A_log", "D", "dt_bias")

    def forward(
        self, hidden_states: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mix along the sequence.

        Args:
            hidden_states: `[s, b, h]`, normed; `[s/tp, b, h]` under sequence parallelism, `[s/cp, b, h]` under context
                parallelism.
            packed_seq_params: Document borders of a packed row; conv and state restart at each.

        Returns:
            Output of hidden_states' shape, times `ssm_out_multiplier`, and no bias.

        Raises:
            ValueError: For packed rows under context parallelism without Transformer Engine.
        """
        if cut_of(packed_seq_params) is not None and self.cp.cp_size > 1 and mamba_context_parallel.tex is None:
            raise ValueError(
                "packed rows under context parallelism need Transformer Engine, which knows how they are cut: set "
                "context_parallel_size=1, or install falcon-bridge[gpu]"
            )
        zxbcdt, _ = self.in_proj(hidden_states)
        zxbcdt = self.cp.pre_conv_ssm(zxbcdt, cut_of(packed_seq_params))
        packed_seq_params = _covering_the_row(packed_seq_params, zxbcdt.shape[0])
        seq_idx = None if packed_seq_params is None else packed_seq_params.seq_idx
        backend = self._backend(zxbcdt)
        if backend == "torch":
            scanned = self._ssm_torch(zxbcdt, seq_idx)
        else:
            scanned = self._ssm_fused(zxbcdt, seq_idx, backend)
        y = self.cp.post_conv_ssm(scanned.y, cut_of(packed_seq_params))
        if not scanned.complete:
            out_scale = self.config.ssm_out_multiplier
            y = self.norm(y, out_scale) if self.config.gated_norm else y if out_scale == 1.0 else y * out_scale
        output, bias = self.out_proj(y)
        recompute = self.config.recompute_gates and not self.config.recompute_mixer
        if recompute and y is scanned.y and scanned.again is not None:
            recompute_before_backward_of(output, y, scanned.again)
        return output, bias

    def _segment_scales(self) -> tuple[float, ...]:
        return tuple(self.config.ssm_in_multiplier * multiplier for multiplier in self.config.ssm_multipliers)

    def _backend(self, x: Tensor) -> ScanBackend:
        backend = scan_backend(self.config.ssm_backend, self.headdim, self.cp.d_state, x.device)
        if backend != "torch" and not have_mamba_ssm():
            raise ImportError(
                "the SSM branch needs mamba-ssm and causal-conv1d on GPU: install falcon-bridge[gpu], or set "
                "model.ssm_backend=torch for the slow pure-torch scan"
            )
        return backend

    def _ssm_fused(self, zxbcdt: Tensor, seq_idx: Tensor | None, backend: ScanBackend) -> _Scanned:
        """`_ssm_torch` by causal-conv1d, the backend's kernels, and fused gate and norm."""
        cp, config = self.cp, self.config
        # groups that span ranks, or that context parallelism gathers behind the scan, are normalised by the module
        complete = not config.gated_norm or (cp.cp_size == 1 and not self.norm.spans_ranks)
        fuse_norm = config.gated_norm and complete
        y, again = ssm_scan(
            zxbcdt,
            cp.get_conv1d_weight().squeeze(1),
            cp.get_conv1d_bias(),
            cp.get_dt_bias(),
            cp.get_A_log(),
            cp.get_D(),
            self.norm.weight if fuse_norm else None,
            SSMShape(
                heads=cp.nheads_local_tpcp,
                head_dim=self.headdim,
                groups=cp.ngroups_local_tpcp,
                d_state=cp.d_state,
                chunk_size=self.chunk_size,
                scales=self._segment_scales(),
                out_scale=config.ssm_out_multiplier if complete else 1.0,
                norm_width=self.norm.group_width if fuse_norm else None,
                eps=config.layernorm_epsilon,
                backend=backend,
            ),
            seq_idx,
        )
        return _Scanned(y, complete, again)

    def _ssm_torch(self, zxbcdt: Tensor, seq_idx: Tensor | None) -> _Scanned:
        """Conv, scan and gate in pure torch: `[s, b, ·]` to `[s, b, d_ssm/tp/cp]`, fp32 inside."""
        cp = self.cp
        bc = cp.ngroups_local_tpcp * cp.d_state
        widths = [cp.d_inner_local_tpcp, cp.d_inner_local_tpcp, bc, bc, cp.nheads_local_tpcp]
        zxbcdt = scale_segments(zxbcdt, widths, self._segment_scales()).transpose(0, 1)
        z, xbc, dt = zxbcdt.split([widths[0], sum(widths[1:4]), widths[4]], dim=-1)
        xbc = causal_conv1d(
            xbc, cp.get_conv1d_weight().squeeze(1), cp.get_conv1d_bias(), activation="silu", seq_idx=seq_idx
        )
        x, b, c = xbc.split([cp.d_inner_local_tpcp, bc, bc], dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        y, _ = ssd_chunked(
            x.unflatten(-1, (-1, self.headdim)),
            F.softplus(dt.to(wide) + cp.get_dt_bias()),
            -torch.exp(cp.get_A_log().to(wide)),
            b.unflatten(-1, (-1, cp.d_state)),
            c.unflatten(-1, (-1, cp.d_state)),
            cp.get_D().to(wide),
            chunk_size=None,
            seq_idx=seq_idx,
        )
        gated = y.flatten(-2) * F.silu(z)
        return _Scanned(gated.transpose(0, 1).contiguous(), complete=False)


def _with_pseudo_groups(config, tp_size: int):
    """The config to build the parent from: as it is, or with one pseudo-group a tensor-parallel rank."""
    groups, d_state = config.mamba_num_groups, config.mamba_state_dim
    if groups % tp_size == 0:
        return config
    if tp_size % groups or groups * d_state % tp_size:
        raise ValueError(
            f"tensor_model_parallel_size={tp_size} must divide mamba_num_groups={groups}, or be a multiple of it that "
            f"divides groups·state = {groups * d_state}"
        )
    pseudo = copy.copy(config)
    pseudo.mamba_num_groups, pseudo.mamba_state_dim = tp_size, groups * d_state // tp_size
    return pseudo


def _covering_the_row(packed_seq_params: PackedSeqParams | None, length: int) -> PackedSeqParams | None:
    """Give packed rows a `seq_idx` over their whole length.

    Megatron computes it from `total_tokens`, which may be unset, and which Bridge takes after context-parallel
    slicing, while conv and scan see the whole row.
    """
    if packed_seq_params is None:
        return None
    seq_idx = packed_seq_params.seq_idx
    if seq_idx is not None and seq_idx.shape[-1] == length:
        return packed_seq_params
    borders = packed_seq_params.cu_seqlens_q_padded
    if borders is None:
        borders = packed_seq_params.cu_seqlens_q
    borders = borders.flatten()
    positions = torch.arange(length, device=borders.device, dtype=borders.dtype)
    seq_idx = torch.searchsorted(borders[1:].contiguous(), positions, right=True).to(torch.int32).unsqueeze(0)
    return dataclasses.replace(packed_seq_params, seq_idx=seq_idx, total_tokens=None)
