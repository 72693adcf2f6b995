"""Small random Falcon-H1 checkpoints, in stock transformers' format, whose weights reveal mistakes.

A freshly initialised model hides most conversion and parallelism mistakes: norms of ones commute with everything,
equal A_log, D and dt_bias do not tell heads apart, one standard deviation does not tell q from k. Here every tensor
has its own scale, every multiplier is different from 1 and from the others, and every vector is random.
"""

import math
from pathlib import Path
from typing import Any

import torch


_BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 4 · 16 ≠ hidden_size
    "mamba_d_ssm": 64,  # ≠ 2 · hidden_size
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
    "mamba_rms_norm": False,
    "mamba_norm_before_gate": False,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.7,
    "embedding_multiplier": 2.2,
    "key_multiplier": 0.6,
    "lm_head_multiplier": 0.45,
    "mlp_multipliers": [0.8, 1.4],
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.55,
    "ssm_multipliers": [0.9, 0.65, 1.6, 0.75, 0.5],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 11,
}

# name -> what differs from _BASE; together they cover every axis of the architecture
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated_norm": {"mamba_rms_norm": True, "rms_norm_eps": 3e-4},
    "groups2": {"mamba_n_groups": 2, "vocab_size": 257, "rope_parameters": {"rope_theta": 1e4}},
    "groups2_gated_norm": {"mamba_n_groups": 2, "mamba_rms_norm": True, "rms_norm_eps": 2e-3},
    "groups4": {"mamba_n_groups": 4, "mamba_d_state": 8, "rms_norm_eps": 1e-6},
    "tied": {"tie_word_embeddings": True, "vocab_size": 257, "lm_head_multiplier": 0.3},
    "tied_groups2_gated_norm": {
        "tie_word_embeddings": True,
        "mamba_n_groups": 2,
        "mamba_rms_norm": True,
        "rms_norm_eps": 3e-4,
        "rope_parameters": {"rope_theta": 1e11},
    },
    "mha": {"num_key_value_heads": 4, "head_dim": 8, "mamba_chunk_size": 7},
    "gqa4": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 101},
    "mqa_gated_norm": {"num_key_value_heads": 1, "mamba_rms_norm": True, "num_hidden_layers": 3},
    "expand": {"mamba_d_ssm": None, "mamba_expand": 2, "mamba_n_heads": 6, "mamba_d_head": 16},
    "wide_ssm": {"mamba_d_ssm": 160, "mamba_n_heads": 20, "mamba_d_state": 32, "mamba_chunk_size": 32},
    "narrow_conv": {"mamba_d_conv": 2, "mamba_norm_before_gate": True},  # order is moot without the gated norm
    "conv3_three_heads": {"mamba_d_conv": 3, "num_attention_heads": 3, "num_key_value_heads": 3},
    "default_head_dim": {"head_dim": None, "pad_token_id": None, "hidden_size": 64, "intermediate_size": 72},
    # the released 0.5B model's multipliers, RoPE base and gate
    "released_multipliers": {
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 0.9375,
        "embedding_multiplier": 5.656854249492381,
        "key_multiplier": 0.39062499999999994,
        "lm_head_multiplier": 0.0390625,
        "mlp_multipliers": [0.8838834764831844, 0.5859375],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.23570226039551587,
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        "mamba_chunk_size": 128,
        "rope_parameters": {"rope_theta": 1e11},
        "num_hidden_layers": 3,
    },
}

# standard deviation of each projection's rows, times sqrt(fan in); all different
_GAINS = {
    "q_proj": 1.3,
    "k_proj": 1.05,
    "v_proj": 1.15,
    "o_proj": 0.85,
    "gate_proj": 1.25,
    "up_proj": 0.72,
    "down_proj": 0.95,
    "out_proj": 1.1,
    "lm_head": 1.6,
}
_IN_PROJ_GAINS = {"z": 1.45, "x": 0.9, "B": 1.2, "C": 0.78, "dt": 0.6}
_EMBEDDING_STD = 0.35


def random_config(name: str, **overrides: Any):
    """The transformers config `name` of `CONFIGS`, with `overrides` on top.

    Returns:
        A ``FalconH1Config``.
    """
    from transformers import FalconH1Config

    fields = {**_BASE, **CONFIGS[name], **overrides}
    fields["rope_parameters"] = {"rope_type": "default", **fields["rope_parameters"]}
    if fields["head_dim"] is None:
        del fields["head_dim"]
    if fields["mamba_d_ssm"] is not None and "mamba_d_ssm" in {**CONFIGS[name], **overrides}:
        fields["mamba_d_head"] = fields["mamba_d_ssm"] // fields["mamba_n_heads"]
    return FalconH1Config(architectures=["FalconH1ForCausalLM"], dtype="float32", **fields)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter of a ``FalconH1ForCausalLM`` revealing random values, in place.

    Norms are 1 ± 0.3, ``A_log`` is the log of U(0.5, 12), ``D`` is 1 ± 0.5, ``dt_bias`` spreads softplus(dt) over
    about 0.03 to 2, conv weights and biases are random; each projection has its own standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        owner = module.rpartition(".")[2]
        if leaf == "A_log":
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 11.5 + 0.5).log())
        elif leaf == "D":
            normal(parameter, 0.5, mean=1.0)
        elif leaf == "dt_bias":
            normal(parameter, 1.2, mean=-1.0)
        elif owner == "conv1d":
            normal(parameter, 0.25 if leaf == "bias" else 0.8 / math.sqrt(parameter.shape[-1]))
        elif "norm" in owner:
            normal(parameter, 0.3, mean=1.0)
        elif owner == "embed_tokens":
            normal(parameter, _EMBEDDING_STD)
        elif owner == "in_proj":
            mixer = model.get_submodule(module.rpartition(".")[0])
            bc = mixer.n_groups * mixer.ssm_state_size
            rows = [mixer.intermediate_size, mixer.intermediate_size, bc, bc, mixer.num_heads]
            for part, gain in zip(parameter.split(rows), _IN_PROJ_GAINS.values(), strict=True):
                normal(part, gain / math.sqrt(part.shape[-1]))
        else:
            normal(parameter, _GAINS[owner] / math.sqrt(parameter.shape[-1]))


def write_random_checkpoint(
    path: str | Path,
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of the config `name` as ``save_pretrained`` of stock transformers writes it.

    Args:
        path: directory to make.
        name: a key of `CONFIGS`.
        seed: of the weights.
        dtype: in which they are stored.
        tokenizer: add a tokenizer in which the word ``w17`` is the token 17.
        **overrides: config fields on top.

    Returns:
        `path`.
    """
    from transformers import FalconH1ForCausalLM

    config = random_config(name, **overrides)
    model = FalconH1ForCausalLM(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(path)
    if tokenizer:
        word_tokenizer(config).save_pretrained(path)
    return Path(path)


def word_tokenizer(config):
    """A tokenizer with exactly ``config.vocab_size`` words ``w0 w1 …``, split at blanks; the config's specials."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(config.vocab_size)]
    specials = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id, "pad_token": config.pad_token_id}
    specials = {name: token for name, token in specials.items() if token is not None}
    specials["unk_token"] = min(set(range(config.vocab_size)) - set(specials.values()))
    for name, token in specials.items():
        words[token] = f"<{name}>"  # special tokens are found inside of words: no w1 that splits w17
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk_token>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: words[token] for name, token in specials.items()}
    )
