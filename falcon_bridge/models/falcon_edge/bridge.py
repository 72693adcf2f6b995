"""Hugging Face LlamaForCausalLM with BitNet's marks to Megatron and back: config, weights, exactly."""

import logging
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, MegatronModelBridge, get_model_bridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from transformers import LlamaForCausalLM

from falcon_bridge.bitnet.codes import invalidate
from falcon_bridge.conversion.bitnet_config import (
    SCALE_SUFFIX,
    is_bitnet,
    is_scale,
    is_ternary_weight,
    quantization_entry,
)
from falcon_bridge.models.falcon_edge.artifacts import keep_quantization_config
from falcon_bridge.models.falcon_edge.hf_config import check_hf_config, hf_config_fields, matrix_shape, tensor_names
from falcon_bridge.models.falcon_edge.model import FalconEdgeModel
from falcon_bridge.models.falcon_edge.provider import FalconEdgeModelProvider
from falcon_bridge.models.falcon_edge.weights import Form, checkpoint_form, from_latent, to_latent
from falcon_bridge.models.falcon_h1.bridge import VOCABULARY_TENSORS, PaddedVocabMapping


logger = logging.getLogger(__name__)

_upstream = get_model_bridge._exact_types[LlamaForCausalLM]


@MegatronModelBridge.register_bridge(
    source=LlamaForCausalLM, target=FalconEdgeModel, provider=FalconEdgeModelProvider, model_type="llama"
)
class FalconEdgeBridge(MegatronModelBridge):
    """Bridge of Falcon-Edge, and of any Llama whose config says BitNet (`hf_config.is_bitnet`).

    Megatron's weights are latent. They are taken from any form of checkpoint (`weights.Form`), and exported in the
    form of the checkpoint that the bridge was made from; a bridge made from a config exports latent ones.

    Example:
        >>> import falcon_bridge
        >>> from megatron.bridge import AutoBridge
        >>> bridge = AutoBridge.from_hf_pretrained("tiiuae/Falcon-E-1B-Base", revision="prequantized")
        >>> provider = bridge.to_megatron_provider()
    """

    CONFIG_MAPPING = [
        pair
        for pair in MegatronModelBridge.CONFIG_MAPPING
        # seq_length is a training choice; the model's context has a field of its own
        if pair != ("max_position_embeddings", "seq_length")
    ] + [(name, name) for name in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")]

    _form = Form.LATENT
    _latent_dtype = torch.float32

    def provider_bridge(self, hf_pretrained) -> FalconEdgeModelProvider:
        """Translate the config.

        Args:
            hf_pretrained: Anything with a `config`, a LlamaConfig with BitNet's marks.

        Returns:
            The provider; not finalized.

        Raises:
            ValueError: With one line, for a config that asks for what the model does not do.
        """
        config = hf_pretrained.config
        check_hf_config(config)
        provider = super().provider_bridge(hf_pretrained)
        provider.kv_channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider: FalconEdgeModelProvider) -> dict[str, Any]:
        """Fields of the LlamaConfig of a model without a Hugging Face source; see `hf_config.hf_config_fields`."""
        return {**hf_config_fields(provider), "architectures": [cls.SOURCE_NAME], "model_type": cls.MODEL_TYPE}

    def load_weights_hf_to_megatron(self, hf_pretrained, megatron_model, allowed_mismatched_params=None):
        """Load a checkpoint of any form into Megatron's latent weights, and have them quantised anew.

        Raises:
            ValueError: With one line: a tensor is missing, damaged, or could be read in two ways.
        """
        self._open(hf_pretrained, megatron_model)
        loaded = super().load_weights_hf_to_megatron(hf_pretrained, megatron_model, allowed_mismatched_params)
        invalidate()
        return loaded

    def stream_weights_hf_to_megatron(self, hf_pretrained, megatron_model, conversion_tasks=None):
        """Yield this rank's part of each Megatron parameter, latent whatever the checkpoint's form.

        Who copies them into a model calls `falcon_bridge.bitnet.invalidate` afterwards, to have them quantised anew.

        Raises:
            ValueError: As `load_weights_hf_to_megatron`.
        """
        chunks = self._open(hf_pretrained, megatron_model)
        if conversion_tasks is None:
            conversion_tasks = self.build_conversion_tasks(hf_pretrained, chunks)
        latent = SimpleNamespace(state=_Latents(hf_pretrained.state, self._read))
        yield from super().stream_weights_hf_to_megatron(latent, chunks, conversion_tasks)

    def _open(self, hf_pretrained, megatron_model) -> list:
        """Find out what is in a checkpoint that is about to be loaded; the model's chunks."""
        chunks = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        names = set(hf_pretrained.state.source.get_all_keys())
        missing = [name for name in tensor_names(hf_pretrained.config) if name not in names]
        if missing:
            raise ValueError(f"the checkpoint lacks {missing[0]} and {len(missing) - 1} more: fetch it again")
        self._form = _source_form(hf_pretrained)
        narrow = any(parameter.dtype == torch.bfloat16 for chunk in chunks for parameter in chunk.parameters())
        self._latent_dtype = torch.bfloat16 if narrow else torch.float32
        if self._form != Form.LATENT:
            logger.warning(
                "%s holds %s weights: codes and scales are kept exactly, but the latent weights that the model was "
                "trained with are lost; to train on, prefer a prequantized checkpoint",
                hf_pretrained.model_name_or_path,
                "packed" if self._form == Form.PACKED else "dequantised",
            )
        return chunks

    def maybe_modify_loaded_hf_weight(self, hf_param: str | dict[str, str], hf_state_dict: Mapping[str, torch.Tensor]):
        """Whole matrices as latent weights, everything else as it is."""
        if isinstance(hf_param, str):
            return self._read(hf_param, hf_state_dict)
        return {part: self._read(name, hf_state_dict) for part, name in hf_param.items()}

    def _read(self, name: str, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not is_ternary_weight(name):
            return state[name]
        scale_name = name + SCALE_SUFFIX
        return to_latent(
            self._form,
            name,
            state[name],
            scale=state[scale_name] if self._form == Form.PACKED and scale_name in state else None,
            entry=quantization_entry(self.hf_config),
            shape=matrix_shape(self.hf_config, name),
            dtype=self._latent_dtype,
        )

    def stream_weights_megatron_to_hf(
        self, megatron_model, hf_pretrained, *args, weight_dtype: torch.dtype | None = None, **kwargs
    ) -> Iterable[HFWeightTuple]:
        """Whole Hugging Face tensors, in the form of `hf_pretrained`; latent where that is a config.

        Args:
            megatron_model: As upstream.
            hf_pretrained: A checkpoint or a config.
            *args: As upstream.
            weight_dtype: Of what is not ternary; of everything where the weights are latent.
            **kwargs: As upstream.

        Raises:
            ValueError: With one line: a matrix cannot be packed.
        """
        form = _source_form(hf_pretrained) if hasattr(hf_pretrained, "state") else Form.LATENT
        latent_dtype = weight_dtype if form == Form.LATENT else None
        latent = super().stream_weights_megatron_to_hf(
            megatron_model, hf_pretrained, *args, weight_dtype=latent_dtype, **kwargs
        )
        for name, tensor in from_latent(form, latent):
            if form == Form.DEQUANTIZED and is_ternary_weight(name):
                tensor = tensor.to(hf_pretrained.state[name].dtype)
            elif latent_dtype != weight_dtype and not is_ternary_weight(name) and not is_scale(name):
                tensor = tensor.to(weight_dtype)
            yield HFWeightTuple(name, tensor)

    def maybe_modify_converted_hf_weight(self, task, converted_weights_dict, hf_state_dict) -> dict[str, torch.Tensor]:
        """Strip vocabulary padding."""
        del hf_state_dict
        vocab_size = self.hf_config.vocab_size
        return {
            name: weight[:vocab_size] if name in VOCABULARY_TENSORS else weight
            for name, weight in converted_weights_dict.items()
        }

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Every parameter of the model and its Hugging Face name."""
        megatron, hf = "decoder.layers.*", "model.layers.*"
        return MegatronMappingRegistry(
            PaddedVocabMapping("embedding.word_embeddings.weight", VOCABULARY_TENSORS[0]),
            PaddedVocabMapping("output_layer.weight", VOCABULARY_TENSORS[1]),
            AutoMapping("decoder.final_layernorm.weight", "model.norm.weight"),
            AutoMapping(f"{megatron}.input_layernorm.weight", f"{hf}.input_layernorm.weight"),
            AutoMapping(f"{megatron}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight"),
            QKVMapping(
                f"{megatron}.self_attention.linear_qkv.weight",
                q=f"{hf}.self_attn.q_proj.weight",
                k=f"{hf}.self_attn.k_proj.weight",
                v=f"{hf}.self_attn.v_proj.weight",
            ),
            AutoMapping(f"{megatron}.self_attention.linear_proj.weight", f"{hf}.self_attn.o_proj.weight"),
            GatedMLPMapping(
                f"{megatron}.mlp.linear_fc1.weight",
                gate=f"{hf}.mlp.gate_proj.weight",
                up=f"{hf}.mlp.up_proj.weight",
            ),
            AutoMapping(f"{megatron}.mlp.linear_fc2.weight", f"{hf}.mlp.down_proj.weight"),
        )


class _Latents:
    """A checkpoint's tensors by name, ternary matrices as latent weights."""

    def __init__(self, state: Mapping[str, torch.Tensor], read: Callable) -> None:
        self._state, self._read = state, read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(name, self._state)


def _source_form(hf_pretrained: Any) -> Form:
    source = hf_pretrained.state
    return checkpoint_form(
        quantization_entry(hf_pretrained.config), source.source.get_all_keys(), lambda name: source[name]
    )


def _bridge_of_llama(architecture: Any, hf_config: Any = None) -> MegatronModelBridge:
    """Ours for a BitNet config, upstream's for every other Llama."""
    config = getattr(hf_config, "config", hf_config)
    chosen = _ours if config is not None and is_bitnet(config) else _upstream
    return chosen(architecture, hf_config=hf_config)


_ours = get_model_bridge._exact_types[LlamaForCausalLM]
get_model_bridge.impl(LlamaForCausalLM)(_bridge_of_llama)
keep_quantization_config()
