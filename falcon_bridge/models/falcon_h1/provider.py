"""Provider of Falcon-H1 models: a GPTModelProvider with an SSM branch, µP multipliers and a layer pattern."""

from dataclasses import dataclass
from typing import Literal

from falcon_bridge.models.build import settle_execution
from falcon_bridge.models.falcon_h1.layer_specs import falcon_h1_block_spec
from falcon_bridge.models.falcon_h1.model import FalconH1Model
from falcon_bridge.models.falcon_h1.pattern import resolve_pattern
from falcon_bridge.models.falcon_h1.validation import check_supported
from falcon_bridge.models.provider import FalconModelProvider
from falcon_bridge.training.flops import falcon_h1_flops


@dataclass
class FalconH1ModelProvider(FalconModelProvider):
    """Configuration and factory of a Falcon-H1 model.

    Attributes beyond those of `FalconModelProvider`:
        conv_kernel: Taps of the causal convolution (`mamba_d_conv`).
        chunk_size: Chunk of mamba-ssm's scan; changes speed, not results (`mamba_chunk_size`).
        gated_norm: RMSNorm behind the SSM's gate (`mamba_rms_norm`).
        ssm_backend: Whose kernels scan: "triton", our own, or "mamba_ssm"; "torch" is pure torch anywhere. "auto"
            takes ours for the GPUs and head sizes that they have been shown on, mamba-ssm's on other GPUs and for
            others, and pure torch on CPU.
        recompute_mixer: Keep only the input of each mixer for the backward pass and run both branches again there.
            Megatron's `recompute_modules` admits no name for it; it combines with "mlp" and "layernorm" of that list.
        recompute_gates: Do not keep what SwiGLU and, unless pure torch scans, the SSM's gate give to the next linear
            layer, but compute it again from what is kept anyway: a sixth of the activations for some 2 % of the time.
        layer_pattern: One symbol a layer (`pattern.SYMBOLS`), or None for the ratios.
        parallel_ratio, mamba_ratio, attention_ratio, mlp_ratio: Shares of the kinds of layers; all 0 means parallel
            hybrid blocks throughout, as in every released model.
        embedding_multiplier ... ssm_multipliers: µP forward multipliers, see `mup.FalconH1Multipliers`.

    `num_attention_heads` and `mamba_num_heads` are independent and may be 0 (not both).
    """

    model_class = FalconH1Model

    rotary_base: float = 1e11
    is_hybrid_model: bool = True
    transformer_layer_spec: object = falcon_h1_block_spec
    bias_activation_fusion: bool = False

    mamba_num_heads: int = 24
    mamba_head_dim: int = 64
    mamba_state_dim: int = 256
    mamba_num_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128
    gated_norm: bool = True
    ssm_backend: Literal["auto", "triton", "mamba_ssm", "torch"] = "auto"
    recompute_mixer: bool = False
    recompute_gates: bool = False

    layer_pattern: str | None = None
    parallel_ratio: float = 0.0
    mamba_ratio: float = 0.0
    attention_ratio: float = 0.0
    mlp_ratio: float = 0.0

    embedding_multiplier: float = 1.0
    lm_head_multiplier: float = 1.0
    key_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    mlp_multipliers: tuple[float, float] = (1.0, 1.0)
    ssm_multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    def resolve_layer_pattern(self) -> str:
        """The pattern with one symbol a layer.

        Raises:
            ValueError: If pattern or ratios are not usable.
        """
        return resolve_pattern(
            self.layer_pattern,
            self.num_layers,
            parallel_ratio=self.parallel_ratio,
            mamba_ratio=self.mamba_ratio,
            attention_ratio=self.attention_ratio,
            mlp_ratio=self.mlp_ratio,
        )

    @property
    def d_ssm(self) -> int:
        """Inner width of the SSM branch."""
        return self.mamba_num_heads * self.mamba_head_dim

    def finalize(self) -> None:
        """Validate and compute what depends on other fields; may be called again after changing fields.

        Raises:
            ValueError: With one line that says what to change, for what the model cannot do.
        """
        # lists come back where a saved run_config.yaml held tuples
        self.mlp_multipliers = tuple(self.mlp_multipliers)
        self.ssm_multipliers = tuple(self.ssm_multipliers)
        check_supported(self)
        if self.num_attention_heads == 0:
            # no attention branch is built; Megatron still divides by these
            self.kv_channels, self.num_query_groups = self.kv_channels or 64, 1
        head_dim = self.kv_channels or self.hidden_size // self.num_attention_heads
        self.softmax_scale = self.key_multiplier * self.attention_in_multiplier**2 / head_dim**0.5
        settle_execution(self)
        # layers of different kinds have different parameters: they cannot be stacked in a checkpoint
        self.hetereogenous_dist_checkpoint = len(set(self.resolve_layer_pattern())) > 1
        super().finalize()

    def _get_num_floating_point_operations_with_runtime_stats(
        self, batch_size: int, seqlen_sum: int | None = None, seqlen_squared_sum: int | None = None, **_
    ) -> int:
        """Bridge's hook for TFLOP/s; see `training.flops.falcon_h1_flops`."""
        return falcon_h1_flops(self, batch_size, seqlen_sum, seqlen_squared_sum)
