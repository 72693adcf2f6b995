import torch


def document_numbers(seq_idx: torch.Tensor) -> torch.Tensor:
    """Number the packed documents of each row 0, 1, 2, … in order of appearance.

    ``seq_idx`` need not increase, and a value may come back later as another document: only a change counts. In the
    result two tokens of a row are of one document exactly where their numbers are equal.

    Args:
        seq_idx: integers ``[b, l]``.

    Returns:
        int64 ``[b, l]``, non-decreasing along ``l``, 0 at the first token.
    """
    starts = torch.zeros_like(seq_idx, dtype=torch.int64)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts.cumsum(1)


def check_seq_idx(seq_idx: torch.Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless ``seq_idx`` is an integer tensor ``[batch, length]``."""
    if seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx must be [b, l] = [{batch}, {length}], got {list(seq_idx.shape)}")
    if seq_idx.is_floating_point() or seq_idx.is_complex() or seq_idx.dtype == torch.bool:
        raise ValueError(f"seq_idx must hold integers, got {seq_idx.dtype}")
