"""The safetensors files of a checkpoint directory, checked byte by byte before anything is built from them."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from falcon_bridge.errors import UserError, one_line


INDEX_NAME = "model.safetensors.index.json"
EMBEDDING, TIED_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FETCH = "fetch it again"
# no weight of a trained model is near it; a flipped exponent bit of a float is beyond it
_ABSURD = 1e8


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the header of its file."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16, …
    shape: tuple[int, ...]
    nbytes: int


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint directory by name, from the files' headers.

    Raises:
        UserError: no safetensors; a file is truncated or its header damaged; the index names a file or tensor that is
            not there, or leaves one out; a tensor is in two files.
    """
    names = _file_names(directory)
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        for tensor, info in _read_header(directory / name).items():
            if tensor in tensors:
                raise UserError(f"{directory} has {tensor} twice, in {tensors[tensor].file.name} and {name}: {_FETCH}")
            tensors[tensor] = info
    _check_index(directory, tensors)
    return tensors


def check_dtypes(directory: Path, tensors: dict[str, TensorInfo]) -> None:
    """Refuse dtypes that no unquantised checkpoint has (fp8, integers), before a value is read.

    Raises:
        UserError: with the dtype and its first tensor.
    """
    for name, info in tensors.items():
        if info.dtype not in ("F32", "BF16", "F16", "F64"):
            raise UserError(
                f"{directory} stores {name} as {info.dtype}: quantised checkpoints are not supported, dequantise it "
                "first and save it in float32 or bfloat16"
            )


def same_bits(first: TensorInfo, second: TensorInfo, names: tuple[str, str]) -> bool:
    """Whether two stored tensors have the same dtype, shape and bits.

    Args:
        first: where one lies.
        second: where the other lies.
        names: their names there.
    """
    import torch
    from safetensors import safe_open

    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with safe_open(first.file, "pt") as file_a, safe_open(second.file, "pt") as file_b:
        a, b = file_a.get_tensor(names[0]), file_b.get_tensor(names[1])
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check_values(
    tensors: dict[str, TensorInfo], *, allow_nonfinite: bool, progress: Callable[[str], None] = lambda name: None
) -> None:
    """Read every tensor; refuse values that no sound checkpoint has.

    Raises:
        UserError: a tensor has NaN, infinite or absurdly large (> 1e8) values, and not `allow_nonfinite`.
    """
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for name, info in tensors.items():
        by_file.setdefault(info.file, []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in names:
                if not allow_nonfinite:
                    _check_tensor(path, name, file.get_tensor(name))
                progress(name)


def _check_tensor(path: Path, name: str, tensor) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # the largest magnitude is NaN where any value is
    largest = tensor.abs().max().float().item()
    if largest < _ABSURD:
        return
    found = "NaN values" if largest != largest else f"a value of magnitude {largest:.1e}"
    raise UserError(
        f"{path}: {name} has {found}: the file is damaged or the model diverged; {_FETCH}, "
        "or convert it as it is with --allow-nonfinite"
    )


def _file_names(directory: Path) -> list[str]:
    index = directory / INDEX_NAME
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{index} names {name!r}, which is not a file of {directory}: {_FETCH}")
            if not (directory / name).is_file():
                raise UserError(f"{directory} lacks {name}, which its {INDEX_NAME} names: fetch the missing file")
        return names
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        other = sorted(path.name for path in (*directory.glob("*.bin"), *directory.glob("*.pt")))
        hint = (
            f" (it has {other[0]}, which is not safe to load: save it with safe_serialization=True)" if other else ""
        )
        raise UserError(f"{directory} has no safetensors files{hint}: give a Hugging Face checkpoint directory")
    return names


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for pair in mapping.items() for name in pair):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not a safetensors index: {_FETCH}") from None
    return mapping


def _check_index(directory: Path, tensors: dict[str, TensorInfo]) -> None:
    index = directory / INDEX_NAME
    if not index.is_file():
        return
    mapping = _weight_map(index)
    for name, file in mapping.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{index} places {name} in {file}, which does not have it: {_FETCH}")
    for name, info in tensors.items():
        if name not in mapping:
            raise UserError(f"{info.file} has {name}, which is not in {INDEX_NAME}: {_FETCH}")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        file = path.open("rb")
    except OSError as error:  # a directory, a loop of links, no permission
        raise UserError(f"{path} cannot be read as a file ({one_line(error)}): {_FETCH}") from None
    with file:
        size = path.stat().st_size
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository")
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
        if 8 + length > size:
            raise UserError(f"{path} is truncated or damaged: its header does not fit in its {size} bytes; {_FETCH}")
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        infos = {
            name: TensorInfo(
                path, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} has a damaged header: {_FETCH}") from None
    if 8 + length + end > size:
        raise UserError(f"{path} is truncated: it has {size} bytes of {8 + length + end}; {_FETCH}")
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass  # safetensors' own checks: dtypes, gaps and overlaps between tensors, trailing bytes
    except SafetensorError as error:
        raise UserError(f"{path} has a damaged header ({error}): {_FETCH}") from None
    return infos
