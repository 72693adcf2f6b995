"""The reference of Falcon-Edge: transformers' own Llama with the reference BitNet linear for its projections."""

from pathlib import Path

import torch

from falcon_bridge.bitnet.reference import bitlinear
from falcon_bridge.conversion.bitnet_config import SCALE_SUFFIX, is_scale, is_ternary_weight, quantization_entry
from falcon_bridge.conversion.safetensors_files import read_headers
from falcon_bridge.models.falcon_edge.hf_config import matrix_shape
from falcon_bridge.models.falcon_edge.weights import Form, checkpoint_form, to_latent


class ReferenceBitLinear(torch.nn.Linear):
    """A linear layer without bias that computes `bitnet.reference.bitlinear` from its latent weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return bitlinear(x, self.weight)


def read_latent_weights(path: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of a BitNet checkpoint of any form by name, on CPU, its ternary matrices as latent weights.

    Args:
        path: The directory.
        dtype: fp32 or bf16, of latent weights that are made from codes; everything else keeps its own.

    Raises:
        ValueError: With one line that says what is wrong with the checkpoint.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    headers = read_headers(Path(path))
    config = AutoConfig.from_pretrained(path)
    entry = quantization_entry(config)

    def read(name: str) -> torch.Tensor:
        with safe_open(headers[name].file, "pt") as file:
            return file.get_tensor(name)

    form = checkpoint_form(entry, headers, read)
    weights = {}
    for name in headers:
        if is_scale(name):
            continue
        if not is_ternary_weight(name):
            weights[name] = read(name)
            continue
        scale_name = name + SCALE_SUFFIX
        weights[name] = to_latent(
            form,
            name,
            read(name),
            scale=read(scale_name) if form == Form.PACKED and scale_name in headers else None,
            entry=entry,
            shape=matrix_shape(config, name),
            dtype=dtype,
        )
    return weights


def load_bitnet_llama(path: str | Path, dtype: torch.dtype) -> torch.nn.Module:
    """Stock transformers' Llama on a checkpoint's latent weights, with two kinds of module exchanged.

    Projections are `ReferenceBitLinear`: transformers' own BitNet layers round half to even and dequantise before they
    multiply, so that after a layer or two some activations get other codes (docs/bitnet.md). Norms are torch's, which
    compute in their input's dtype where transformers' round to fp32.

    Args:
        path: Checkpoint directory, of any form.
        dtype: Of everything but the arithmetic within the BitNet linears.

    Returns:
        The model, on CPU.
    """
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if is_ternary_weight(f"{name}.weight"):
            model.set_submodule(name, ReferenceBitLinear(module.in_features, module.out_features, bias=False))
        elif isinstance(module, LlamaRMSNorm):
            model.set_submodule(name, torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon))
    weights = read_latent_weights(path, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing or unexpected:
        raise ValueError(f"{path} lacks {missing} and has {unexpected} beyond the model of its config.json")
    model.tie_weights()
    return model.to(dtype)
