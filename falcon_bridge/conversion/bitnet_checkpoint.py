"""What is particular about the files of BitNet checkpoints: packed tensors, their shapes, values and scales."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falcon_bridge.conversion.bitnet_config import (
    SCALE_SUFFIX,
    has_packed_weights,
    is_bitnet,
    is_scale,
    is_ternary_weight,
    quantization_entry,
)
from falcon_bridge.conversion.hf_config import LLAMA, architecture_of
from falcon_bridge.conversion.safetensors_files import TensorInfo
from falcon_bridge.errors import UserError


CODES_PER_BYTE = 4
LATENTS_ARE_LOST = (
    "holds ternary codes: they and their scales are kept exactly, but the latent weights that the model was trained "
    "with are not in it; to train on, prefer a prequantized checkpoint"
)
"""What to tell of a packed or dequantised checkpoint."""


def is_packed(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether these are tensors of a packed checkpoint."""
    return has_packed_weights({name: info.dtype for name, info in tensors.items()})


def packed_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a packed checkpoint's tensors, from those of the dense model."""
    packed: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if not is_ternary_weight(name):
            packed[name] = shape
            continue
        packed[name] = (shape[0] // CODES_PER_BYTE, *shape[1:])
        packed[name + SCALE_SUFFIX] = (1,)
    return packed


def weights_form(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """The form of a BitNet Llama's weights (`models.falcon_edge.weights.Form`); None for any other model's.

    Args:
        config: config.json, checked.
        tensors: all tensors of the checkpoint, of which one is read.
    """
    if architecture_of(config) != LLAMA or not is_bitnet(config):
        return None
    from safetensors import safe_open

    from falcon_bridge.models.falcon_edge.weights import checkpoint_form

    def read(name: str):
        with safe_open(tensors[name].file, "pt") as file:
            return file.get_tensor(name)

    return str(checkpoint_form(quantization_entry(config), tensors, read))


def check_scales(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse packed weights without a scale, and scales without a packed weight.

    Raises:
        UserError: with the first such tensor.
    """
    for name, info in tensors.items():
        if is_ternary_weight(name):
            if info.dtype != "U8":
                raise UserError(
                    f"{directory}: {name} is {info.dtype} among packed (U8) weights, but either all projections are "
                    "packed or none: fetch it again"
                )
            if name + SCALE_SUFFIX not in tensors:
                raise UserError(
                    f"{directory} lacks {name}{SCALE_SUFFIX}, without which the packed weight has no magnitude: fetch "
                    "it again"
                )
        elif is_scale(name) and name.removesuffix(SCALE_SUFFIX) not in tensors:
            raise UserError(f"{directory} has {name} without its weight: fetch it again")


def check_packed_values(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
) -> None:
    """Read every packed weight and its scale; refuse what no packing of a BitNet model gives.

    Args:
        config: config.json.
        tensors: all tensors of the checkpoint.

    Raises:
        UserError: a code 3, a scale that is no positive number or whose meaning the config does not tell.
    """
    from safetensors import safe_open

    from falcon_bridge.models.falcon_edge.packing import dequantization_factor, unpack_ternary

    entry = quantization_entry(config)
    for name, info in tensors.items():
        if not is_ternary_weight(name):
            continue
        scale_name = name + SCALE_SUFFIX
        try:
            with safe_open(info.file, "pt") as file:
                unpack_ternary(file.get_tensor(name), name=name)
            with safe_open(tensors[scale_name].file, "pt") as file:
                dequantization_factor(file.get_tensor(scale_name), entry, name=scale_name)
        except ValueError as error:
            raise UserError(f"{info.file}: {error}") from None
