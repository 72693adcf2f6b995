"""Provider of Falcon-Edge models: Llamas whose projections are BitNet b1.58 linears."""

from dataclasses import dataclass

from falcon_bridge.models.build import settle_execution
from falcon_bridge.models.falcon_edge.flops import falcon_edge_flops
from falcon_bridge.models.falcon_edge.layer_specs import falcon_edge_block_spec
from falcon_bridge.models.falcon_edge.model import FalconEdgeModel
from falcon_bridge.models.falcon_edge.validation import check_supported
from falcon_bridge.models.provider import FalconModelProvider


@dataclass
class FalconEdgeModelProvider(FalconModelProvider):
    """Configuration and factory of a Falcon-Edge model.

    Attributes are those of `FalconModelProvider`; `use_bitnet=False` builds the dense twin: the same parameters under
    the same names.
    """

    model_class = FalconEdgeModel

    rotary_base: float = 1e6
    transformer_layer_spec: object = falcon_edge_block_spec
    bias_activation_fusion: bool = False
    use_bitnet: bool = True

    def finalize(self) -> None:
        """Validate and compute what depends on other fields; may be called again after changing fields.

        Raises:
            ValueError: With one line that says what to change, for what the model cannot do.
        """
        check_supported(self)
        settle_execution(self)
        super().finalize()

    def _get_num_floating_point_operations_with_runtime_stats(
        self, batch_size: int, seqlen_sum: int | None = None, seqlen_squared_sum: int | None = None, **_
    ) -> int:
        """Bridge's hook for TFLOP/s; see `flops.falcon_edge_flops`."""
        return falcon_edge_flops(self, batch_size, seqlen_sum, seqlen_squared_sum)
