"""Reading a checkpoint's config.json: the architecture, and every field that the model's shape or maths depend on."""

import json
import math
from pathlib import Path
from typing import Any

from falcon_bridge.conversion.bitnet_config import check_quantization_entry, is_bitnet, quantization_entry
from falcon_bridge.errors import UserError, one_line, suggestion


_NUMBER = (int, float)
_MAX_INTEGER = 2**31 - 1

# field -> (type for a person, Python types); transformers would fill a missing one with the default of another model
_LLAMA_FIELDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ),
        ("an integer", (int,)),
    ),
    **dict.fromkeys(("head_dim",), ("an integer or null", (int, type(None)))),
    **dict.fromkeys(("rms_norm_eps",), ("a number", _NUMBER)),
    **dict.fromkeys(("hidden_act",), ("a string", (str,))),
}
_FALCON_H1_FIELDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **_LLAMA_FIELDS,
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_chunk_size"),
        ("an integer", (int,)),
    ),
    **dict.fromkeys(("mamba_d_head",), ('an integer or "auto"', (int, str))),
    **dict.fromkeys(("mamba_d_ssm",), ("an integer or null", (int, type(None)))),
    **dict.fromkeys(
        (
            "embedding_multiplier",
            "lm_head_multiplier",
            "key_multiplier",
            "attention_in_multiplier",
            "attention_out_multiplier",
            "ssm_in_multiplier",
            "ssm_out_multiplier",
        ),
        ("a number", _NUMBER),
    ),
    **dict.fromkeys(("mamba_rms_norm", "mamba_norm_before_gate", "mamba_conv_bias"), ("true or false", (bool,))),
}
_FALCON_H1_LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}
_OPTIONAL = {"head_dim"}  # transformers 5 writes it only where it was given; the default is hidden_size / heads

FALCON_H1, LLAMA = "FalconH1ForCausalLM", "LlamaForCausalLM"
SUPPORTED_ARCHITECTURES = (FALCON_H1, LLAMA)


def architecture_of(config: dict[str, Any]) -> str:
    """Which of `SUPPORTED_ARCHITECTURES` a checked config.json is of."""
    return next(name for name in SUPPORTED_ARCHITECTURES if name in config["architectures"])


def read_config(directory: Path, *, ternary_falcon_h1: bool = False) -> dict[str, Any]:
    """The config.json of a checkpoint directory, checked.

    Args:
        directory: a Hugging Face checkpoint directory.
        ternary_falcon_h1: accept a quantised Falcon-H1, which can be exported but not imported.

    Raises:
        UserError: it is not there or no JSON object; the architecture is not ours; a field that the model depends on
            is missing or of the wrong type. The message names the file and the field.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} is not a Hugging Face checkpoint: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): make it readable or fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object: fetch it again")
    _check_architecture(path, config)
    _check_quantization(path, config, ternary_falcon_h1)
    _check_fields(path, config)
    return config


def _check_architecture(path: Path, config: dict[str, Any]) -> None:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise UserError(f'{path} lacks "architectures": it should be ["{SUPPORTED_ARCHITECTURES[0]}"]')
    if not any(name in SUPPORTED_ARCHITECTURES for name in architectures):
        raise UserError(
            f"{path} is of {', '.join(map(str, architectures))}, which falcon-bridge does not convert: "
            f"give a checkpoint of {' or '.join(SUPPORTED_ARCHITECTURES)}"
        )


def _check_quantization(path: Path, config: dict[str, Any], ternary_falcon_h1: bool) -> None:
    entry = config.get("quantization_config")
    if architecture_of(config) == LLAMA:
        if not is_bitnet(config):
            raise UserError(
                f"{path} is of {LLAMA} without BitNet's marks: Megatron Bridge's own AutoBridge converts it; to train "
                'it as a ternary model, add "is_bitnet_config": true'
            )
        if entry is not None and not isinstance(entry, dict):
            raise UserError(f'{path}: "quantization_config" must be an object, not {json.dumps(entry)}')
        try:
            check_quantization_entry(quantization_entry(config))
        except ValueError as error:
            raise UserError(f"{path.parent}: {error}") from None
    elif entry is not None and is_bitnet(config):
        if not ternary_falcon_h1:
            raise UserError(
                f'{path} has a "quantization_config": a ternary {FALCON_H1} is not read back: use the Megatron '
                "checkpoint that it was exported from, or export that with --format hf"
            )
    elif entry is not None:
        raise UserError(
            f'{path} has a "quantization_config": quantised checkpoints are not supported, dequantise it first '
            "(to float32 or bfloat16)"
        )


def _check_fields(path: Path, config: dict[str, Any]) -> None:
    falcon_h1 = architecture_of(config) == FALCON_H1
    fields, lists = (_FALCON_H1_FIELDS, _FALCON_H1_LISTS) if falcon_h1 else (_LLAMA_FIELDS, {})
    for name, (what, types) in fields.items():
        if name not in config:
            if name in _OPTIONAL:
                continue
            raise _missing(path, name, config)
        value = config[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f'{path}: "{name}" must be {what}, not {json.dumps(value)}')
        if types in ((int,), (int, str), (int, type(None))) and isinstance(value, int) and value < 1:
            raise UserError(f'{path}: "{name}" must be positive, not {value}')
        if types != _NUMBER and isinstance(value, int) and value > _MAX_INTEGER:
            raise UserError(f'{path}: "{name}" is above {_MAX_INTEGER}, which no model has: correct it')
        if isinstance(value, _NUMBER) and not _finite(value):
            raise UserError(f'{path}: "{name}" must be a finite number, not {_shown(value)}')
    for name, length in lists.items():
        if name not in config:
            raise _missing(path, name, config)
        value = config[name]
        numbers = isinstance(value, list) and all(isinstance(x, _NUMBER) and not isinstance(x, bool) for x in value)
        if not numbers or len(value) != length:
            raise UserError(f'{path}: "{name}" must be a list of {length} numbers, not {json.dumps(value)}')
        if not all(map(_finite, value)):
            raise UserError(f'{path}: "{name}" must be a list of {length} finite numbers, not {json.dumps(value)}')
    if config["rms_norm_eps"] <= 0:
        raise UserError(f'{path}: "rms_norm_eps" must be positive, not {config["rms_norm_eps"]}')
    dropout = config.get("attention_dropout")
    number = isinstance(dropout, _NUMBER) and not isinstance(dropout, bool)
    if dropout is not None and not (number and 0 <= dropout < 1):
        raise UserError(f'{path}: "attention_dropout" must be at least 0 and below 1, not {json.dumps(dropout)}')
    _check_rope(path, config)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def _shown(value: float) -> str:
    return str(value) if isinstance(value, float) else f"an integer of {value.bit_length()} bits"


def _check_rope(path: Path, config: dict[str, Any]) -> None:
    """Newer transformers write ``rope_parameters``, older ones ``rope_theta``."""
    parameters = config.get("rope_parameters")
    theta = parameters.get("rope_theta") if isinstance(parameters, dict) else config.get("rope_theta")
    if theta is None:
        raise _missing(path, "rope_theta", config)
    if not isinstance(theta, _NUMBER) or isinstance(theta, bool) or not _finite(theta) or theta <= 0:
        raise UserError(f'{path}: "rope_theta" must be a positive number, not {json.dumps(theta)}')


def _missing(path: Path, name: str, config: dict[str, Any]) -> UserError:
    unknown = [key for key in config if key not in _FALCON_H1_FIELDS and key not in _FALCON_H1_LISTS]
    hint = suggestion(name, unknown).replace("did you mean", "is it misspelt as")
    return UserError(f'{path} lacks "{name}", without which the model would be another one{hint}')
