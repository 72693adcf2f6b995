"""The token batch on which two models are compared."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Random tokens, with the documents of each row.

    Attributes:
        tokens: `[b, s]` int64.
        lengths: for a packed batch the lengths of each row's documents (the same in every row, summing to s);
            None where each row is one document.
    """

    tokens: torch.Tensor
    lengths: tuple[int, ...] | None = None

    @property
    def documents(self) -> tuple[int, ...]:
        """Lengths of the documents of a row."""
        return self.lengths or (self.tokens.shape[1],)

    @property
    def labels(self) -> torch.Tensor:
        """`[b, s]` the token after each; meaningless where `loss_mask` is 0."""
        return self.tokens.roll(-1, dims=1)

    @property
    def loss_mask(self) -> torch.Tensor:
        """`[b, s]` float: 0 at the last token of a document, whose successor is not its own, else 1."""
        mask = torch.ones(self.tokens.shape, dtype=torch.float32)
        mask[:, torch.tensor(self.documents).cumsum(0) - 1] = 0
        return mask

    @property
    def position_ids(self) -> torch.Tensor:
        """`[b, s]` int64: each token's place in its document."""
        return torch.cat([torch.arange(n) for n in self.documents]).expand_as(self.tokens)


def random_batch(config, *, batch_size: int, seq_length: int, seed: int, packed: bool = False) -> Batch:
    """Tokens drawn uniformly from the whole vocabulary but the pad token.

    The pad token is left out because transformers gives its embedding row no gradient
    (``nn.Embedding(padding_idx=...)``), which Megatron, rightly for packed training, does.

    Args:
        config: the transformers config.
        batch_size: rows.
        seq_length: tokens a row.
        seed: of the tokens.
        packed: cut each row into documents: one of a single token, one that spans a border of the SSM's chunks where
            the row is long enough, none a multiple of the chunk.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size - 1, (batch_size, seq_length), generator=generator)
    pad = config.pad_token_id if config.pad_token_id is not None else config.vocab_size - 1
    tokens += (tokens >= pad).long()
    chunk = getattr(config, "mamba_chunk_size", seq_length)
    return Batch(tokens, _document_lengths(seq_length, chunk) if packed else None)


def _document_lengths(seq_length: int, chunk: int) -> tuple[int, ...]:
    wanted = [max(2, seq_length // 5), 1, min(chunk + 1, seq_length // 3)]
    lengths = []
    for length in wanted:
        if sum(lengths) + length < seq_length:
            lengths.append(length)
    return (*lengths, seq_length - sum(lengths))
