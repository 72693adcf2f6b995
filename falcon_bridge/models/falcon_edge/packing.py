"""Hugging Face's `bitnet` checkpoint format: ternary codes, four to a byte, and one `weight_scale` per matrix.

A matrix `[out, in]` is cut into four blocks of `out / 4` rows, and byte `[r, c]` holds, from its lowest bits up, the
codes at column `c` of row `r` of each block, plus one (source: `pack_weights` in transformers/integrations/bitnet.py).
It is always the whole Hugging Face matrix: neither sharded nor fused with others.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from falcon_bridge.bitnet.scales import FLOOR


QuantizationConfig = Mapping[str, Any] | Any
"""The `quantization_config` of config.json, or transformers' `BitNetQuantConfig`."""

CODES_PER_BYTE = 4
_LARGEST_FACTOR = 1e30  # above it fp32 could not hold the latent weights, some times as large
_SHIFTS = tuple(range(0, 2 * CODES_PER_BYTE, 2))
_LOW_BITS = 0b01010101


def pack_ternary(codes: torch.Tensor, *, name: str = "weight") -> torch.Tensor:
    """Pack ternary codes into bytes.

    Args:
        codes: `[out, in]` of -1, 0 and 1, any dtype; left as it is. `out` must be a multiple of 4.
        name: What errors call the tensor.

    Returns:
        uint8 `[out / 4, in]`.

    Raises:
        ValueError: With one line: not a matrix, `out` not divisible by 4, or a value that is no ternary code.
    """
    if codes.dim() != 2:
        raise ValueError(f"{name}: only a matrix [out, in] can be packed, got {list(codes.shape)}")
    if codes.shape[0] % CODES_PER_BYTE:
        raise ValueError(
            f"{name}: {codes.shape[0]} out features are not a multiple of {CODES_PER_BYTE}, so the packed bitnet "
            "format cannot hold the matrix: export as prequantized or bf16"
        )
    ternary = (codes == -1) | (codes == 0) | (codes == 1)
    if not ternary.all():
        row, column = _first(~ternary)
        raise ValueError(
            f"{name}: value {codes[row, column].item()} at [{row}, {column}] is not a ternary code (-1, 0 or 1)"
        )
    digits = (codes.to(torch.int8) + 1).to(torch.uint8)
    packed = torch.zeros_like(digits[: codes.shape[0] // CODES_PER_BYTE])
    for shift, block in zip(_SHIFTS, digits.chunk(CODES_PER_BYTE), strict=True):
        packed |= block << shift
    return packed


def unpack_ternary(
    packed: torch.Tensor, *, shape: tuple[int, int] | None = None, name: str = "weight"
) -> torch.Tensor:
    """Unpack bytes into ternary codes.

    Args:
        packed: uint8 `[out / 4, in]`.
        shape: The `(out, in)` that the model wants, checked where given.
        name: What errors call the tensor.

    Returns:
        int8 `[out, in]` of -1, 0 and 1.

    Raises:
        ValueError: With one line: wrong dtype or shape, or a byte that holds 3, which stands for no code.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(
            f"{name}: packed ternary weights are uint8, got {packed.dtype}: this checkpoint's weights are not packed, "
            "or its quantization_config does not belong to it"
        )
    if packed.dim() != 2:
        raise ValueError(f"{name}: packed ternary weights are a matrix [out/4, in], got {list(packed.shape)}")
    rows, columns = packed.shape
    if shape is not None and (rows * CODES_PER_BYTE, columns) != tuple(shape):
        raise ValueError(
            f"{name}: packed shape {[rows, columns]} holds a weight {[rows * CODES_PER_BYTE, columns]}, but the "
            f"model's is {list(shape)}"
        )
    threes = packed & (packed >> 1) & _LOW_BITS
    if threes.any():
        row, column = _first(threes != 0)
        byte = packed[row, column].item()
        block = next(i for i, shift in enumerate(_SHIFTS) if byte >> shift & 3 == 3)
        raise ValueError(
            f"{name}: byte 0x{byte:02x} at [{row}, {column}] holds the code 3 for weight "
            f"[{block * rows + row}, {column}], but ternary codes are 0, 1 and 2: the file is damaged or not in the "
            "packed bitnet format"
        )
    codes = torch.empty(rows * CODES_PER_BYTE, columns, dtype=torch.int8, device=packed.device)
    for shift, block in zip(_SHIFTS, codes.view(CODES_PER_BYTE, rows, columns), strict=True):
        block.copy_(packed >> shift & 3)
    return codes.sub_(1)


def dequantization_factor(
    weight_scale: torch.Tensor | None,
    quantization_config: QuantizationConfig | None,
    *,
    name: str = "weight_scale",
) -> float:
    """The factor that turns a matrix's codes into its weights, from the stored `weight_scale`.

    Two conventions share the name, and only `quantization_config` tells them apart: `linear_class` "bitlinear", also
    where it is not given (Falcon-E, Falcon3-1.58bit), stores the quantisation scale ``1 / mean|W|``; "autobitlinear"
    with `quantization_mode` "offline", also where that is not given (microsoft/bitnet-b1.58-2B-4T), stores
    ``mean|W|``. Source: `BitLinear` and `AutoBitLinear` in transformers/integrations/bitnet.py, defaults of its
    `BitNetQuantConfig`.

    Args:
        weight_scale: Floating-point, `[1]` or a scalar; None where the checkpoint has none.
        quantization_config: What says which convention holds.
        name: What errors call the tensor.

    Returns:
        The positive factor: ``weight = codes · factor``.

    Raises:
        ValueError: With one line: the scale is missing, of a wrong shape or dtype, or not a positive finite number; or
            the config is missing, contradicts a stored scale, or names a convention that transformers does not have.
    """
    inverse = _scale_is_inverse(quantization_config, name)
    if weight_scale is None:
        raise ValueError(f"{name}: missing, so the packed weights have no magnitude: the checkpoint is incomplete")
    if not weight_scale.is_floating_point() or weight_scale.numel() != 1 or weight_scale.dim() > 1:
        raise ValueError(
            f"{name}: must be one floating-point number of shape [1], got {weight_scale.dtype} "
            f"{list(weight_scale.shape)}"
        )
    value = weight_scale.item()
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: must be positive and finite, got {value}: the file is damaged")
    factor = 1.0 / value if inverse else value
    if factor > _LARGEST_FACTOR:
        wrong = "small to be 1 / mean|W|" if inverse else "large to be mean|W|"
        raise ValueError(f"{name}: {value} is too {wrong}: the file is damaged")
    return factor


def latent_weight(
    codes: torch.Tensor, factor: float, dtype: torch.dtype = torch.float32, *, name: str = "weight"
) -> torch.Tensor:
    """A weight to train on that quantises to given codes and to the scale ``1 / factor``.

    ``codes · factor`` itself would not do: its mean absolute value is `factor` times the share of non-zero codes, and
    the model's outputs would shrink to that share, about two thirds. The magnitude is therefore ``factor / share``;
    where `dtype` does not have that value, the two neighbours are mixed such that the mean is right. What the weights
    were before quantisation is lost either way.

    Args:
        codes: int8 `[out, in]` of -1, 0 and 1: the whole Hugging Face matrix.
        factor: Mean absolute value of the original weight, from `dequantization_factor`.
        dtype: fp32 or bf16, of the result.
        name: What errors call the tensor.

    Returns:
        `[out, in]` in `dtype`. `bitnet.reference.quantize_weight` gives the codes back bit for bit, and the scale to
        within two units in the last place of fp32: exactly where it is ``1 / mean|W|`` of some fp32 mean, as all of
        training's are. (With bf16 that takes some 2^16 non-zero codes; of n the scale is off by 2^-9 / n.)

    Raises:
        ValueError: With one line: the scale would be below the least mean absolute value that BitNet divides by.
    """
    nonzero = int(codes.count_nonzero())
    if nonzero == 0:
        return codes.to(dtype)
    mean = _mean_behind(1 / factor)
    if mean < FLOOR * (1 - 1e-6):
        raise ValueError(
            f"{name}: mean|W| {factor:.3g} is below {FLOOR}, the least that BitNet's scale is computed from: its "
            "outputs would change; the file is damaged or not of a BitNet model"
        )
    total = mean * codes.numel()
    low = torch.tensor(total / nonzero, dtype=torch.float64).to(dtype)
    if low.double() * nonzero > total:
        low = _next(low, -1)
    high = _next(low, 1)
    raised = round((total - low.item() * nonzero) / (high.item() - low.item()))
    magnitudes = codes.to(dtype).mul_(low)
    if raised:
        flat = magnitudes.view(-1)
        chosen = flat.nonzero().view(-1)[:raised]
        flat[chosen] = high.copysign(flat[chosen])
    return magnitudes


def _mean_behind(scale: float) -> float:
    """The fp32 mean whose fp32 reciprocal is `scale`, or comes nearest to it: not every fp32 number is one."""
    scale = torch.tensor(scale, dtype=torch.float64).float()
    middle = 1 / scale
    candidates = torch.stack([_next(middle, -1), middle, _next(middle, 1)])
    return candidates[(1 / candidates - scale).abs().argmin()].item()


def _next(value: torch.Tensor, step: int) -> torch.Tensor:
    """The next (1) or previous (-1) number of a positive fp32 or bf16 scalar's dtype."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[value.dtype]
    return (value.view(integers) + step).view(value.dtype)


def _scale_is_inverse(quantization_config: QuantizationConfig | None, name: str) -> bool:
    """Whether `weight_scale` is 1/mean|W| rather than mean|W|."""
    if quantization_config is None:
        raise ValueError(
            f"{name}: config.json has no quantization_config, so the scale could be mean|W| or its inverse: restore "
            "the entry of the published config.json"
        )
    config = quantization_config if isinstance(quantization_config, Mapping) else vars(quantization_config)
    method = config.get("quant_method")
    method = getattr(method, "value", method)
    if method != "bitnet":
        raise ValueError(f"{name}: quantization_config.quant_method is {method!r}, and only 'bitnet' is understood")
    linear_class = config.get("linear_class", "bitlinear")
    mode = config.get("quantization_mode", "offline")
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise ValueError(
            f"{name}: quantization_config.linear_class is {linear_class!r}, so the scale could be mean|W| or its "
            "inverse: it must be 'bitlinear' or 'autobitlinear'"
        )
    if mode != "offline":
        raise ValueError(
            f"{name}: quantization_config.quantization_mode is {mode!r}, but only 'offline' has a stored scale: with "
            "'online' the weights are latent and their scale is computed; correct the entry or remove the scale"
        )
    return linear_class == "bitlinear"


def _first(mask: torch.Tensor) -> tuple[int, int]:
    """Row and column of the first True of a matrix, in row-major order."""
    return divmod(int(mask.flatten().to(torch.uint8).argmax()), mask.shape[1])
