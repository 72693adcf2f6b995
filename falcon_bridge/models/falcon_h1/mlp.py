"""The MLP of Falcon-H1: SwiGLU with a multiplier on the gate and one on the output."""

from falcon_bridge.models.mlp import SwiGLUMLP


class FalconH1MLP(SwiGLUMLP):
    """`SwiGLUMLP` with µP multipliers. Source: transformers `FalconH1MLP`."""

    @property
    def multipliers(self) -> tuple[float, float]:
        """`mlp_multipliers`."""
        return self.config.mlp_multipliers
