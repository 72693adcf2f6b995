"""Borders of packed documents without the host: what a CUDA graph captures has fixed shapes and waits for nothing."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params
from megatron.core.packed_seq_params import PackedSeqParams

from falcon_bridge.training.document_counts import room_for_documents


class StaticDocuments:
    """Makes one packed row of a batch of rows, with as many borders whatever the documents are.

    Borders that are not needed repeat the last one: empty documents, with which Transformer Engine pads as well. Where
    there are more documents than borders, those that are left over become one document, which is wrong: `check` raises
    then. It is to be called after each step and before a checkpoint is written.
    """

    def __init__(self) -> None:
        self.start()

    def start(self, frequencies: Sequence[np.ndarray] = ()) -> None:
        """Forget what has been packed; not while a graph that packs is in use.

        Args:
            frequencies: Of the lengths of documents, as `room_for_documents` takes them.
        """
        self._excess: torch.Tensor | None = None
        self._room = cache(partial(room_for_documents, frequencies=frequencies))

    def pack(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`forward_step.pack_documents` on the batch's device, without waiting for it.

        Args:
            batch: of a ``GPTDataset`` with ``inter_document_masking``: tensors `[b, s]` and ``cu_seqlens``
                `[b, s+1]` int32 (filled up with s); ``max_seqlen`` is left aside.

        Returns:
            The tensors as `[1, b·s]`, ``cu_seqlens_q`` and ``cu_seqlens_kv`` `[1, room_for_documents(b, s)+1]`, and on
            the CPU ``max_seqlen_q`` and ``max_seqlen_kv`` `[1]`: s, which no document exceeds.
        """
        batch = {name: value for name, value in batch.items() if name != "max_seqlen"}
        borders = batch.pop("cu_seqlens")
        rows, length = borders.shape[0], borders.shape[1] - 1
        room = self._room(rows, length)
        borders, documents = _merged(borders, room)
        if self._excess is None:
            self._excess = torch.zeros_like(documents)
        torch.maximum(self._excess, documents - room, out=self._excess)
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            if batch.get(name) is not None:
                batch[name] = batch[name].reshape(1, -1)
        longest = torch.tensor([length], device="cpu")
        return batch | {
            "cu_seqlens_q": borders[None],
            "cu_seqlens_kv": borders[None],
            "max_seqlen_q": longest,
            "max_seqlen_kv": longest,
        }

    def check(self) -> None:
        """Wait for the device, and raise ValueError if a batch since the start had more documents than borders."""
        excess = 0 if self._excess is None else int(self._excess)
        if excess > 0:
            raise ValueError(
                f"a micro-batch has {excess} documents more than a captured iteration has room for, and the last ones "
                "were not kept apart: go on from the last checkpoint, which this did not reach, with "
                "model.cuda_graph_impl=none, or with dataset.inter_document_masking=false to let each row be one "
                "stream of text"
            )


static_documents = StaticDocuments()
"""Packs the documents of this process's captured iterations."""


def _merged(borders: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[room+1]` borders of the documents of all rows one after the other, and the true number of documents `[]`."""
    rows, length = borders.shape[0], borders.shape[1] - 1
    total = rows * length
    starts = torch.arange(0, total, length, device=borders.device, dtype=borders.dtype)
    ascending = (borders + starts[:, None]).flatten()
    # each border's place among the distinct ones; the fillers of a row, and the next row's 0, repeat its end
    place = (ascending[1:] != ascending[:-1]).cumsum(0)
    merged = borders.new_full((room + 2,), total)
    merged[:1] = 0
    # one more slot takes whatever there is no room for
    merged.scatter_(0, place.clamp(max=room + 1), ascending[1:])
    merged[room:] = total
    return merged[: room + 1], place[-1]


def packed_seq_params(metadata: dict[str, Any]) -> PackedSeqParams:
    """Bridge's ``get_packed_seq_params`` with a `seq_idx` that the host does not wait for.

    ``PackedSeqParams`` numbers the documents with ``repeat_interleave``, whose output's length comes from the device.

    Args:
        metadata: as there.

    Returns:
        The same parameters and `seq_idx` int32 `[1, total_tokens]`, where ``total_tokens`` is given.
    """
    metadata = dict(metadata)
    total = metadata.pop("total_tokens", None)
    params = get_packed_seq_params(metadata)
    if total is not None:
        borders = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
        positions = torch.arange(total, device=borders.device, dtype=borders.dtype)
        ends = borders[1:].contiguous()
        params.seq_idx = torch.searchsorted(ends, positions, right=True, out_int32=True)[None]
    return params
