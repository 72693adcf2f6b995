"""The Hugging Face tokenizer of a dataset."""

import hashlib
from pathlib import Path
from typing import Any

from falcon_bridge.errors import UserError, one_line


def load_tokenizer(path: str | Path) -> Any:
    """A fast Hugging Face tokenizer, from files alone (no code of the checkpoint runs).

    Args:
        path: directory of a tokenizer or checkpoint, or a hub id.

    Returns:
        A ``PreTrainedTokenizerFast`` with an end-of-sequence token.

    Raises:
        UserError: there is none, it is a slow one, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    directory = Path(path)
    if directory.exists():
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        if not any((directory / name).is_file() for name in names):
            raise UserError(f"{path} has no tokenizer ({', '.join(names)}): give a Hugging Face tokenizer's directory")
    elif directory.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise UserError(f"{path} does not exist: give a Hugging Face tokenizer's directory, or a hub id (owner/name)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the libraries raise bare Exception for damaged files
        raise UserError(f"the tokenizer {path} cannot be loaded ({one_line(error)}): check its files") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {path} is a slow one: save its fast form (tokenizer.json) and give that")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {path} has no eos_token, which ends each document: set one in its config")
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id that `tokenizer` can give; ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of all tokens with their ids, and of the end-of-sequence id.

    The same for a tokenizer that was saved again by another version of transformers, unlike its files.
    """
    digest = hashlib.sha256(f"eos {tokenizer.eos_token_id}\n".encode())
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number} {token}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()
