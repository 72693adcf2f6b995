"""Bit-exact comparison of exported tensors with the safetensors they came from."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from falcon_bridge.conversion.bitnet_config import is_scale
from falcon_bridge.conversion.export_format import SCALE_TOLERANCE
from falcon_bridge.conversion.safetensors_files import read_headers


def mismatched_tensors(path: str | Path, exported: Iterable[tuple[str, torch.Tensor]]) -> tuple[int, list[str]]:
    """Compare an export with its source, tensor for tensor and bit for bit.

    A source stored in another precision than the model's is first rounded to the model's. Scales of packed weights may
    differ by two units in the last place of fp32: not every scale is the fp32 reciprocal of an fp32 mean.

    Args:
        path: the source directory.
        exported: (name, tensor) pairs.

    Returns:
        How many tensors were compared, and the sorted names of those that differ in value, shape or presence.
    """
    source = read_headers(Path(path))
    missing = set(source)
    wrong, compared = [], 0
    for name, tensor in exported:
        compared += 1
        if name not in missing:
            wrong.append(name)  # unknown, or exported twice
            continue
        missing.discard(name)
        with safe_open(source[name].file, "pt") as file:
            expected = file.get_tensor(name)
        if is_scale(name) and tensor.shape == expected.shape:
            same = bool(((tensor.double() - expected.double()).abs() <= SCALE_TOLERANCE * expected.double()).all())
        else:
            same = _same_bits(tensor.to(expected.dtype), expected.to(tensor.dtype).to(expected.dtype))
        if not same:
            wrong.append(name)
    return compared + len(missing), sorted(wrong + list(missing))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )
