"""The three forms in which checkpoints hold a ternary matrix, and latent weights to and from each.

- latent (`prequantized` of Falcon-E): the weights that one trains, floating-point.
- packed (`main`): ternary codes, four to a byte, and a `weight_scale`.
- dequantised (`bfloat16`): codes times their factor, floating-point.

From the last two, latent weights can be made that quantise to the same codes and scale; those that the model was
trained with are lost.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from typing import Any

import torch

from falcon_bridge.bitnet.reference import quantize_weight
from falcon_bridge.conversion.bitnet_config import SCALE_SUFFIX, is_ternary_weight
from falcon_bridge.models.falcon_edge.packing import (
    dequantization_factor,
    latent_weight,
    pack_ternary,
    unpack_ternary,
)


class Form(StrEnum):
    """How a checkpoint holds its ternary matrices; values are those of ``convert export --format``."""

    LATENT = "prequantized"
    PACKED = "bitnet"
    DEQUANTIZED = "bf16"


_AMBIGUOUS = (
    "so whether this checkpoint's weights are latent is ambiguous: if they are, state it in config.json with "
    'quantization_config {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online", '
    '"modules_to_not_convert": ["lm_head"]}'
)


_nonfinite_allowed: ContextVar[bool] = ContextVar("nonfinite_allowed", default=False)


@contextmanager
def nonfinite_latents(allowed: bool = True) -> Iterator[None]:
    """Have `to_latent` take NaN and infinite latent weights as they are while the block runs, if `allowed`."""
    token = _nonfinite_allowed.set(allowed)
    try:
        yield
    finally:
        _nonfinite_allowed.reset(token)


def checkpoint_form(entry: Mapping[str, Any] | None, names: Iterable[str], read: Any) -> Form:
    """Tell the three forms apart.

    A floating-point matrix with a single magnitude besides zero is dequantised, unless the config says that weights
    are quantised online, which only latent ones are.

    Args:
        entry: The config's `quantization_config`.
        names: All tensors of the checkpoint.
        read: Gives a tensor by its name; called for one matrix, the first layer's `k_proj` or `out_proj`.

    Raises:
        ValueError: With one line: the checkpoint has no ternary matrix.
    """
    names = set(names)
    ternary = sorted(name for name in names if is_ternary_weight(name))
    if not ternary:
        raise ValueError(
            "no projection among the checkpoint's tensors, such as model.layers.0.self_attn.k_proj.weight"
        )
    if any(name + SCALE_SUFFIX in names for name in ternary):
        return Form.PACKED
    sample = read(next((name for name in ternary if name.endswith("k_proj.weight")), ternary[0]))
    if not sample.is_floating_point():
        return Form.PACKED
    if _states_latent(entry):
        return Form.LATENT
    return Form.DEQUANTIZED if _single_magnitude(sample) is not None else Form.LATENT


def to_latent(
    form: Form,
    name: str,
    tensor: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    entry: Mapping[str, Any] | None = None,
    shape: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Latent weights of one ternary matrix of a checkpoint.

    NaN and infinite weights are refused, latent ones unless `nonfinite_latents` allows them.

    Args:
        form: Of the checkpoint.
        name: Of the matrix; errors begin with it.
        tensor: As it is stored.
        scale: The stored `weight_scale` of a packed matrix; None where there is none.
        entry: The config's `quantization_config`, which tells what the scale means and may state that weights are
            latent.
        shape: `(out, in)` that the model wants, checked for packed matrices.
        dtype: Of latents that are made; stored ones keep theirs.

    Returns:
        `[out, in]`.

    Raises:
        ValueError: With one line that says what is wrong with the matrix.
    """
    if form == Form.PACKED:
        codes = unpack_ternary(tensor, shape=shape, name=name)
        return latent_weight(codes, dequantization_factor(scale, entry, name=name + SCALE_SUFFIX), dtype, name=name)
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name}: {tensor.dtype} among floating-point weights: either all projections are packed or none"
        )
    if not (form == Form.LATENT and _nonfinite_allowed.get()) and not tensor.isfinite().all():
        raise ValueError(
            f"{name}: has NaN or infinite weights, so the file is damaged or the model diverged: fetch it again, or "
            "take an earlier checkpoint"
        )
    if form == Form.LATENT:
        # 0 where all weights are zero, which says nothing
        if not _states_latent(entry) and _single_magnitude(tensor):
            raise ValueError(
                f"{name}: has a single magnitude (dequantised ternary weights), but other projections have more than "
                f"one, {_AMBIGUOUS}"
            )
        return tensor
    magnitude = _single_magnitude(tensor)
    if magnitude is None:
        raise ValueError(
            f"{name}: has more than one magnitude, but other projections have one (dequantised ternary weights), "
            f"{_AMBIGUOUS}"
        )
    return latent_weight(tensor.sign().to(torch.int8), magnitude, dtype, name=name)


def from_latent(form: Form, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Give a stream of whole Hugging Face tensors another form.

    Args:
        form: Of the result.
        tensors: Name and tensor, ternary matrices latent.

    Yields:
        Name and tensor; what is not ternary as it came. A packed matrix is uint8 `[out/4, in]`, followed by its
        `weight_scale`, fp32 `[1]`: training's scale ``1 / mean|W|``, and training's rounding. A dequantised one is
        ``codes / scale`` in fp32.

    Raises:
        ValueError: With one line: a matrix has NaN or infinite weights, or cannot be packed.
    """
    for name, tensor in tensors:
        if form == Form.LATENT or not is_ternary_weight(name):
            yield name, tensor
            continue
        codes, scale = quantize_weight(tensor)
        if not scale.isfinite():
            raise ValueError(
                f"{name}: has NaN or infinite weights, which no ternary code stands for: the model diverged; take an "
                "earlier checkpoint"
            )
        if form == Form.PACKED:
            yield name, pack_ternary(codes, name=name)
            yield name + SCALE_SUFFIX, scale.reshape(1)
        else:
            yield name, codes.float() / scale


def _states_latent(entry: Mapping[str, Any] | None) -> bool:
    """Whether a `quantization_config` says that weights are quantised in each forward pass."""
    return entry is not None and entry.get("quantization_mode") == "online"


def _single_magnitude(tensor: torch.Tensor) -> float | None:
    """The one magnitude besides zero of `tensor`; None where there are several, or it holds NaN or infinity."""
    magnitudes = tensor.abs()
    largest = magnitudes.max()
    single = largest.isfinite() and bool(((magnitudes == largest) | (magnitudes == 0)).all())
    return largest.item() if single else None
