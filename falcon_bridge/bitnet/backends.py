"""What computes a BitNet linear: the interface, the plain PyTorch implementation, and the choice between them."""

import logging
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist

from falcon_bridge.bitnet import reference
from falcon_bridge.bitnet.scales import abs_row_sums, scales_from, sum_by_segment
from falcon_bridge.errors import suggestion


logger = logging.getLogger(__name__)

CHOICES = ("auto", "reference", "onebitllms", "fused")
"""Values of a provider's `bitnet_backend`."""


class Backend(Protocol):
    """Quantisation and products of a BitNet linear, on matrices of any strides, without waiting for the device.

    Scales multiply: codes stand for ``codes / scale``. A NaN or infinite value makes its scale NaN. Shapes: m tokens,
    k input and n output features of this rank; `row_scales` is fp32 `[n]`, or `[1]` where one scale stands for all.

    A backend may also have a method ``quantize_weight_by_mean(W, counts, row_segments, group)`` that does what the
    function of that name does with the others, in fewer passes.
    """

    name: str

    def quantize_activation(
        self, x: torch.Tensor, absmax: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 codes `[m, k]`, contiguous, and scales fp32 `[m, 1]` of x `[m, k]`.

        `absmax`, fp32 `[m, 1]`, is the maximum of |x| over whole rows where x holds a part of them.
        """
        ...

    def abs_row_sums(self, W: torch.Tensor) -> torch.Tensor:
        """Sums of |W| over each row of W `[n, k]`, fp64 `[n]`."""
        ...

    def quantize_weight(self, W: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
        """Ternary codes int8 `[n, k]`, contiguous, of W `[n, k]`."""
        ...

    def forward(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        weight_codes: torch.Tensor,
        row_scales: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """``(codes @ weight_codesᵀ) / (scale · row_scales)`` as `[m, n]` of `dtype`, rounded once."""
        ...

    def grad_input(
        self, grad: torch.Tensor, weight_codes: torch.Tensor, row_scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """``(grad / row_scales) @ weight_codes`` as `[m, k]` of `dtype`, contiguous, from grad `[m, n]`."""
        ...

    def grad_weight(
        self,
        grad: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        main_grad: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """``gradᵀ @ (codes / scale)`` as `[n, k]` of `dtype`; added to `main_grad`, and None, where that is given."""
        ...


class ReferenceBackend:
    """`reference.bitlinear` in the parts that tensor parallelism and cached codes need; any device, fp32 inside."""

    name = "reference"

    def quantize_activation(
        self, x: torch.Tensor, absmax: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend`."""
        return reference.quantize_activation(x, absmax)

    def abs_row_sums(self, W: torch.Tensor) -> torch.Tensor:
        """See `Backend`."""
        return abs_row_sums(W)

    def quantize_weight(self, W: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
        """See `Backend`."""
        return reference.round_to_codes(W.float() * row_scales[:, None], -1, 1)

    def forward(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        weight_codes: torch.Tensor,
        row_scales: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """See `Backend`."""
        return reference.divide_by_scales(reference.product_of_codes(codes, weight_codes), scale * row_scales, dtype)

    def grad_input(
        self, grad: torch.Tensor, weight_codes: torch.Tensor, row_scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `Backend`."""
        with torch.autocast(grad.device.type, enabled=False):
            return ((grad.float() / row_scales) @ weight_codes.float()).to(dtype)

    def grad_weight(
        self,
        grad: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        main_grad: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """See `Backend`."""
        with torch.autocast(grad.device.type, enabled=False):
            grad_weight = grad.float().T @ (codes.float() / scale)
        if main_grad is None:
            return grad_weight.to(dtype)
        main_grad.add_(grad_weight)
        return None


def quantize_weight_by_mean(
    backend: Backend,
    W: torch.Tensor,
    counts: torch.Tensor,
    row_segments: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a weight by the means of the Hugging Face matrices in it, by the backend's own method if it has one.

    Args:
        backend: What quantises.
        W: `[n, k]`, a weight or this rank's shard of one.
        counts: fp64 `[num_segments]` on W's device, elements of each whole matrix.
        row_segments: Integers `[n]` on W's device, the matrix of each row; None where there is one matrix.
        group: Ranks that hold the other shards, over which this is collective; None if there are none.

    Returns:
        Codes `[n, k]`, and fp32 scales of the rows `[n]`, or `[1]` where `row_segments` is None.
    """
    own = getattr(backend, "quantize_weight_by_mean", None)
    if own is not None:
        return own(W, counts, row_segments, group)
    sums = sum_by_segment(backend.abs_row_sums(W), row_segments, counts.numel())
    if group is not None:
        dist.all_reduce(sums, group=group)
    scales = scales_from(sums, counts)
    row_scales = scales if row_segments is None else scales[row_segments]
    return backend.quantize_weight(W, row_scales), row_scales


def check_choice(choice: str) -> None:
    """Refuse a `bitnet_backend` that does not exist.

    Raises:
        ValueError: With one line that names those that do.
    """
    if choice not in CHOICES:
        hint = suggestion(str(choice), CHOICES)
        raise ValueError(f"bitnet_backend={choice!r} is not one of {', '.join(map(repr, CHOICES))}{hint}")


@cache
def choose_backend(choice: str, device_type: str) -> Backend:
    """The backend for a device; what was chosen is logged the first time.

    Args:
        choice: One of `CHOICES`; "auto" is "fused" on CUDA and "reference" elsewhere.
        device_type: ``torch.device.type`` of the weights.

    Raises:
        ValueError: An unknown choice, or one that cannot run on the device.
        ImportError: A package that the choice needs is not installed.
    """
    check_choice(choice)
    name = choice
    if choice == "auto":
        name = "fused" if device_type == "cuda" else "reference"
    if name != "reference" and device_type != "cuda":
        raise ValueError(
            f"bitnet_backend={name!r} needs a GPU and the weights are on {device_type}: use 'auto' or 'reference'"
        )
    backend = _make(name)
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("BitNet linears on %s: backend %r (bitnet_backend=%r)", device_type, backend.name, choice)
    return backend


def _make(name: str) -> Backend:
    if name == "fused":
        from falcon_bridge.bitnet.fused import FusedBackend

        return FusedBackend()
    if name == "onebitllms":
        from falcon_bridge.bitnet.onebitllms_backend import OneBitLLMsBackend

        return OneBitLLMsBackend()
    return ReferenceBackend()
