"""Provider of Falcon-Edge models: Llamas whose projections are BitNet b1.58 linears."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider

from falcon_bridge.models.build import (
    build_model,
    default_transformer_impl,
    runs_transformer_engine,
    settle_execution,
)
from falcon_bridge.models.falcon_edge.flops import falcon_edge_flops
from falcon_bridge.models.falcon_edge.layer_specs import falcon_edge_block_spec
from falcon_bridge.models.falcon_edge.model import FalconEdgeModel
from falcon_bridge.models.falcon_edge.validation import check_supported


@dataclass
class FalconEdgeModelProvider(GPTModelProvider):
    """Configuration and factory of a Falcon-Edge model.

    Attributes beyond those of `GPTModelProvider`:
        use_bitnet: Ternary weights and int8 activations in all projections of all layers. False builds the dense twin:
            the same parameters under the same names.
        bitnet_backend: What computes them, see `falcon_bridge.bitnet.backends`.
        bitnet_warmup_steps: Training steps over which a dense model becomes a ternary one
            (`bitnet.callbacks.QuantizationWarmup`).
        bitnet_gradient_accumulation_fusion: As in `FalconH1ModelProvider`.
        fuse_linear_cross_entropy: As in `FalconH1ModelProvider`.
        max_position_embeddings: Context that the model claims in its Hugging Face config; `seq_length` where None.
            Training at another `seq_length` does not change it.
        bos_token_id, eos_token_id, pad_token_id: For the exported Hugging Face config.
    """

    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True
    activation_func: object = torch.nn.functional.silu
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    position_embedding_type: Literal["rope"] = "rope"
    rotary_base: float = 1e6
    layernorm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    share_embeddings_and_output_weights: bool = False
    should_pad_vocab: bool = True
    transformer_impl: str = field(default_factory=default_transformer_impl)
    transformer_layer_spec: object = falcon_edge_block_spec
    apply_rope_fusion: bool = field(default_factory=runs_transformer_engine)
    fused_residual_rmsnorm: bool = field(default_factory=runs_transformer_engine)
    bias_dropout_fusion: bool = True
    bias_activation_fusion: bool = True

    use_bitnet: bool = True
    bitnet_backend: Literal["auto", "reference", "onebitllms", "fused"] = "auto"
    bitnet_warmup_steps: int = 0
    bitnet_gradient_accumulation_fusion: bool = True

    fuse_linear_cross_entropy: bool = True
    max_position_embeddings: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 11
    pad_token_id: int | None = 0

    def finalize(self) -> None:
        """Validate and compute what depends on other fields; may be called again after changing fields.

        Raises:
            ValueError: With one line that says what to change, for what the model cannot do.
        """
        check_supported(self)
        settle_execution(self)
        if self.transformer_impl == "local":
            self.bias_activation_fusion = False  # compiles with torch.compile, for minutes on a CPU
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> FalconEdgeModel:
        """Build this rank's part of the model; see `models.build.build_model`."""
        return build_model(self, FalconEdgeModel, pre_process, post_process, vp_stage)

    def _get_num_floating_point_operations_with_runtime_stats(
        self, batch_size: int, seqlen_sum: int | None = None, seqlen_squared_sum: int | None = None, **_
    ) -> int:
        """Bridge's hook for TFLOP/s; see `flops.falcon_edge_flops`."""
        return falcon_edge_flops(self, batch_size, seqlen_sum, seqlen_squared_sum)
