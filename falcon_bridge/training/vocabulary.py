"""Whether the tokens of a dataset are tokens of the model."""

from pathlib import Path
from typing import Any

import numpy as np

from falcon_bridge.data.info import DatasetInfo
from falcon_bridge.errors import UserError


_WHOLE_TOKENS = 1 << 25
"""Files up to this many tokens are read whole, a fraction of a second; of larger ones this many in all."""
_SAMPLES = 64


def check_vocabulary(name: str, max_token_id: int, vocab_size: int | None) -> None:
    """Raise where a dataset has tokens that the model does not.

    Raises:
        UserError: with both numbers.
    """
    if vocab_size is not None and max_token_id >= vocab_size:
        raise UserError(
            f"{name} has the token {max_token_id} and the model's vocabulary ends at {vocab_size - 1}: make the data "
            "with the model's tokenizer (`falcon-bridge data prepare --tokenizer`), or train the model that it is for"
        )


def largest_token(prefix: str, dtype: type[np.number]) -> int:
    """The largest token of ``PREFIX.bin``; of a large file, of evenly spread samples with its beginning and end.

    Args:
        prefix: of an indexed dataset.
        dtype: of its tokens.

    Returns:
        The largest id; -1 where the file is empty.
    """
    data = Path(f"{prefix}.bin")
    if data.stat().st_size < np.dtype(dtype).itemsize:
        return -1
    tokens = np.memmap(data, dtype=dtype, mode="r")
    if tokens.size <= _WHOLE_TOKENS:
        return int(tokens.max())
    width = _WHOLE_TOKENS // _SAMPLES
    starts = np.linspace(0, tokens.size - width, _SAMPLES).astype(np.int64)
    return max(int(tokens[start : start + width].max()) for start in starts)


def check_tokenizer(cfg: Any, name: str, info: DatasetInfo) -> None:
    """Raise where the run's tokenizer is not the one that the data was made with.

    Only a tokenizer in a local directory is looked at: nothing is fetched for this.

    Args:
        cfg: a ``ConfigContainer``.
        name: of the dataset, for the message.
        info: its description.

    Raises:
        UserError: their vocabularies differ.
    """
    from falcon_bridge.data.tokenizer import load_tokenizer, vocabulary_digest

    tokenizer = cfg.tokenizer.tokenizer_model
    if cfg.tokenizer.tokenizer_type != "HuggingFaceTokenizer" or tokenizer is None or not Path(tokenizer).is_dir():
        return
    if vocabulary_digest(load_tokenizer(tokenizer)) != info.vocabulary:
        raise UserError(
            f"{name} was made with another tokenizer ({info.tokenizer}) than the model's ({tokenizer}): make it again "
            "with the model's"
        )
