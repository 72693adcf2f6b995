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

    Megatron's GatedDeltaNet is the precedent for another mixer in that slot. Either branch may be absent. Each branch
    scales its own output. Where there are both, the SSM's goes where `TransformerLayer` expects a bias, and
    `models.residual` sums the two and the residual in one kernel. With `recompute_mixer` only the mixer's input is
    kept for the backward pass, which runs both branches again.

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
    ) -> tuple[Tensor, Tensor | None]:
        """Mix `[s, b, h]` (`[s/tp, b, h]` under sequence parallelism) into one or two terms of the same shape.

        Args:
            hidden_states: Normed input of both branches.
            attention_mask: Handed to the attention branch.
            inference_context: Not supported yet.
            packed_seq_params: Document borders of a packed row, for both branches.
            **attention_kwargs: RoPE tensors and what else `TransformerLayer` gives to self-attention.

        Returns:
            The attention branch's output and the SSM's, whose sum is the mixer's; with one branch its output and None.
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
            return self._recomputed(mix, hidden_states)
        return mix(hidden_states)

    def _mix(
        self, hidden_states: Tensor, attention_mask, packed_seq_params, **attention_kwargs
    ) -> tuple[Tensor, Tensor | None]:
        outputs = []
        if self.mamba_mixer is not None:
            outputs.append(self.mamba_mixer(hidden_states, packed_seq_params=packed_seq_params)[0])
        if self.attention is not None:
            attention, _ = self.attention(
                hidden_states, attention_mask, packed_seq_params=packed_seq_params, **attention_kwargs
            )
            # first of the two, and computed last, so that autograd comes to it first: Megatron hangs on the first
            # output what must be recomputed before either branch's backward pass
            outputs.insert(0, attention)
        return outputs[0], outputs[1] if len(outputs) == 2 else None

    def _recomputed(
        self, mix: Callable[[Tensor], tuple[Tensor, Tensor | None]], hidden_states: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if not hidden_states.requires_grad:
            # below the first adapter of a frozen model; a checkpoint without such an input would cut off the branches
            hidden_states = hidden_states.detach().requires_grad_()
        if not self.config.fp8:
            return tensor_parallel.checkpoint(mix, False, hidden_states)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        return te_checkpoint(mix, False, tensor_parallel.get_cuda_rng_tracker, self.tp_group, hidden_states)
