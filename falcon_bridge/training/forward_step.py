"""Megatron Bridge's forward step, with the documents of pretraining rows kept apart."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.bridge.training import gpt_step
from megatron.bridge.training.state import GlobalState
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import flatten_batch_for_packed_sequences

from falcon_bridge.training.context_parallel import marked, rows_cut_whole
from falcon_bridge.training.cuda_graph import is_captured
from falcon_bridge.training.static_documents import packed_seq_params, static_documents


# in eager steps, too, where it saves a wait for the device a micro-batch
gpt_step.get_packed_seq_params = lambda metadata: marked(packed_seq_params(metadata))


def forward_step(
    state: GlobalState, data_iterator: Iterator[dict[str, Any]], model: GPTModel, return_schedule_plan: bool = False
) -> tuple[torch.Tensor, partial]:
    """Run the model on the next batch; to be given to ``pretrain`` and ``finetune``.

    With ``cfg.dataset.inter_document_masking`` the rows of a micro batch become one packed row whose documents neither
    attend to each other nor share an SSM state; without it, and for packed fine-tuning data, which brings its own
    borders, this is Megatron Bridge's ``gpt_step.forward_step``. Where whole iterations become CUDA graphs, the row
    has a fixed number of borders (`static_documents`).

    Args:
        state: of the run.
        data_iterator: gives batches of ``[b, s]`` tensors.
        model: a model chunk.
        return_schedule_plan: as in ``gpt_step.forward_step``.

    Returns:
        The output tensor and the loss function.
    """
    batches = data_iterator
    if batches is not None and getattr(state.cfg.dataset, "inter_document_masking", False):
        pack = static_documents.pack if is_captured(state.cfg) else pack_documents
        # Megatron's iterator that can run a step again has `next` only, no `iter`
        batches = iter(lambda: pack(next(data_iterator)), None)
        if (state.cfg.model.context_parallel_size or 1) > 1:
            with rows_cut_whole():
                return gpt_step.forward_step(state, batches, model, return_schedule_plan)
    return gpt_step.forward_step(state, batches, model, return_schedule_plan)


def pack_documents(batch: dict[str, Any]) -> dict[str, Any]:
    """One packed row of a batch of rows.

    Megatron Core's dataset gives the borders of each row's documents, and its own function joins the rows; Megatron
    Bridge's step wants them under the names of ``PackedSeqParams``.

    Args:
        batch: of a ``GPTDataset`` with ``inter_document_masking``: tensors `[b, s]`, ``cu_seqlens`` `[b, s+1]` int32
            (filled up with s) and ``max_seqlen`` `[b]`.

    Returns:
        The same tensors as `[1, b·s]`, ``cu_seqlens_q`` and ``cu_seqlens_kv`` `[1, documents+1]`, ``max_seqlen_q`` and
        ``max_seqlen_kv`` `[1]`.
    """
    batch = flatten_batch_for_packed_sequences(dict(batch))
    borders, longest = batch.pop("cu_seqlens"), batch.pop("max_seqlen")
    return batch | {
        "cu_seqlens_q": borders,
        "cu_seqlens_kv": borders,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }
