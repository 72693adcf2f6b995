"""How many documents a micro-batch may have room for: a bound that random draws from the data do not exceed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from falcon_bridge.training.dataset import prefixes


TOKENS_PER_DOCUMENT = 128
"""As short as documents may be on average where the data's index does not tell."""

_LEAST = 32
# of a single micro-batch: a million steps of a thousand micro-batches exceed the bound once in a million trainings
_CHANCE = 1e-15
_RATES = np.geomspace(1e-6, 10.0, 200)


def room_for_documents(rows: int, length: int, frequencies: Sequence[np.ndarray] = ()) -> int:
    """How many documents a micro-batch of `rows` rows of `length` tokens has room for.

    Each document more costs attention some blocks that find nothing to do, so that the bound is as tight as the data
    allows: by Chernoff, n documents drawn at random have fewer than t tokens with a chance of at most
    ``exp(r·t) · E[exp(-r·l)]^n`` for any rate r > 0, also where they are drawn without replacement (Hoeffding, 1963).

    Args:
        rows: of the micro-batch.
        length: tokens a row.
        frequencies: of each part of the data that rows are drawn from, the share of its documents of each length from
            0 on (`length_frequencies`); none where it is not known.

    Returns:
        A power of two from 32 on, to which Transformer Engine rounds the number up anyway, with empty documents
        (``get_max_batch_size`` in transformer_engine/common/fused_attn/utils.cu).
    """
    tokens = rows * length
    if not len(frequencies):
        needed = math.ceil(tokens / TOKENS_PER_DOCUMENT)
    else:
        # whichever part each document comes from
        logs = np.max([_log_mean_exp(shares) for shares in frequencies], axis=0)
        useful = logs < -1e-12
        bounds = (_RATES[useful] * tokens - math.log(_CHANCE)) / -logs[useful]
        # a row starts and ends within a document
        needed = math.ceil(bounds.min()) + 2 * rows if useful.any() else tokens
    return max(_LEAST, 1 << (min(needed, tokens) - 1).bit_length())


def _log_mean_exp(shares: np.ndarray) -> np.ndarray:
    """``log E[exp(-r·l)]`` of lengths with these shares, for each of `_RATES`."""
    (lengths,) = shares.nonzero()
    least = lengths[0]  # taken out of the exponentials, which would all underflow
    return np.log(np.exp(-np.outer(_RATES, lengths - least)) @ shares[lengths]) - _RATES * least


def length_frequencies(cfg: Any) -> list[np.ndarray]:
    """What `room_for_documents` wants to know of the data of a ``ConfigContainer``.

    Args:
        cfg: with a ``GPTDatasetConfig``.

    Returns:
        fp64 arrays, one for each dataset and split of the blend; lengths beyond a micro-batch count as those of one.
        None at all for mock data, and for data that is not on this machine.
    """
    if not hasattr(cfg.dataset, "blend"):
        return []
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rows = max(cfg.train.micro_batch_size, cfg.validation.eval_micro_batch_size or 1)
    longest, found = rows * cfg.dataset.seq_length, []
    for prefix, splits in prefixes(cfg):
        if not Path(f"{prefix}.idx").is_file():
            return []
        index = IndexedDataset(prefix, mmap=False).index
        lengths = index.sequence_lengths  # in a map of the file that closes with the index
        for start, stop in splits.values() or [(0.0, 1.0)]:
            part = lengths[round(start * len(lengths)) : round(stop * len(lengths))]
            if len(part):
                found.append(np.bincount(np.minimum(part, longest)) / len(part))
    return found
