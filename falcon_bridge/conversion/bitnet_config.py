"""BitNet's marks in config.json, and the names of the tensors that they are about. Imports neither Megatron nor torch.

The two marks are ``is_bitnet_config: true`` and a `quantization_config` with ``quant_method: "bitnet"``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from falcon_bridge.bitnet.modules import TERNARY_MODULES


SCALE_SUFFIX = "_scale"
"""What the name of a packed weight's scale has more than the weight's."""

PACKED_ENTRY = {
    "quant_method": "bitnet",
    "linear_class": "bitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}
"""`quantization_config` of a packed checkpoint whose `weight_scale` is ``1 / mean|W|``."""

LATENT_ENTRY = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
    "modules_to_not_convert": ["lm_head"],
}
"""`quantization_config` of latent weights, with which stock transformers quantises them in every forward pass."""

_PROJECTIONS = "|".join(name for module in TERNARY_MODULES for name in module.hugging_face)
_TERNARY_WEIGHT = re.compile(rf"model\.layers\.\d+\.\w+\.({_PROJECTIONS})\.weight")


def is_ternary_weight(name: str) -> bool:
    """Whether `name` is a Hugging Face weight of one of `TERNARY_MODULES`, of Falcon-Edge or of Falcon-H1."""
    return _TERNARY_WEIGHT.fullmatch(name) is not None


def is_scale(name: str) -> bool:
    """Whether `name` is the `weight_scale` of such a weight."""
    return name.endswith(SCALE_SUFFIX) and is_ternary_weight(name.removesuffix(SCALE_SUFFIX))


def has_packed_weights(dtypes: Mapping[str, str]) -> bool:
    """Whether a checkpoint is packed, by the safetensors dtypes of its tensors."""
    return any(is_scale(name) or (dtype == "U8" and is_ternary_weight(name)) for name, dtype in dtypes.items())


def with_scales(names: Iterable[str]) -> list[str]:
    """`names`, each ternary weight followed by its scale: the tensors of a packed checkpoint."""
    return [part for name in names for part in ([name, name + SCALE_SUFFIX] if is_ternary_weight(name) else [name])]


def quantization_entry(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a transformers config (or of config.json as a mapping), as a dictionary."""
    entry = _get(config, "quantization_config")
    if entry is None:
        return None
    return dict(entry) if isinstance(entry, Mapping) else dict(vars(entry))


def is_bitnet(config: Any) -> bool:
    """Whether a transformers config (or config.json as a mapping) carries one of BitNet's two marks."""
    return _get(config, "is_bitnet_config") is True or _method(quantization_entry(config) or {}) == "bitnet"


def check_quantization_entry(entry: Mapping[str, Any] | None) -> None:
    """Refuse a `quantization_config` that asks for another model than ours.

    Args:
        entry: What `quantization_entry` returns; None is fine.

    Raises:
        ValueError: With one line that names the field.
    """
    if entry is None:
        return
    if _method(entry) != "bitnet":
        raise ValueError(
            f"config.json: quantization_config.quant_method is {_method(entry)!r}, and only 'bitnet' is understood: "
            "dequantise the checkpoint first (to float32 or bfloat16)"
        )
    if entry.get("use_rms_norm"):
        raise ValueError(
            "config.json: quantization_config.use_rms_norm puts a norm before every linear layer, which Falcon-Edge "
            "does not have: it is not supported"
        )
    kept = entry.get("modules_to_not_convert")
    if kept is not None and kept != ["lm_head"]:
        raise ValueError(
            f"config.json: quantization_config.modules_to_not_convert is {kept!r}, but here every linear layer is "
            'ternary except the head: it must be ["lm_head"]'
        )


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _method(entry: Mapping[str, Any]) -> Any:
    method = entry.get("quant_method")
    return getattr(method, "value", method)
