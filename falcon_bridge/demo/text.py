"""Real text and a real tokenizer: the Python language reference that ships in every CPython."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from falcon_bridge.errors import JobError


# every tenth topic is held out, the sixth first
_HELD_OUT_EVERY, _FIRST_HELD_OUT = 10, 5
SPECIAL_TOKENS = ("<pad>", "<bos>", "<unk>", "<eos>")


@dataclass(frozen=True)
class Corpus:
    """Documents: one a topic of the reference.

    Attributes:
        train: to learn from.
        held_out: never trained on.
    """

    train: list[str]
    held_out: list[str]


def python_reference() -> Corpus:
    """The documents of ``pydoc_data.topics``, in the order of their names."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    held_out = documents[_FIRST_HELD_OUT::_HELD_OUT_EVERY]
    train = [text for number, text in enumerate(documents) if number % _HELD_OUT_EVERY != _FIRST_HELD_OUT]
    return Corpus(train, held_out)


def train_tokenizer(documents: list[str], vocab_size: int, directory: Path, max_length: int):
    """Train a byte-level BPE tokenizer and save it in Hugging Face's format.

    Args:
        documents: to learn the merges from.
        vocab_size: exact size of the vocabulary.
        directory: where to save it.
        max_length: the model's context in tokens.

    Returns:
        A ``PreTrainedTokenizerFast``.

    Raises:
        JobError: the text gives fewer merges than that.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise JobError(f"the text gave a vocabulary of {tokenizer.get_vocab_size()} instead of {vocab_size} tokens")
    pad, bos, unk, eos = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        unk_token=unk,
        eos_token=eos,
        model_max_length=max_length,
    )
    fast.save_pretrained(directory)
    return fast


def write_indexed_dataset(documents: list[str], tokenizer, prefix: Path) -> int:
    """Write documents as Megatron's indexed dataset, each ended by the end-of-sequence token.

    Args:
        documents: the texts.
        tokenizer: a Hugging Face tokenizer.
        prefix: of ``.bin`` and ``.idx``.

    Returns:
        Tokens written.
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    total = 0
    for tokens in tokenized(documents, tokenizer):
        builder.add_item(torch.from_numpy(np.asarray(tokens)))
        builder.end_document()
        total += len(tokens)
    builder.finalize(f"{prefix}.idx")
    return total


def tokenized(documents: list[str], tokenizer) -> Iterator[list[int]]:
    """Tokens of each document, with the end-of-sequence token."""
    for text in documents:
        yield [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
