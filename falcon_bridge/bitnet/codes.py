"""Codes of a weight: made once an optimizer step, shared by micro-batches, recompute and pipeline stages in flight.

They are made in the first forward pass that needs them. By then the distributed optimizer has gathered the module's
parameters, also where that overlaps with the forward pass: it waits for them in a hook in front of the module.

A tensor's version cannot tell whether a weight is still the one that was quantised, since optimizers and gathers write
into buffers that parameters are views of. So there is also a count of the events that change weights, for the whole
process: every step of any torch optimizer, loading a state dict, and `invalidate`.

What a CUDA graph captures runs again without any of this. Codes therefore belong to the capture that they were made
in: each capture makes its own in the first forward pass that needs them, so that every replay does, and shares them
among its micro-batches; what runs outside of it uses none of them.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from falcon_bridge.bitnet.backends import Backend, quantize_weight_by_mean
from falcon_bridge.bitnet.segments import check_row_segments


_generation = 0


def invalidate(*_: object) -> None:
    """Have all weights quantised anew; to be called by whoever writes into weights without an optimizer.

    All ranks of a tensor-parallel group must call it alike: quantising is collective over them.

    Args:
        *_: Ignored, so that it can be a hook.
    """
    global _generation
    _generation += 1


register_optimizer_step_post_hook(invalidate)


def capture_id(device: torch.device) -> int:
    """The driver's number for the CUDA graph capture that the current stream is part of; 0 outside of any.

    Args:
        device: Where the work goes; there are no captures on a CPU.

    Raises:
        RuntimeError: The driver does not tell.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    # torch tells that there is a capture, not which
    error = _driver().cuStreamGetCaptureInfo_v2(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    if error:
        raise RuntimeError(f"cuStreamGetCaptureInfo failed with CUDA error {error}")
    return number.value


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class WeightCodes(NamedTuple):
    """What stands for a weight in a step.

    Attributes:
        codes: int8 `[n, k]`; under a quantisation strength below 1 the blended weight (`strength`).
        row_scales: fp32 `[n]`, or `[1]` where the weight is a single matrix.
    """

    codes: torch.Tensor
    row_scales: torch.Tensor


class CodesCache:
    """The codes of one weight, or of a tensor-parallel shard of one.

    Args:
        counts: fp64 `[num_segments]`, elements of each whole Hugging Face matrix.
        row_segments: Integers `[n]` on the CPU, the matrix each row of this rank's shard belongs to; None where the
            weight is a single matrix.
        group: Ranks that hold the other shards; None if there are none.

    Raises:
        ValueError: If a row belongs to no matrix.
    """

    def __init__(
        self, counts: torch.Tensor, row_segments: torch.Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        self.num_segments = counts.numel()
        if row_segments is not None:
            check_row_segments(row_segments, self.num_segments, row_segments.numel())
        self._counts, self._row_segments, self._group = counts, row_segments, group
        self._key: tuple | None = None
        self._codes: WeightCodes | None = None

    def get(self, weight: torch.Tensor, backend: Backend) -> WeightCodes:
        """The codes of `weight`, quantised if it may have changed since the last call, or `backend` has.

        Collective over the tensor-parallel group, with one small all-reduce where it quantises.
        """
        key = (_generation, weight._version, weight.data_ptr(), backend, capture_id(weight.device))
        if self._codes is None or key != self._key:
            # whatever backward passes still need of the old ones they hold themselves
            self._codes = None
            self._codes, self._key = self.quantize(weight, backend), key
        return self._codes

    def quantize(self, weight: torch.Tensor, backend: Backend) -> WeightCodes:
        """`get` without a look at the cache, which is left as it is."""
        if hasattr(weight, "__fsdp_param__"):
            raise ValueError(
                "BitNet linears do not support Megatron FSDP, whose weights come and go within a step: use the "
                "distributed optimizer (ddp.use_megatron_fsdp=False, ddp.use_distributed_optimizer=True)"
            )
        # an inference tensor could not be saved for the backward pass of a training step that follows
        with torch.inference_mode(False), torch.no_grad():
            self._move_to(weight.device)
            return WeightCodes(
                *quantize_weight_by_mean(backend, weight, self._counts, self._row_segments, self._group)
            )

    def _move_to(self, device: torch.device) -> None:
        if self._counts.device != device:
            self._counts = self._counts.to(device)
            if self._row_segments is not None:
                self._row_segments = self._row_segments.to(device)
