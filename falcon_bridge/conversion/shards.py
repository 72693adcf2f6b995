"""Writing Hugging Face shards from a stream of tensors, holding no more than one shard in memory."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from falcon_bridge.conversion.safetensors_files import INDEX_NAME
from falcon_bridge.errors import JobError


MAX_SHARD_BYTES = 5_000_000_000


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, int]:
    """Write `tensors` as ``model.safetensors``, or as numbered shards with an index as transformers writes them.

    Args:
        tensors: name and tensor; consumed once.
        directory: where to write.
        max_shard_bytes: a shard is closed before it would exceed this.
        progress: called with each tensor's name as it is taken.

    Returns:
        Bytes of each tensor by name.

    Raises:
        JobError: a name comes twice.
    """
    from safetensors.torch import save_file

    sizes: dict[str, int] = {}
    shards: list[list[str]] = []
    buffer: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if buffer:
            save_file(buffer, directory / _partial_name(len(shards)), metadata={"format": "pt"})
            shards.append(list(buffer))
            buffer.clear()

    for name, tensor in tensors:
        if name in sizes:
            raise JobError(f"the model gave {name} twice: its parameter mapping is wrong")
        # a copy: views of one storage would be written whole, or refused
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        sizes[name] = tensor.numel() * tensor.element_size()
        if buffer and sum(sizes[key] for key in buffer) + sizes[name] > max_shard_bytes:
            flush()
        buffer[name] = tensor
        progress(name)
    flush()
    _name_shards(directory, shards, sizes)
    return sizes


def _partial_name(number: int) -> str:
    return f"shard-{number}.partial"


def _name_shards(directory: Path, shards: list[list[str]], sizes: dict[str, int]) -> None:
    if len(shards) == 1:
        (directory / _partial_name(0)).rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / _partial_name(number)).rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
