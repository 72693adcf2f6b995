"""Rows of text to documents of tokens."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from falcon_bridge.data.rows import BadRow


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        tokens: `[n]`.
        mask: `[n]`, 1 where the loss counts the token as a target; None where it counts all.
    """

    tokens: np.ndarray
    mask: np.ndarray | None = None


class Converter(Protocol):
    """Makes documents of rows.

    Attributes:
        columns: the keys that it reads; None for all.
        text_key: the key that the text of a text file gets.
        dtype: of the tokens.
        masked: whether its documents have masks.
    """

    columns: list[str] | None
    text_key: str
    dtype: type[np.number]
    masked: bool

    def convert(self, rows: list[dict[str, Any]]) -> list[Document | BadRow]:
        """A document, or why there is none, for each row."""


class TextConverter:
    """The text under one key, tokenized, with the end-of-document token behind it.

    Args:
        tokenizer: a fast Hugging Face tokenizer with an ``eos_token``.
        dtype: of the tokens.
        text_key: where the text is.
        bos: put the tokenizer's ``bos_token`` in front.
    """

    masked = False

    def __init__(self, tokenizer: Any, dtype: type[np.number], text_key: str, bos: bool = False) -> None:
        self.tokenizer, self.dtype, self.text_key = tokenizer, dtype, text_key
        self.columns = [text_key]
        self._head = [tokenizer.bos_token_id] if bos else []

    def convert(self, rows: list[dict[str, Any]]) -> list[Document | BadRow]:
        """A document, or why there is none, for each row."""
        results: list[Any] = [self._bad(row) for row in rows]
        good = [number for number, bad in enumerate(results) if bad is None]
        if not good:
            return results
        encoded = self.tokenizer(
            [rows[number][self.text_key] for number in good],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for number, tokens in zip(good, encoded, strict=True):
            whole = [*self._head, *tokens, self.tokenizer.eos_token_id]
            results[number] = Document(np.array(whole, dtype=self.dtype)) if tokens else BadRow("no tokens")
        return results

    def _bad(self, row: dict[str, Any]) -> BadRow | None:
        text = row.get(self.text_key)
        if text is None:
            return BadRow(f"no '{self.text_key}'")
        if not isinstance(text, str):
            return BadRow(f"'{self.text_key}' is a {type(text).__name__} instead of text")
        if not text:
            return BadRow(f"'{self.text_key}' is empty")
        return None if is_unicode(text) else BadRow(f"'{self.text_key}' has half a surrogate pair")


def is_unicode(text: str) -> bool:
    """Whether `text` can be encoded: JSON's escapes can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
