"""A Hugging Face checkpoint directory, found and checked."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from falcon_bridge.conversion.bitnet_checkpoint import (
    CODES_PER_BYTE,
    check_packed_values,
    check_scales,
    is_packed,
    packed_shapes,
)
from falcon_bridge.conversion.bitnet_config import is_bitnet, is_ternary_weight
from falcon_bridge.conversion.checksums import CHECKSUMS_NAME, verify_checksums
from falcon_bridge.conversion.hf_config import read_config
from falcon_bridge.conversion.safetensors_files import (
    EMBEDDING,
    INDEX_NAME,
    TIED_HEAD,
    TensorInfo,
    check_dtypes,
    check_values,
    read_headers,
    same_bits,
)
from falcon_bridge.errors import UserError, one_line


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md"}


@dataclass(frozen=True)
class HFCheckpoint:
    """A checked checkpoint.

    Attributes:
        path: its directory.
        config: config.json as it is written there.
        tensors: by name, from the files' headers; without a stored copy of a tied head.
        has_checksums: whether the files were compared with SHA-256 sums.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    has_checksums: bool = False

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def packed(self) -> bool:
        """Whether its projections are ternary codes, four to a byte."""
        return is_packed(self.tensors)

    @property
    def parameters(self) -> int:
        """Number of weights, whatever bytes they take."""
        return sum(self.matrix_sizes()) + sum(
            math.prod(info.shape) for name, info in self.tensors.items() if not is_ternary_weight(name)
        )

    def matrix_sizes(self) -> list[int]:
        """Number of weights of each ternary matrix."""
        per_element = CODES_PER_BYTE if self.packed else 1
        return [math.prod(info.shape) * per_element for name, info in self.tensors.items() if is_ternary_weight(name)]

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the weights."""
        return any((self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    def companions(self) -> list[Path]:
        """What belongs to the model besides weights: config, generation config, tokenizer, model card. Never code."""
        return sorted(
            path
            for path in self.path.iterdir()
            if path.is_file() and path.suffix in _COMPANION_SUFFIXES and path.name not in (INDEX_NAME, CHECKSUMS_NAME)
        )


def resolve_checkpoint(name: str | Path) -> Path:
    """The directory of a checkpoint given by path, or by Hugging Face hub id (downloaded to the hub's cache).

    Raises:
        UserError: neither; or the download failed.
    """
    path = Path(name)
    if not str(name).strip():
        raise UserError("the checkpoint's name is empty: give a Hugging Face checkpoint directory or a hub id")
    if path.is_dir():
        return path
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link that leads nowhere: correct it or give the directory itself")
    if path.exists():
        raise UserError(f"{path} is a file: give the checkpoint's directory")
    if not _HUB_ID.fullmatch(str(name)) or path.is_absolute():
        raise UserError(f"{path} does not exist: give a Hugging Face checkpoint directory or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:
        raise UserError(
            f"{name} is neither a directory nor a model that could be fetched from the hub ({one_line(error)})"
        ) from None


def check_checkpoint(
    name: str | Path,
    *,
    values: bool = True,
    allow_nonfinite: bool = False,
    ternary_falcon_h1: bool = False,
    progress: Callable[[str], None] = lambda tensor: None,
) -> HFCheckpoint:
    """Find and check a Hugging Face checkpoint: config, files, index, tensor names and shapes, values, sums.

    Args:
        name: a directory or hub id.
        values: also read every value, and compare the files with their SHA-256 sums where there are any.
        allow_nonfinite: accept NaN, infinite and absurdly large weights.
        ternary_falcon_h1: as `hf_config.read_config`.
        progress: called with the name of each tensor that was read.

    Raises:
        UserError: with the first thing that is wrong, and what to do.
    """
    path = resolve_checkpoint(name)
    config = read_config(path, ternary_falcon_h1=ternary_falcon_h1)
    tensors = read_headers(path)
    packed = is_bitnet(config) and is_packed(tensors)
    if packed:
        check_scales(path, tensors)
    floating = {name: info for name, info in tensors.items() if not (packed and is_ternary_weight(name))}
    check_dtypes(path, floating)
    _check_sizes(path, config, tensors)
    check_shapes(path, config, tensors)
    has_checksums = False
    if values:
        has_checksums = verify_checksums(path)
        if packed:
            check_packed_values(config, tensors)
        check_values(tensors, allow_nonfinite=allow_nonfinite, progress=progress)
    if config.get("tie_word_embeddings") and TIED_HEAD in tensors:
        if values and not same_bits(tensors[TIED_HEAD], tensors[EMBEDDING], (TIED_HEAD, EMBEDDING)):
            raise UserError(
                f"{path} ties {TIED_HEAD} to {EMBEDDING} (tie_word_embeddings), but stores a different {TIED_HEAD}: "
                "set tie_word_embeddings to false in config.json, or fetch it again"
            )
        del tensors[TIED_HEAD]
    return HFCheckpoint(path, config, tensors, has_checksums)


def expected_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that stock transformers' model of the directory's config has.

    A tied ``lm_head.weight`` is left out: checkpoints do not store it.

    Raises:
        UserError: transformers does not accept the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"transformers does not accept {path / 'config.json'} ({one_line(error)}): correct it"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _check_sizes(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    """Compare the depth and width of config.json with the files, before a model of an absurd size is built."""
    layers = 1 + max((int(match[1]) for name in tensors if (match := _LAYER.match(name))), default=-1)
    if layers != config["num_hidden_layers"]:
        raise UserError(
            f"{path}: the files have {layers} layers, but config.json asks for num_hidden_layers "
            f"{config['num_hidden_layers']}: correct config.json or fetch the weights again"
        )
    if EMBEDDING not in tensors:
        raise UserError(f"{path} lacks {EMBEDDING}: the files are not of the model in config.json")
    found, expected = list(tensors[EMBEDDING].shape), [config["vocab_size"], config["hidden_size"]]
    if found != expected:
        raise UserError(
            f"{path}: {EMBEDDING} has shape {found}, but config.json asks for {expected}: "
            "correct config.json or fetch the weights again"
        )


def check_shapes(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    """Compare a checkpoint's tensors with those of the model that its config describes.

    Raises:
        UserError: one is missing, left over, or of another shape; the message names the first and counts the rest.
    """
    expected = expected_shapes(path)
    if is_bitnet(config) and is_packed(tensors):
        expected = packed_shapes(expected)
    found = {name: info.shape for name, info in tensors.items()}
    if "lm_head.weight" not in expected:
        found.pop("lm_head.weight", None)
    wrong = [name for name in expected if found.get(name, expected[name]) != expected[name]]
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing:
        raise UserError(f"{path} lacks {_first(missing)}: the files are not of the model in config.json")
    if unknown:
        raise UserError(f"{path} has {_first(unknown)}, which the model in config.json does not: fetch it again")
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path}: {_first(wrong)} has shape {list(found[name])}, but config.json asks for {list(expected[name])}: "
            "correct config.json or fetch the weights again"
        )


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
