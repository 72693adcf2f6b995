"""Bit-exact comparison of two Hugging Face checkpoint directories."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from falcon_bridge.conversion.safetensors_files import read_headers


@dataclass(frozen=True)
class Comparison:
    """What differs between two checkpoints.

    Attributes:
        params_compared: tensors in either.
        mismatched: names of tensors that are not in both with the same dtype, shape and bits.
        config_differences: fields of config.json that differ, with both values.
    """

    params_compared: int
    mismatched: list[str] = field(default_factory=list)
    config_differences: dict[str, tuple] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.mismatched and not self.config_differences


def compare_checkpoints(first: Path, second: Path) -> Comparison:
    """Compare every tensor bit by bit, and config.json field by field.

    Args:
        first: a Hugging Face checkpoint directory.
        second: another.
    """
    import torch
    from safetensors import safe_open

    left, right = read_headers(first), read_headers(second)
    mismatched = sorted(left.keys() ^ right.keys())
    for name in sorted(left.keys() & right.keys()):
        a, b = left[name], right[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            mismatched.append(name)
            continue
        with safe_open(a.file, "pt") as file_a, safe_open(b.file, "pt") as file_b:
            bits = [f.get_tensor(name).reshape(-1).view(torch.uint8) for f in (file_a, file_b)]
        if not torch.equal(*bits):
            mismatched.append(name)
    return Comparison(len(left.keys() | right.keys()), mismatched, _config_differences(first, second))


def _config_differences(first: Path, second: Path) -> dict[str, tuple]:
    left, right = (json.loads((path / "config.json").read_text()) for path in (first, second))
    return {
        name: (left.get(name), right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name, ...) != right.get(name, ...)
    }
