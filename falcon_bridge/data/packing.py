"""Conversations packed into rows of one length, in the Parquet format of Megatron Bridge."""

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


_ROWS_A_GROUP = 256


@dataclass(frozen=True)
class Packing:
    """Which conversations each row holds.

    Attributes:
        rows: numbers of conversations, by row.
        efficiency: share of the rows that is tokens of conversations.
    """

    rows: list[list[int]]
    efficiency: float


def padded_lengths(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """How many tokens of input each conversation takes in a row.

    The input is a conversation without its last token, which is a target only; it is filled up to a multiple of
    `multiple`.

    Args:
        lengths: tokens of the conversations.
        multiple: see `training.sft_dataset.pad_multiple`.
    """
    return -(-(lengths.astype(np.int64) - 1) // multiple) * multiple


def pack(lengths: np.ndarray, row_length: int, seed: int) -> Packing:
    """Put conversations into rows, first-fit in random order (Megatron Bridge's ``first_fit``).

    Args:
        lengths: what each takes in a row; none above `row_length`.
        row_length: tokens of input of a row.
        seed: of the order.

    Returns:
        The packing; the same for the same arguments.
    """
    from megatron.bridge.data.packing.algorithms import first_fit

    order = np.random.default_rng(seed).permutation(len(lengths))
    shuffled = lengths[order]
    waiting: dict[int, deque[int]] = defaultdict(deque)
    for number, length in zip(order.tolist(), shuffled.tolist(), strict=True):
        waiting[length].append(number)
    # it tells lengths, not which: of equal ones the next in order
    bins = first_fit(shuffled.tolist(), row_length)
    rows = [[waiting[length].popleft() for length in lengths_of_row] for lengths_of_row in bins]
    return Packing(rows, float(lengths.sum() / (len(rows) * row_length)) if rows else 0.0)


def write_packed(path: Path, packing: Packing, tokens, masks, lengths: np.ndarray, pad_token: int) -> dict[str, int]:
    """Write rows as Megatron Bridge's ``GPTSFTPackedParquetDataset`` reads them.

    A row has ``input_ids``, the first positions of its conversations (``seq_start_id``), and ``loss_mask``, which is 1
    where the *next* token is a target. Each conversation has one token more than it takes of the row.

    Args:
        path: ends in ``.idx.parquet``.
        packing: see `pack`.
        tokens: conversations by number, each `[n]`.
        masks: likewise, 1 for tokens that are targets.
        lengths: what each takes in a row; see `padded_lengths`.
        pad_token: the end-of-sequence token: Megatron Bridge takes it for padding.

    Returns:
        ``rows``, ``targets``, and ``targets_after_eos``: those that Megatron Bridge leaves out of the loss, as it does
        wherever the input is the end-of-sequence token.
    """
    import pyarrow as pa
    import pyarrow.parquet

    counts = {"rows": len(packing.rows), "targets": 0, "targets_after_eos": 0}
    schema = pa.schema(
        {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.int8()), "seq_start_id": pa.list_(pa.int32())}
    )
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, len(packing.rows), _ROWS_A_GROUP):
            columns: dict[str, list[np.ndarray]] = {name: [] for name in schema.names}
            for row in packing.rows[first : first + _ROWS_A_GROUP]:
                ids, targets, starts = _row(row, tokens, masks, lengths, pad_token)
                dropped = targets.astype(bool) & (ids == pad_token)
                counts["targets"] += int(targets.sum()) - int(dropped.sum())
                counts["targets_after_eos"] += int(dropped.sum())
                for name, values in zip(schema.names, (ids, targets, starts), strict=True):
                    columns[name].append(values)
            arrays = [_list_array(columns[field.name], field.type.value_type) for field in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return counts


def packing_metadata(packing: Packing, lengths: np.ndarray, row_length: int) -> dict[str, int | float]:
    """What Megatron Bridge keeps of a packing, for rows whose borders CUDA graphs need padded."""
    used = [int(lengths[row].sum()) for row in packing.rows]
    return {
        "dataset_max_seqlen": int(lengths.max()),
        "max_samples_per_bin": max(map(len, packing.rows)),
        "packing_factor": round(len(lengths) / len(packing.rows), 2),
        "packing_efficiency": round(100 * packing.efficiency, 2),
        "pack_size": row_length,
        "min_packed_seqlen": min(used),
    }


def write_metadata(path: Path, metadata: list[dict[str, int | float]]) -> None:
    """Write it as Megatron Bridge does: a list with an entry a split."""
    path.write_text(json.dumps(metadata) + "\n")


def _row(
    row: list[int], tokens, masks, lengths: np.ndarray, pad_token: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sizes = lengths[row] + 1
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    ids = np.full(int(sizes.sum()), pad_token, dtype=np.int32)
    targets = np.zeros(len(ids), dtype=np.int8)
    for start, number in zip(starts, row, strict=True):
        conversation = tokens[number]
        ids[start : start + len(conversation)] = conversation
        targets[start : start + len(conversation) - 1] = masks[number][1:]
    return ids, targets, starts.astype(np.int32)


def _list_array(rows: list[np.ndarray], value_type):
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows), type=value_type))


def split_every(documents: int, share: float) -> Iterator[np.ndarray]:
    """The numbers of the conversations to learn from, then those held out, evenly spread.

    Args:
        documents: how many there are.
        share: of them to hold out, at least one where it is above 0.
    """
    held_out = np.zeros(documents, dtype=bool)
    if share:
        held_out[np.linspace(0, documents - 1, max(1, round(documents * share))).astype(np.int64)] = True
    yield np.flatnonzero(~held_out)
    yield np.flatnonzero(held_out)
