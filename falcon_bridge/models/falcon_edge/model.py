"""The container: mcore's GPTModel with what all families do at their output layer."""

from falcon_bridge.models.causal_lm import CausalLM


class FalconEdgeModel(CausalLM):
    """GPTModel whose config is a `FalconEdgeModelProvider`; see `CausalLM` for its output layer."""
