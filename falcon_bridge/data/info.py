"""What a prepared dataset is, in a JSON file beside it: how it was made, and what a training must match."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from falcon_bridge.errors import UserError


SFT_INFO_NAME = "dataset.json"
TRAINING_NAME, VALIDATION_NAME = "training.idx.parquet", "validation.idx.parquet"
METADATA_NAME, TOKENIZER_NAME = "packing_metadata.json", "tokenizer"


@dataclass(kw_only=True)
class DatasetInfo:
    """A prepared dataset.

    Attributes:
        kind: ``"text"`` (``.bin`` and ``.idx``) or ``"chat"`` (packed Parquet).
        documents: texts, or conversations.
        tokens: of all documents.
        max_token_id: the largest one in the data.
        tokenizer: the directory it was tokenized with.
        vocabulary: `tokenizer.vocabulary_digest` of that tokenizer.
        vocab_size: one more than the largest id that the tokenizer can give.
        eod: the token that ends a document.
        inputs: a dictionary per input file: ``file``, ``documents``, ``bad_rows``, ``blank_lines``.
        bad_rows: a dictionary per row left out: ``file``, ``line``, ``reason``.
        bin_bytes: size of the ``.bin`` that this describes; None for chat.
        seq_length: tokens of a packed row; None for text.
        pad_multiple: what the length of each packed conversation is a multiple of; None for text.
        extra: further figures for people.
    """

    kind: str
    documents: int
    tokens: int
    max_token_id: int
    tokenizer: str
    vocabulary: str
    vocab_size: int
    eod: int
    inputs: list[dict[str, Any]]
    bad_rows: list[dict[str, Any]]
    bin_bytes: int | None = None
    seq_length: int | None = None
    pad_multiple: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it as JSON; `path` appears whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(partial, path)


def text_info(prefix: str | Path) -> DatasetInfo | None:
    """The description of ``PREFIX.bin``; None where there is none, or where it is that of another file.

    Raises:
        UserError: it cannot be read.
    """
    path, data = Path(f"{prefix}.json"), Path(f"{prefix}.bin")
    if not path.is_file() or not data.is_file():
        return None
    info = _read(path)
    return info if info is not None and info.bin_bytes == data.stat().st_size else None


def sft_info(directory: str | Path) -> DatasetInfo:
    """The description of a directory that ``falcon-bridge data prepare-chat`` made.

    Raises:
        UserError: it is not one.
    """
    info = _read(Path(directory) / SFT_INFO_NAME) if is_sft_dataset(directory) else None
    if info is None or info.kind != "chat" or info.seq_length is None or info.pad_multiple is None:
        raise UserError(
            f"{directory} is not a packed chat dataset: make one with "
            "`falcon-bridge data prepare-chat CHAT.jsonl --tokenizer HF --out DIR --seq-length N`"
        )
    return info


def is_sft_dataset(path: str | Path) -> bool:
    """Whether `path` looks like a directory that ``falcon-bridge data prepare-chat`` made."""
    return (Path(path) / SFT_INFO_NAME).is_file()


def _read(path: Path) -> DatasetInfo | None:
    """None where the file is not a dataset's description; a tokenizer and others also write JSON."""
    known = {entry.name for entry in dataclasses.fields(DatasetInfo)}
    try:
        values = json.loads(path.read_text())
        return DatasetInfo(**{key: value for key, value in values.items() if key in known})
    except (ValueError, TypeError, AttributeError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
