"""What the providers of all families share: fields, their defaults, and how a model is built from them."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt import GPTModel

from falcon_bridge.models.build import build_model, default_transformer_impl, runs_transformer_engine


@dataclass
class FalconModelProvider(GPTModelProvider):
    """Configuration and factory of a model of any family; each family's provider is a subclass.

    Attributes beyond those of `GPTModelProvider`:
        model_class: What `provide` builds; no field, each family sets its own.
        use_bitnet: BitNet b1.58: ternary weights and int8 activations in the projections of all layers
            (`bitnet.modules.TERNARY_MODULES`). Parameters and checkpoints are those of the dense model.
        bitnet_backend: What computes them (`bitnet.backends.CHOICES`); "auto" takes fused kernels on GPU and pure
            torch on CPU.
        bitnet_warmup_steps: Training steps over which a dense model becomes a ternary one
            (`bitnet.callbacks.QuantizationWarmup`).
        bitnet_gradient_accumulation_fusion: Add their weights' gradients to Megatron's `main_grad` as they are
            computed, which needs no APEX, unlike `gradient_accumulation_fusion` of the other layers.
        fuse_linear_cross_entropy: Compute the loss from the hidden states, the logits of a chunk of tokens at a time
            (`ops.linear_cross_entropy`): no tensor of all logits is held. `cross_entropy_loss_fusion` is moot then.
        max_position_embeddings: Context that the model claims in its Hugging Face config; `seq_length` where None.
            Training at another `seq_length` does not change it.
        bos_token_id, eos_token_id, pad_token_id: For the exported Hugging Face config.
    """

    model_class: ClassVar[type[GPTModel]]

    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True
    activation_func: object = torch.nn.functional.silu
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    position_embedding_type: Literal["rope"] = "rope"
    layernorm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    share_embeddings_and_output_weights: bool = False
    should_pad_vocab: bool = True
    transformer_impl: str = field(default_factory=default_transformer_impl)
    apply_rope_fusion: bool = field(default_factory=runs_transformer_engine)
    fused_residual_rmsnorm: bool = field(default_factory=runs_transformer_engine)
    bias_dropout_fusion: bool = True

    use_bitnet: bool = False
    bitnet_backend: Literal["auto", "reference", "onebitllms", "fused"] = "auto"
    bitnet_warmup_steps: int = 0
    bitnet_gradient_accumulation_fusion: bool = True

    fuse_linear_cross_entropy: bool = True
    max_position_embeddings: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 11
    pad_token_id: int | None = 0

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build this rank's part of the model, a `model_class`; see `models.build.build_model`."""
        return build_model(self, self.model_class, pre_process, post_process, vp_stage)
