"""Indexed datasets by name: prefixes, weights, and the files behind them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_bridge.errors import UserError, one_line


@dataclass(frozen=True)
class WeightedDataset:
    """One dataset of a blend.

    Attributes:
        path: as the user wrote it, without the weight.
        weight: its share, relative to the others'; None where not given.
    """

    path: str
    weight: float | None


def parse_dataset(text: str | Path) -> WeightedDataset:
    """Read ``PATH`` or ``PATH:WEIGHT``.

    A number after the last colon is a weight, unless the files of the whole name exist.

    Raises:
        UserError: a weight that is not above 0.
    """
    text = str(text)
    path, colon, tail = text.rpartition(":")
    try:
        weight = float(tail) if colon and path else None
    except ValueError:
        weight = None
    if weight is None or Path(text).exists() or Path(f"{text}.idx").exists():
        return WeightedDataset(text, None)
    if not 0 < weight < float("inf"):
        raise UserError(f"--dataset {text}: the weight after the colon must be above 0, as in {path}:0.3")
    return WeightedDataset(path, weight)


def as_blend(datasets: Iterable[WeightedDataset]) -> list[Any]:
    """Megatron's ``blend``: the prefixes, and their weights (None for a single one).

    Where none is given the weights are the sizes, so that the datasets end together, epoch after epoch. Megatron's own
    None has the same shares, but data for one epoch only.

    Raises:
        UserError: files are missing, or some of the datasets have weights and others not.
    """
    datasets = list(datasets)
    prefixes = [dataset_prefix(dataset.path) for dataset in datasets]
    weights = [dataset.weight for dataset in datasets]
    if len(datasets) > 1 and None in weights and any(weight is not None for weight in weights):
        bare = datasets[weights.index(None)].path
        raise UserError(
            f"--dataset {bare} has no weight and others have one: give each its own, as in {bare}:0.7, or none, and "
            "they blend by their sizes"
        )
    if len(weights) == 1:
        return [prefixes, None]
    return [prefixes, weights if None not in weights else sizes(prefixes)]


def sizes(prefixes: Iterable[str]) -> list[float] | None:
    """Tokens of each dataset; None where one is in object storage.

    Raises:
        UserError: see `read_index`.
    """
    prefixes = list(prefixes)
    if any("://" in prefix for prefix in prefixes):
        return None
    return [float(read_index(prefix).tokens) for prefix in prefixes]


def dataset_prefix(path: str | Path) -> str:
    """The prefix of an indexed dataset given by it or by either file.

    Raises:
        UserError: one of the files is not there.
    """
    path = str(path)
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    check_files(prefix)
    return prefix


def check_files(prefix: str) -> None:
    """Raise where a local dataset has not both files; object storage is not looked at.

    Raises:
        UserError: one of the files is not there.
    """
    if "://" in prefix:
        return
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise UserError(
                f"{prefix}{suffix} does not exist: give the prefix of an indexed dataset (PREFIX.bin and PREFIX.idx; "
                "`falcon-bridge data prepare` makes one)"
            )


@dataclass(frozen=True)
class IndexedFiles:
    """What the index of a dataset says.

    Attributes:
        documents: how many.
        tokens: of all.
        dtype: numpy type of a token.
    """

    documents: int
    tokens: int
    dtype: Any


def read_index(prefix: str) -> IndexedFiles:
    """Read the index of a dataset and compare it with the size of its data.

    Raises:
        UserError: the index cannot be read, has no document, or is of other data.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        index = IndexedDataset(prefix, mmap=False).index
        documents, tokens = len(index.sequence_lengths), int(index.sequence_lengths.sum(dtype=np.int64))
        dtype = index.dtype
    except Exception as error:
        raise UserError(
            f"{prefix}.idx is not the index of an indexed dataset ({one_line(error)}): make it again"
        ) from error
    if documents == 0 or tokens == 0:
        raise UserError(f"{prefix} is empty: it has {documents} documents and {tokens} tokens")
    size, expected = Path(f"{prefix}.bin").stat().st_size, tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise UserError(
            f"{prefix}.bin has {size} bytes and its index describes {expected}: copy both files again, or make them "
            "again"
        )
    return IndexedFiles(documents, tokens, dtype)
