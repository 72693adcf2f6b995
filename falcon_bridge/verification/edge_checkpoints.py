"""Small random Falcon-Edge checkpoints in each of the published forms, whose weights reveal mistakes.

Every matrix has its own standard deviation, and so have its row and column blocks: a scale taken over a shard, or over
a fused weight, is then far from the right one.
"""

import json
from pathlib import Path
from typing import Any

import torch

from falcon_bridge.verification.checkpoints import word_tokenizer


_BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 4 · 16 ≠ hidden_size
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 11,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mha_wide": {"num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 3e-4, "vocab_size": 257},
    "gqa4": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_theta": 1e6},
    },
    "tied": {"tie_word_embeddings": True, "vocab_size": 101},
}

_GAINS = {
    "q_proj": 1.3,
    "k_proj": 0.7,
    "v_proj": 1.9,
    "o_proj": 0.85,
    "gate_proj": 1.25,
    "up_proj": 0.55,
    "down_proj": 0.95,
    "lm_head": 1.6,
}


def random_edge_config(name: str, **overrides: Any):
    """The transformers config `name` of `CONFIGS` with BitNet's mark, and with `overrides` on top.

    Returns:
        A ``LlamaConfig``.
    """
    from transformers import LlamaConfig

    fields = {**_BASE, **CONFIGS[name], **overrides}
    fields["rope_parameters"] = {"rope_type": "default", **fields["rope_parameters"]}
    return LlamaConfig(architectures=["LlamaForCausalLM"], dtype="float32", is_bitnet_config=True, **fields)


@torch.no_grad()
def randomize_edge(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter of a ``LlamaForCausalLM`` revealing random values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        owner = name.split(".")[-2]
        if "norm" in owner:
            parameter.copy_(1 + 0.3 * values)
        elif owner == "embed_tokens":
            parameter.copy_(0.35 * values)
        else:
            rows, columns = parameter.shape
            row_std = 1.5 ** (torch.arange(rows) * 4 // rows - 1.5)
            column_std = 1.4 ** (torch.arange(columns) * 4 // columns - 1.5)
            parameter.copy_(values * row_std[:, None] * column_std * _GAINS[owner] / columns**0.5)


def write_random_edge_checkpoint(
    path: str | Path,
    name: str,
    form: str = "prequantized",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint as the revisions of Falcon-E are: same seed, same model in every form.

    Args:
        path: directory to make.
        name: a key of `CONFIGS`.
        form: a value of ``models.falcon_edge.weights.Form``.
        seed: of the weights.
        dtype: of latent weights and of what is not ternary.
        tokenizer: add a tokenizer in which the word ``w17`` is the token 17.
        **overrides: config fields on top.

    Returns:
        `path`.
    """
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    from falcon_bridge.conversion.bitnet_config import PACKED_ENTRY, is_ternary_weight
    from falcon_bridge.models.falcon_edge.weights import Form, from_latent

    config = random_edge_config(name, **overrides)
    config.dtype = dtype
    model = LlamaForCausalLM(config)
    randomize_edge(model, seed)
    tensors = model.to(dtype).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    stored = {key: tensor.clone() for key, tensor in from_latent(Form(form), tensors.items())}
    if form == Form.DEQUANTIZED:
        stored = {key: t.bfloat16() if is_ternary_weight(key) else t for key, t in stored.items()}
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads(config.to_json_string(use_diff=False))
    if form == Form.PACKED:
        fields["quantization_config"] = PACKED_ENTRY
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    if tokenizer:
        word_tokenizer(config).save_pretrained(path)
    return path
