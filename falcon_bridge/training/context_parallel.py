"""Rows of pretraining documents cut for context parallelism: as if each row were one document, wherever they end."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

import torch
from megatron.bridge.training import gpt_step
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank

from falcon_bridge.models.falcon_h1.head_parallel import RowsCutWhole


_rows_cut_whole: ContextVar[bool] = ContextVar("rows_cut_whole", default=False)
_whole_row: ContextVar[tuple[torch.Tensor, torch.Tensor] | None] = ContextVar("whole_row", default=None)
_cut_documents = gpt_step._partition_packed_batch_for_cp
_count_flops = gpt_step.accumulate_flops_metadata
_NOT_TOKENS = ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "attention_mask")


@contextmanager
def rows_cut_whole() -> Iterator[None]:
    """Have Megatron Bridge's step cut packed rows, not each of their documents, while the block runs."""
    within, row = _rows_cut_whole.set(True), _whole_row.set(None)
    try:
        yield
    finally:
        _whole_row.reset(row)
        _rows_cut_whole.reset(within)


def cut_packed_batch(batch: dict[str, Any], cp_group: torch.distributed.ProcessGroup) -> dict[str, Any]:
    """Bridge's ``_partition_packed_batch_for_cp``; within `rows_cut_whole` each row is cut into 2·CP equal parts.

    Args:
        batch: tensors `[1, s]` and the documents' borders.
        cp_group: the context-parallel group.

    Returns:
        The batch with this rank's tokens, `[1, s/cp]`, and the borders of all.
    """
    if not _rows_cut_whole.get():
        return _cut_documents(batch, cp_group)
    tokens = {name: value for name, value in batch.items() if value is not None and name not in _NOT_TOKENS}
    if "tokens" in tokens:
        _whole_row.set((tokens["tokens"], batch["cu_seqlens_q"]))
    return batch | get_batch_on_this_cp_rank(tokens, is_hybrid_cp=False, cp_group=cp_group)


def marked(params: PackedSeqParams) -> PackedSeqParams:
    """`params`, within `rows_cut_whole` as what tells the model how its rows were cut."""
    if not _rows_cut_whole.get():
        return params
    values = {field.name: getattr(params, field.name) for field in fields(PackedSeqParams)}
    # of the whole row: the mixer counts it anew
    return RowsCutWhole(**values | {"total_tokens": None, "seq_idx": None})


def count_flops(state: Any, tokens: torch.Tensor | None, **kwargs: Any) -> None:
    """Bridge's ``accumulate_flops_metadata``, within `rows_cut_whole` of the whole row and its documents.

    Bridge leaves documents aside under context parallelism, and takes a packed micro-batch for one row.

    Args:
        state: of the run.
        tokens: `[1, s/cp]`, or None where a pipeline stage has none.
        **kwargs: as there.
    """
    row = _whole_row.get()
    if row is not None:
        tokens, kwargs["cu_seqlens"] = row
    _count_flops(state, tokens, **kwargs)


gpt_step._partition_packed_batch_for_cp = cut_packed_batch
gpt_step.accumulate_flops_metadata = count_flops
