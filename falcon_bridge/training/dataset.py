"""Indexed datasets of a recipe, checked before a run."""

from pathlib import Path
from typing import Any

from falcon_bridge.errors import UserError, one_line


_SPLITS = ("training", "validation", "test")


def use_dataset(cfg: Any, path: str | Path) -> None:
    """Train on an indexed dataset (``.bin`` and ``.idx``, as Megatron's preprocessing writes it).

    Args:
        cfg: a ``ConfigContainer``; changed in place.
        path: the files' common prefix, or either file.

    Raises:
        UserError: one of the files is not there.
    """
    prefix = Path(path).with_suffix("") if Path(path).suffix in (".bin", ".idx") else Path(path)
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise UserError(
                f"{prefix}{suffix} does not exist: give the prefix of an indexed dataset (PREFIX.bin and PREFIX.idx)"
            )
    cfg.dataset.blend = [[str(prefix)], None]


def check_dataset(cfg: Any) -> None:
    """Refuse an indexed dataset with an empty split: Megatron would count its epochs for ever.

    Args:
        cfg: a ``ConfigContainer``; one with a blend of prefixes is checked, others are not.

    Raises:
        UserError: a file cannot be read, or a split that the run uses gets no document.
    """
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    blend, split = getattr(cfg.dataset, "blend", None), getattr(cfg.dataset, "split", None)
    if blend is None or split is None:
        return
    evaluated = bool(cfg.validation.eval_iters)
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for prefix in (part for part in blend[0] if Path(f"{part}.idx").is_file()):
        documents = _documents(prefix)
        for name, bounds in zip(_SPLITS, matrix, strict=True):
            if bounds is None or (name != "training" and not evaluated):
                continue
            # as the dataset builder rounds them
            if round(bounds[0] * documents) == round(bounds[1] * documents):
                raise UserError(
                    f"{prefix} has {documents} documents, of which dataset.split={split} gives none to {name}: "
                    "choose another, such as dataset.split=\"'80,10,10'\", or set validation.eval_iters=0"
                )


def _documents(prefix: str) -> int:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        return len(IndexedDataset(prefix).sequence_lengths)
    except Exception as error:
        raise UserError(
            f"{prefix}.idx is not the index of an indexed dataset ({one_line(error)}): make it again"
        ) from error
