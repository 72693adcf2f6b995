"""Conversations to packed fine-tuning data."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from falcon_bridge.conversion.atomic import atomic_directory, check_target
from falcon_bridge.data.chat import ChatConverter
from falcon_bridge.data.info import (
    METADATA_NAME,
    SFT_INFO_NAME,
    TOKENIZER_NAME,
    TRAINING_NAME,
    VALIDATION_NAME,
    DatasetInfo,
)
from falcon_bridge.data.packing import (
    pack,
    packing_metadata,
    padded_lengths,
    split_every,
    write_metadata,
    write_packed,
)
from falcon_bridge.data.part import mask_prefix, part_prefix
from falcon_bridge.data.prepare import describe, merge_parts, no_document, token_dtype, worker_count
from falcon_bridge.data.tokenizer import load_tokenizer, vocabulary_digest, vocabulary_size
from falcon_bridge.data.units import TEXT, cut, find_sources
from falcon_bridge.data.workers import Progress, work_directory, write_parts
from falcon_bridge.errors import JobError, UserError


_VERSION = 1


def prepare_chat(
    inputs: Iterable[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    seq_length: int,
    pad_multiple: int = 1,
    truncate: bool = False,
    validation_share: float = 0.0,
    seed: int = 1234,
    split: str | None = None,
    workers: int | None = None,
    max_bad_rows: int = 1000,
    force: bool = False,
    progress: Progress = lambda stage, done, total, note: None,
) -> DatasetInfo:
    """Tokenize conversations with the chat template, mask all but the answers, and pack them into rows.

    The directory `out` has ``training.idx.parquet`` and, with `validation_share`, ``validation.idx.parquet`` for
    Megatron Bridge's packed datasets, the tokenizer, and ``dataset.json``. `training.dataset.use_sft_dataset` sets a
    recipe to it. As with `prepare.prepare_text` a run that was stopped is taken up again, and the number of workers
    changes nothing.

    Args:
        inputs: JSON Lines, Parquet or saved datasets with ``messages`` or ``conversations``; see `chat.conversation`.
        tokenizer: Hugging Face directory or hub id, with a chat template.
        out: directory to make.
        seq_length: tokens of a row; longer conversations are bad rows.
        pad_multiple: fill each conversation up to a multiple of this, with ``eos_token`` and without loss; see
            `training.sft_dataset.pad_multiple` for what a layout needs.
        truncate: cut longer conversations instead of leaving them out.
        validation_share: of the conversations, to hold out.
        seed: of the order in which conversations fill rows.
        split: of a dataset with several.
        workers: processes; one a core where None.
        max_bad_rows: rows that cannot be used are left out and listed; the job fails at more than these.
        force: replace `out`, or an unfinished job with other inputs.
        progress: told of every part.

    Returns:
        The description; its `extra` has the rows, the targets and the share of the rows that is filled.

    Raises:
        UserError: an input, the tokenizer, a length or the output cannot be used.
        JobError: too many bad rows, no conversation, or a damaged file.
    """
    if seq_length % pad_multiple:
        raise UserError(f"--seq-length {seq_length} must be a multiple of {pad_multiple}, which the layout needs")
    if not 0 <= validation_share < 1:
        raise UserError(f"--validation-share must be at least 0 and below 1, not {validation_share}")
    out = Path(os.path.abspath(out))
    check_target(out, force=force)
    sources = find_sources(inputs, split)
    text = [source.path for source in sources if source.kind == TEXT]
    if text:
        raise UserError(f"{text[0]} is text: conversations come as JSON Lines, Parquet or a saved dataset")
    units = cut(sources)
    loaded = load_tokenizer(tokenizer)
    dtype = token_dtype(vocabulary_size(loaded))
    # the last token of a conversation is a target only
    converter = ChatConverter(loaded, dtype, seq_length + 1, truncate)
    job = {
        "version": _VERSION,
        "kind": "chat",
        "vocabulary": vocabulary_digest(loaded),
        "template": loaded.chat_template,
        "seq_length": seq_length,
        "truncate": truncate,
    }
    with work_directory(out.with_name(f"{out.name}.partial"), job, sources, restart=force) as work:
        reports = write_parts(
            work,
            sources,
            units,
            converter,
            max_bad_rows=max_bad_rows,
            workers=worker_count(workers, len(units)),
            progress=progress,
        )
        info = describe("chat", tokenizer, loaded, sources, reports)
        if not info.documents:
            raise no_document(info)
        parts = [part_prefix(work, number) for number in range(len(reports))]
        merge_parts(parts, work / "whole", dtype)
        merge_parts([mask_prefix(part) for part in parts], work / "masks", np.uint8)
        info.seq_length, info.pad_multiple = seq_length, pad_multiple
        progress("pack", 0, 1, "")
        with atomic_directory(out, force=force) as target:
            info.extra = {
                "mask": "template" if converter.marked else "difference",
                "seed": seed,
                **_write_splits(target, work, info, validation_share, seed),
            }
            loaded.save_pretrained(target / TOKENIZER_NAME)
            info.write(target / SFT_INFO_NAME)
        progress("pack", 1, 1, f"{info.extra['training']['rows']:,} rows")
    return info


def _write_splits(target: Path, work: Path, info: DatasetInfo, share: float, seed: int) -> dict[str, dict]:
    """Pack and write the training conversations and those held out; the figures of each."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokens, masks = IndexedDataset(str(work / "whole")), IndexedDataset(str(work / "masks"))
    lengths = padded_lengths(tokens.sequence_lengths, info.pad_multiple)
    figures, metadata = {}, []
    names = {"training": TRAINING_NAME, "validation": VALIDATION_NAME}
    for (name, file), numbers in zip(names.items(), split_every(info.documents, share), strict=True):
        if not len(numbers):
            if name == "training":
                raise JobError(f"all {info.documents} conversations are held out: give more, or no --validation-share")
            continue
        packing = pack(lengths[numbers], info.seq_length, seed)
        counts = write_packed(
            target / file,
            packing,
            _Chosen(tokens, numbers),
            _Chosen(masks, numbers),
            lengths[numbers],
            info.eod,
        )
        metadata.append(packing_metadata(packing, lengths[numbers], info.seq_length))
        figures[name] = {"conversations": len(numbers), **counts, "filled": round(packing.efficiency, 4)}
    write_metadata(target / METADATA_NAME, metadata)
    return figures


class _Chosen:
    """Some documents of an indexed dataset."""

    def __init__(self, dataset, numbers: np.ndarray) -> None:
        self._dataset, self._numbers = dataset, numbers

    def __getitem__(self, number: int) -> np.ndarray:
        return self._dataset[int(self._numbers[number])]
