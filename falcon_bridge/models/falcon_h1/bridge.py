"""Hugging Face FalconH1ForCausalLM to Megatron and back: config, weights, exactly."""

from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ColumnParallelMapping,
    GatedMLPMapping,
    MambaConv1dMapping,
    MambaInProjMapping,
    QKVMapping,
    RowParallelMapping,
)

from falcon_bridge.bitnet.codes import invalidate
from falcon_bridge.models.falcon_h1.hf_config import check_hf_config, hf_config_fields
from falcon_bridge.models.falcon_h1.model import FalconH1Model
from falcon_bridge.models.falcon_h1.provider import FalconH1ModelProvider


VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


class PaddedVocabMapping(ColumnParallelMapping):
    """Column-parallel rows of the vocabulary, padded also where one rank holds all of them.

    `ColumnParallelMapping` pads under tensor parallelism only; with `make_vocab_size_divisible_by` the one-rank model
    can be padded too. Padding is stripped in `FalconH1Bridge.maybe_modify_converted_hf_weight`.
    """

    def hf_to_megatron(self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module) -> torch.Tensor:
        """Split `[vocab, h]` over the ranks, zero rows appended."""
        if self.tp_size == 1:
            missing = megatron_module.weight.shape[0] - hf_weights.shape[0]
            return torch.nn.functional.pad(hf_weights, (0, 0, 0, missing)) if missing > 0 else hf_weights
        return super().hf_to_megatron(hf_weights, megatron_module)


# registered by name, as upstream's is: the later registration then wins for the class and for auto_map lookups alike
@MegatronModelBridge.register_bridge(
    source="FalconH1ForCausalLM",
    target=FalconH1Model,
    provider=FalconH1ModelProvider,
    model_type="falcon_h1",
)
class FalconH1Bridge(MegatronModelBridge):
    """Bridge of Falcon-H1.

    Example:
        >>> import falcon_bridge
        >>> from megatron.bridge import AutoBridge
        >>> bridge = AutoBridge.from_hf_pretrained("tiiuae/Falcon-H1-7B-Base")
        >>> provider = bridge.to_megatron_provider()
    """

    CONFIG_MAPPING = [
        pair
        for pair in MegatronModelBridge.CONFIG_MAPPING
        # seq_length is a training choice; the model's context has a field of its own
        if pair != ("max_position_embeddings", "seq_length")
    ] + [
        ("max_position_embeddings", "max_position_embeddings"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("pad_token_id", "pad_token_id"),
        ("mamba_d_state", "mamba_state_dim"),
        ("mamba_d_head", "mamba_head_dim"),
        ("mamba_n_heads", "mamba_num_heads"),
        ("mamba_n_groups", "mamba_num_groups"),
        ("mamba_d_conv", "conv_kernel"),
        ("mamba_chunk_size", "chunk_size"),
        ("mamba_rms_norm", "gated_norm"),
        ("embedding_multiplier", "embedding_multiplier"),
        ("lm_head_multiplier", "lm_head_multiplier"),
        ("key_multiplier", "key_multiplier"),
        ("attention_in_multiplier", "attention_in_multiplier"),
        ("attention_out_multiplier", "attention_out_multiplier"),
        ("ssm_in_multiplier", "ssm_in_multiplier"),
        ("ssm_out_multiplier", "ssm_out_multiplier"),
        ("mlp_multipliers", "mlp_multipliers"),
        ("ssm_multipliers", "ssm_multipliers"),
    ]

    def load_weights_hf_to_megatron(self, *args, **kwargs):
        """Load a checkpoint, and have ternary weights quantised anew: Bridge writes past PyTorch's version counts."""
        loaded = super().load_weights_hf_to_megatron(*args, **kwargs)
        invalidate()
        return loaded

    def provider_bridge(self, hf_pretrained) -> FalconH1ModelProvider:
        """Translate the config.

        Args:
            hf_pretrained: Anything with a `config`, a FalconH1Config.

        Returns:
            The provider; not finalized.

        Raises:
            ValueError: With one line, for a config that asks for what the model does not do.
        """
        config = hf_pretrained.config
        check_hf_config(config)
        provider = super().provider_bridge(hf_pretrained)
        provider.kv_channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        provider.mlp_multipliers = tuple(provider.mlp_multipliers)
        provider.ssm_multipliers = tuple(provider.ssm_multipliers)
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider: FalconH1ModelProvider) -> dict[str, Any]:
        """Fields of the FalconH1Config of a model without a Hugging Face source; see `hf_config.hf_config_fields`."""
        return {**hf_config_fields(provider), "architectures": [cls.SOURCE_NAME], "model_type": cls.MODEL_TYPE}

    def maybe_modify_converted_hf_weight(self, task, converted_weights_dict, hf_state_dict) -> dict[str, torch.Tensor]:
        """Strip vocabulary padding, and give what Megatron keeps in fp32 the checkpoint's dtype."""
        del hf_state_dict
        vocab_size, dtype = self.hf_config.vocab_size, self._checkpoint_dtype()
        weights = {}
        for name, weight in converted_weights_dict.items():
            if name in VOCABULARY_TENSORS:
                weight = weight[:vocab_size]
            if dtype is not None and name.rpartition(".")[2] in ("A_log", "D", "dt_bias"):
                weight = weight.to(dtype)
            weights[name] = weight
        return weights

    def _checkpoint_dtype(self) -> torch.dtype | None:
        dtype = getattr(self.hf_config, "dtype", None) or getattr(self.hf_config, "torch_dtype", None)
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Every parameter of the model and its Hugging Face name."""
        megatron, hf = "decoder.layers.*", "model.layers.*"
        attention, mamba = f"{megatron}.self_attention.attention", f"{megatron}.self_attention.mamba_mixer"
        return MegatronMappingRegistry(
            PaddedVocabMapping("embedding.word_embeddings.weight", VOCABULARY_TENSORS[0]),
            PaddedVocabMapping("output_layer.weight", VOCABULARY_TENSORS[1]),
            AutoMapping("decoder.final_layernorm.weight", "model.final_layernorm.weight"),
            AutoMapping(f"{megatron}.input_layernorm.weight", f"{hf}.input_layernorm.weight"),
            AutoMapping(f"{megatron}.pre_mlp_layernorm.weight", f"{hf}.pre_ff_layernorm.weight"),
            QKVMapping(
                f"{attention}.linear_qkv.weight",
                q=f"{hf}.self_attn.q_proj.weight",
                k=f"{hf}.self_attn.k_proj.weight",
                v=f"{hf}.self_attn.v_proj.weight",
            ),
            AutoMapping(f"{attention}.linear_proj.weight", f"{hf}.self_attn.o_proj.weight"),
            MambaInProjMapping(f"{mamba}.in_proj.weight", f"{hf}.mamba.in_proj.weight"),
            MambaConv1dMapping(f"{mamba}.conv1d_weight", f"{hf}.mamba.conv1d.weight"),
            MambaConv1dMapping(f"{mamba}.conv1d_bias", f"{hf}.mamba.conv1d.bias"),
            *(
                ColumnParallelMapping(f"{mamba}.{name}", f"{hf}.mamba.{name}")
                for name in ("A_log", "D", "dt_bias", "norm.weight")
            ),
            RowParallelMapping(f"{mamba}.out_proj.weight", f"{hf}.mamba.out_proj.weight"),
            GatedMLPMapping(
                f"{megatron}.mlp.linear_fc1.weight",
                gate=f"{hf}.feed_forward.gate_proj.weight",
                up=f"{hf}.feed_forward.up_proj.weight",
            ),
            AutoMapping(f"{megatron}.mlp.linear_fc2.weight", f"{hf}.feed_forward.down_proj.weight"),
        )
