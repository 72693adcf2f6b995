"""The data of a recipe: set by name, and checked before a run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from falcon_bridge.data.info import is_sft_dataset, text_info
from falcon_bridge.errors import UserError
from falcon_bridge.training.blend import as_blend, check_files, parse_dataset, read_index, sizes
from falcon_bridge.training.documents import check_documents
from falcon_bridge.training.sft_dataset import check_sft_dataset, sync_sft_dataset, use_sft_dataset
from falcon_bridge.training.vocabulary import check_tokenizer, check_vocabulary, largest_token


__all__ = ["check_dataset", "prefixes", "use_dataset", "use_sft_dataset"]

_SPLITS = ("training", "validation", "test")


def use_dataset(cfg: Any, datasets: str | Path | Iterable[str | Path]) -> None:
    """Train on prepared data.

    Args:
        cfg: a ``ConfigContainer``; changed in place.
        datasets: one or several. For pretraining, indexed datasets (``.bin`` and ``.idx``, as
            ``falcon-bridge data prepare`` or Megatron's own preprocessing writes them): their common prefix or either
            file, with ``:WEIGHT`` behind each or none of them. Without weights they blend by their sizes. For
            fine-tuning, one directory that ``falcon-bridge data prepare-chat`` made.

    Raises:
        UserError: a file is not there, a weight cannot be used, or the data is not of the recipe's kind.
    """
    given = [datasets] if isinstance(datasets, str | Path) else list(datasets)
    parsed = [parse_dataset(text) for text in given]
    if not parsed:
        raise UserError("no dataset: give the prefix of one")
    chat = [dataset.path for dataset in parsed if is_sft_dataset(dataset.path)]
    if chat:
        if len(parsed) > 1:
            raise UserError(
                f"{chat[0]} is packed chat data, which does not blend: prepare all conversations as one "
                "(`falcon-bridge data prepare-chat A B …`)"
            )
        if not _is_sft(cfg):
            raise UserError(f"{chat[0]} is packed chat data and this recipe pretrains: use an sft or peft recipe")
        use_sft_dataset(cfg, chat[0])
        return
    if _is_sft(cfg):
        raise UserError(
            f"this recipe fine-tunes on packed chat data, which {parsed[0].path} is not: make it with "
            "`falcon-bridge data prepare-chat CHAT.jsonl --tokenizer HF --out DIR --seq-length N`"
        )
    cfg.dataset.blend, cfg.dataset.blend_per_split = as_blend(parsed), None
    cfg.dataset.data_path = None


def check_dataset(cfg: Any) -> None:
    """Bring the configuration in line with its data, and refuse data that cannot be trained on.

    To be called once all overrides are applied. Data that is not there yet (mock data, hub datasets, object storage)
    is not looked at.

    Args:
        cfg: a ``ConfigContainer``.

    Raises:
        UserError: with one line that says what to change, for files that are missing, damaged or empty; a split that
            the run uses and that gets no document (Megatron would count its epochs for ever); tokens that the model
            does not have; another tokenizer than the model's; rows longer than the model's context; a layout that the
            data does not fit.
    """
    _check_context(cfg)
    if _is_sft(cfg):
        if cfg.dataset.dataset_root is not None and is_sft_dataset(cfg.dataset.dataset_root):
            sync_sft_dataset(cfg)
            check_sft_dataset(cfg)
        return
    if not hasattr(cfg.dataset, "blend"):
        return
    check_documents(cfg)
    for prefix, splits in prefixes(cfg):
        check_files(prefix)
        if "://" in prefix:
            continue
        files = read_index(prefix)
        for name, bounds in splits.items():
            # as the dataset builder rounds them
            if round(bounds[0] * files.documents) == round(bounds[1] * files.documents):
                raise UserError(
                    f"{prefix} has {files.documents} documents, of which dataset.split={cfg.dataset.split} gives none "
                    f"to {name}: choose another, such as dataset.split=\"'80,10,10'\""
                )
        info = text_info(prefix)
        largest = info.max_token_id if info else largest_token(prefix, files.dtype)
        check_vocabulary(prefix, largest, cfg.model.vocab_size)
        if info:
            check_tokenizer(cfg, prefix, info)
    blend = cfg.dataset.blend
    if blend is not None and len(blend[0]) > 1 and blend[1] is None:
        cfg.dataset.blend = [blend[0], sizes(blend[0])]  # as `as_blend` has it


def _is_sft(cfg: Any) -> bool:
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig

    return isinstance(cfg.dataset, GPTSFTDatasetConfig)


def _check_context(cfg: Any) -> None:
    length = getattr(cfg.dataset, "seq_length", None)
    context = getattr(cfg.model, "max_position_embeddings", None)
    if length and context and length > context:
        raise UserError(
            f"dataset.seq_length={length} is longer than the model's context of {context} tokens: shorten it, or "
            f"extend the context with model.max_position_embeddings={length}"
        )


def prefixes(cfg: Any) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """The prefixes of the data, each with the bounds of the splits that the run takes from it."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )
    from megatron.core.datasets.utils import get_blend_from_list

    dataset = cfg.dataset
    if dataset.blend_per_split is not None:
        # a whole dataset a split
        return [(prefix, {}) for blend in dataset.blend_per_split if blend is not None for prefix in blend[0]]
    blend = dataset.blend
    if blend is None and dataset.data_path is not None:
        paths = dataset.data_path
        blend = get_blend_from_list(paths.split() if isinstance(paths, str) else list(paths))
    if blend is None:
        return []
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(dataset.split)) if dataset.split else ()
    # Megatron builds every split, also those that are never evaluated, and counts an empty one's epochs for ever
    splits = {name: bounds for name, bounds in zip(_SPLITS, matrix, strict=False) if bounds is not None}
    return [(prefix, splits) for prefix in blend[0]]
