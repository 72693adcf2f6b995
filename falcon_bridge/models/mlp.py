"""The MLP of all families: SwiGLU in one kernel each way."""

from functools import partial

import torch
from megatron.core.transformer.mlp import MLP

from falcon_bridge.models.build import recomputed_modules
from falcon_bridge.ops.elementwise import recompute_scaled_swiglu, scaled_swiglu
from falcon_bridge.ops.recomputed import recompute_before_backward_of


class SwiGLUMLP(MLP):
    """`down(up(x)·silu(gate(x)·g))·d` for `multipliers` g and d.

    Both multipliers are folded into the activation: d commutes with the linear layer that follows. Megatron's own
    SwiGLU is compiled by torch.compile, for seconds at the start of a run. With `config.recompute_gates`, where there
    is such a field, the activation's result is not kept for the backward pass.
    """

    @property
    def multipliers(self) -> tuple[float, float]:
        """Of the gate and of the output."""
        return 1.0, 1.0

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
            raise ValueError("per_token_scale belongs to mixtures of experts, which Falcon models do not have")
        gate_scale, out_scale = self.multipliers
        gate_up, _ = self.linear_fc1(hidden_states)
        gated = scaled_swiglu(gate_up, gate_scale, out_scale)
        output, bias = self.linear_fc2(gated)
        if getattr(self.config, "recompute_gates", False) and "mlp" not in recomputed_modules(self.config):
            again = partial(recompute_scaled_swiglu, x=gate_up.detach(), gate_scale=gate_scale, out_scale=out_scale)
            recompute_before_backward_of(output, gated, again)
        return output, bias
