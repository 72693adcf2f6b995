"""The parallel hybrid mixer: attention and Mamba-2 side by side on the same normed input."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor


@dataclass
class FalconH1MixerSubmodules:
    """Specs of the two branches; None where a layer has only the other one."""

    attention: ModuleSpec | None = None
    mamba_mixer: ModuleSpec | None = None


class FalconH1Mixer(MegatronModule):
    """`attention(x)·a + ssm(x)·b`, in the slot where `TransformerLayer` expects its self-attention.

    Megatron's GatedDeltaNet is the precedent for another mixer in that slot. Either branch may be absent. With
    `recompute_mixer` only its input is kept for the backward pass, which runs both branches again.

    Args:
        config: A `FalconH1ModelProvider`.
        submodules: The branches.
        layer_number: Global layer number, from 1.
        cp_comm_type: How attention communicates under context parallelism.
        pg_collection: Process groups.
        pp_layer_offset: Layers on earlier pipeline stages, if the caller knows.
        name: Module name handed down by the parent.
    """

    def __init__(
        self,
        config,
        submodules: FalconH1MixerSubmodules,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection=None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        branch = {"config": config, "layer_number": layer_number, "pg_collection": pg_collection}
        self.attention = self.mamba_mixer = None
        if submodules.attention is not None:
            self.attention = build_module(
                submodules.attention,
                cp_comm_type=cp_comm_type,
                pp_layer_offset=pp_layer_offset,
                name=f"{name}.attention" if name else None,
                **branch,
            )
            if config.recompute_mixer:
                # what is inside is recomputed once already
                self.attention.checkpoint_core_attention = False
        if submodules.mamba_mixer is not None:
            self.mamba_mixer = build_module(
                submodules.mamba_mixer,
                pp_layer_offset=pp_layer_offset or 0,
                name=f"{name}.mamba_mixer" if name else None,
                **branch,
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        inference_context=None,
        packed_seq_params=None,
        **attention_kwargs,
    ) -> tuple[Tensor, None]:
        """Mix `[s, b, h]` (`[s/tp, b, h]` under sequence parallelism) into the same shape, without bias.

        Args:
            hidden_states: Normed input of both branches.
            attention_mask: Handed to the attention branch.
            inference_context: Not supported yet.
            packed_seq_params: Document borders of a packed row, for both branches.
            **attention_kwargs: RoPE tensors and what else `TransformerLayer` gives to self-attention.

        Returns:
            The mixed output and None.
        """
        if inference_context is not None:
            raise ValueError(
                "Falcon-H1 has no cached decoding yet: call the model on the whole prefix without an inference "
                "context, as `falcon-bridge generate` does"
            )
        mix = partial(
            self._mix, attention_mask=attention_mask, packed_seq_params=packed_seq_params, **attention_kwargs
        )
        if self.config.recompute_mixer and self.training and torch.is_grad_enabled():
            return self._recomputed(mix, hidden_states), None
        return mix(hidden_states), None

    def _mix(self, hidden_states: Tensor, attention_mask, packed_seq_params, **attention_kwargs) -> Tensor:
        config = self.config
        out = None
        if self.attention is not None:
            out, _ = self.attention(
                hidden_states, attention_mask, packed_seq_params=packed_seq_params, **attention_kwargs
            )
            # the values' share of attention_in_multiplier; that of queries and keys is in the softmax scale
            scale = config.attention_in_multiplier * config.attention_out_multiplier
            out = out if scale == 1.0 else out * scale
        if self.mamba_mixer is not None:
            ssm, _ = self.mamba_mixer(hidden_states, packed_seq_params=packed_seq_params)
            scale = config.ssm_out_multiplier
            out = ssm * scale if out is None else torch.add(out, ssm, alpha=scale)
        return out

    def _recomputed(self, mix: Callable[[Tensor], Tensor], hidden_states: Tensor) -> Tensor:
        if not hidden_states.requires_grad:
            # below the first adapter of a frozen model; a checkpoint without such an input would cut off the branches
            hidden_states = hidden_states.detach().requires_grad_()
        if not self.config.fp8:
            return tensor_parallel.checkpoint(mix, False, hidden_states)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        return te_checkpoint(mix, False, tensor_parallel.get_cuda_rng_tracker, self.tp_group, hidden_states)
