"""Bit-exact comparison of two Hugging Face checkpoint directories."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from falcon_bridge.conversion.bitnet_config import is_scale
from falcon_bridge.conversion.export_format import SCALE_TOLERANCE
from falcon_bridge.conversion.safetensors_files import EMBEDDING, TIED_HEAD, TensorInfo, read_headers, same_bits


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

    An ``lm_head.weight`` stored beside the embedding that it is tied to, and equal to it, counts as not stored. The
    scales of packed weights may differ by two units in the last place of fp32, and in dtype: not every scale is the
    fp32 reciprocal of an fp32 mean.

    Args:
        first: a Hugging Face checkpoint directory.
        second: another.
    """
    left, right = _tensors(first), _tensors(second)
    mismatched = sorted(left.keys() ^ right.keys())
    mismatched += [name for name in sorted(left.keys() & right.keys()) if not _same(name, left[name], right[name])]
    return Comparison(len(left.keys() | right.keys()), mismatched, _config_differences(first, second))


def _same(name: str, left: TensorInfo, right: TensorInfo) -> bool:
    if same_bits(left, right, (name, name)):
        return True
    if not is_scale(name) or left.shape != right.shape:
        return False
    from safetensors import safe_open

    with safe_open(left.file, "pt") as file_a, safe_open(right.file, "pt") as file_b:
        a, b = file_a.get_tensor(name).double(), file_b.get_tensor(name).double()
    return bool(((a - b).abs() <= SCALE_TOLERANCE * a.abs()).all())


def _tensors(directory: Path) -> dict[str, TensorInfo]:
    tensors = read_headers(directory)
    tied = json.loads((directory / "config.json").read_text()).get("tie_word_embeddings")
    names = (TIED_HEAD, EMBEDDING)
    if tied and tensors.keys() >= set(names) and same_bits(*(tensors[name] for name in names), names):
        del tensors[TIED_HEAD]
    return tensors


def _config_differences(first: Path, second: Path) -> dict[str, tuple]:
    left, right = (json.loads((path / "config.json").read_text()) for path in (first, second))
    return {
        name: (left.get(name), right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name, ...) != right.get(name, ...)
    }
