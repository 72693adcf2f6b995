"""Provider of Falcon-H1 models: a GPTModelProvider with an SSM branch, µP multipliers and a layer pattern."""

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
from falcon_bridge.models.falcon_h1.layer_specs import falcon_h1_block_spec
from falcon_bridge.models.falcon_h1.model import FalconH1Model
from falcon_bridge.models.falcon_h1.pattern import resolve_pattern
from falcon_bridge.models.falcon_h1.validation import check_supported
from falcon_bridge.training.flops import falcon_h1_flops


@dataclass
class FalconH1ModelProvider(GPTModelProvider):
    """Configuration and factory of a Falcon-H1 model.

    Attributes beyond those of `GPTModelProvider`:
        conv_kernel: Taps of the causal convolution (`mamba_d_conv`).
        chunk_size: Chunk of the fused scan; changes speed, not results (`mamba_chunk_size`).
        gated_norm: RMSNorm behind the SSM's gate (`mamba_rms_norm`).
        ssm_backend: "auto" takes mamba-ssm's kernels on GPU and pure torch on CPU; "torch" is pure torch anywhere.
        recompute_mixer: Keep only the input of each mixer for the backward pass and run both branches again there.
            Megatron's `recompute_modules` admits no name for it; it combines with "mlp" and "layernorm" of that list.
        use_bitnet: BitNet b1.58: ternary weights and int8 activations in the projections of attention, SSM and MLP
            (`bitnet.modules.TERNARY_MODULES`). Parameters and checkpoints are those of the dense model.
        bitnet_backend: What computes them (`bitnet.backends.CHOICES`); "auto" takes fused kernels on GPU and pure
            torch on CPU.
        bitnet_gradient_accumulation_fusion: Add their weights' gradients to Megatron's `main_grad` as they are
            computed, which needs no APEX, unlike `gradient_accumulation_fusion` of the other layers.
        bitnet_warmup_steps: Training steps over which a dense model becomes a ternary one
            (`bitnet.callbacks.QuantizationWarmup`).
        fuse_linear_cross_entropy: Compute the loss from the hidden states, the logits of a chunk of tokens at a time
            (`ops.linear_cross_entropy`): no tensor of all logits is held. `cross_entropy_loss_fusion` is moot then.
        max_position_embeddings: Context that the model claims in its Hugging Face config; `seq_length` where None.
            Training at another `seq_length` does not change it.
        bos_token_id, eos_token_id, pad_token_id: For the exported Hugging Face config.
        layer_pattern: One symbol a layer (`pattern.SYMBOLS`), or None for the ratios.
        parallel_ratio, mamba_ratio, attention_ratio, mlp_ratio: Shares of the kinds of layers; all 0 means parallel
            hybrid blocks throughout, as in every released model.
        embedding_multiplier ... ssm_multipliers: µP forward multipliers, see `mup.FalconH1Multipliers`.

    `num_attention_heads` and `mamba_num_heads` are independent and may be 0 (not both).
    """

    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True
    activation_func: object = torch.nn.functional.silu
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    position_embedding_type: Literal["rope"] = "rope"
    rotary_base: float = 1e11
    layernorm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    share_embeddings_and_output_weights: bool = False
    should_pad_vocab: bool = True
    is_hybrid_model: bool = True
    transformer_impl: str = field(default_factory=default_transformer_impl)
    transformer_layer_spec: object = falcon_h1_block_spec
    apply_rope_fusion: bool = field(default_factory=runs_transformer_engine)
    fused_residual_rmsnorm: bool = field(default_factory=runs_transformer_engine)
    bias_dropout_fusion: bool = True
    bias_activation_fusion: bool = False

    mamba_num_heads: int = 24
    mamba_head_dim: int = 64
    mamba_state_dim: int = 256
    mamba_num_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128
    gated_norm: bool = True
    ssm_backend: Literal["auto", "mamba_ssm", "torch"] = "auto"
    recompute_mixer: bool = False
    use_bitnet: bool = False
    bitnet_backend: Literal["auto", "reference", "onebitllms", "fused"] = "auto"
    bitnet_warmup_steps: int = 0
    bitnet_gradient_accumulation_fusion: bool = True

    fuse_linear_cross_entropy: bool = True
    max_position_embeddings: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 11
    pad_token_id: int | None = 0

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

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> FalconH1Model:
        """Build this rank's part of the model; see `models.build.build_model`."""
        return build_model(self, FalconH1Model, pre_process, post_process, vp_stage)

    def _get_num_floating_point_operations_with_runtime_stats(
        self, batch_size: int, seqlen_sum: int | None = None, seqlen_squared_sum: int | None = None, **_
    ) -> int:
        """Bridge's hook for TFLOP/s; see `training.flops.falcon_h1_flops`."""
        return falcon_h1_flops(self, batch_size, seqlen_sum, seqlen_squared_sum)
