"""The MLP of Falcon-H1: SwiGLU with a multiplier on the gate and one on the output."""

from functools import partial

import torch
from megatron.core.transformer.mlp import MLP

from falcon_bridge.models.build import recomputed_modules
from falcon_bridge.ops.elementwise import recompute_scaled_swiglu, scaled_swiglu
from falcon_bridge.ops.recomputed import recompute_before_backward_of


class FalconH1MLP(MLP):
    """`down(up(x)·silu(gate(x)·g))·d` for `config.mlp_multipliers = (g, d)`.

    Both multipliers are folded into the activation: d commutes with the linear layer that follows. Source:
    transformers `FalconH1MLP`.
    """

    def forward(self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs):
        """Map `[s, b, h]` to `[s, b, h]` and no bias.

        Args:
            hidden_states: Normed hidden states; `[s/tp, b, h]` under sequence parallelism.
            per_token_scale: Not supported (it belongs to mixtures of experts).
            **kwargs: What `TransformerLayer` hands to every MLP (`padding_mask`); unused by a dense one.

        Returns:
            The output and None.
        """
        if per_token_scale is not None:
            raise ValueError("per_token_scale belongs to mixtures of experts, which Falcon-H1 does not have")
        gate_multiplier, down_multiplier = self.config.mlp_multipliers
        gate_up, _ = self.linear_fc1(hidden_states)
        gated = scaled_swiglu(gate_up, gate_multiplier, down_multiplier)
        output, bias = self.linear_fc2(gated)
        if self.config.recompute_gates and "mlp" not in recomputed_modules(self.config):
            multipliers = {"gate_scale": gate_multiplier, "out_scale": down_multiplier}
            recompute_before_backward_of(
                output, gated, partial(recompute_scaled_swiglu, x=gate_up.detach(), **multipliers)
            )
        return output, bias
