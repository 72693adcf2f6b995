"""The `onebitllms` backend: the Triton kernels that TII publishes for Falcon-Edge, for who wants exactly those.

The package's own layer quantises the whole weight in every forward pass by a scale that it fetches from the device.
Here its kernels are given the scales of whole Hugging Face matrices and the maxima of whole rows instead, so they also
serve fused matrices and tensor parallelism, and nothing waits for the device. As in that layer, what is multiplied are
dequantised values in the activations' dtype.
"""

import torch
import triton

from falcon_bridge.bitnet import scales


_BLOCK = 256
"""Block of the package's kernels; the only one they are tuned over."""

_MAX_ELEMENTS = 2**31 - 1
"""Its kernels count elements in 32 bits."""


class OneBitLLMsBackend:
    """A `backends.Backend` on the kernels of the package onebitllms 0.0.4, on CUDA.

    Ternary codes are the reference's bit for bit. The activation kernel divides by the maximum itself, approximately:
    about one int8 code in 10^5 differs by one from the reference's, of bf16 activations two in 10^4.

    Raises:
        ImportError: onebitllms is not installed.
    """

    name = "onebitllms"

    def __init__(self) -> None:
        try:
            from onebitllms.kernels.activation_quant import finalize_and_quant_kernel
            from onebitllms.kernels.weight_quant import weight_quant_kernel
        except ImportError as error:
            raise ImportError(
                "bitnet_backend='onebitllms' needs the package onebitllms: install falcon-bridge[gpu], or use 'auto'"
            ) from error
        self._quantize_rows, self._quantize_elements = finalize_and_quant_kernel, weight_quant_kernel

    def quantize_activation(
        self, x: torch.Tensor, absmax: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `backends.Backend`."""
        absmax = scales.token_absmax(x) if absmax is None else absmax
        scale = scales.activation_scale(absmax)
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        rows = max(1, _MAX_ELEMENTS // x.shape[1])
        for part, part_absmax, part_scale, out in zip(
            *(tensor.split(rows) for tensor in (x, absmax, scale, codes)), strict=True
        ):
            # dequantised values, of which rounding recovers the codes: they are at most 127, and bf16 has 8 bits
            out.copy_((self._dequantized_rows(part, part_absmax).float() * part_scale).round().nan_to_num(0))
        return codes, scale

    def abs_row_sums(self, W: torch.Tensor) -> torch.Tensor:
        """See `backends.Backend`."""
        return scales.abs_row_sums(W)

    def quantize_weight(self, W: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
        """See `backends.Backend`."""
        codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
        rows = max(1, _MAX_ELEMENTS // W.shape[1])
        row_scales = row_scales.expand(W.shape[0])
        for part, part_scales, out in zip(W.split(rows), row_scales.split(rows), codes.split(rows), strict=True):
            # the kernel takes one scale, from the host; it is 1, and the product with the rows' own is made here
            scaled = (part.float() * part_scales[:, None]).contiguous()
            ternary = torch.empty_like(scaled)
            grid = (triton.cdiv(scaled.numel(), _BLOCK),)
            with torch.cuda.device(W.device):
                self._quantize_elements[grid](scaled, ternary, 1.0, scaled.numel(), BLOCK_SIZE=_BLOCK)
            out.copy_(ternary.nan_to_num(0))
        return codes

    def forward(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        weight_codes: torch.Tensor,
        row_scales: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """See `backends.Backend`; of operands rounded to `dtype`."""
        return _dequantize(codes, scale, dtype) @ _dequantize(weight_codes, row_scales[:, None], dtype).T

    def grad_input(
        self, grad: torch.Tensor, weight_codes: torch.Tensor, row_scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `backends.Backend`."""
        return (grad @ _dequantize(weight_codes, row_scales[:, None], grad.dtype)).to(dtype)

    def grad_weight(
        self,
        grad: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        main_grad: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """See `backends.Backend`."""
        grad_weight = grad.T @ _dequantize(codes, scale, grad.dtype)
        if main_grad is None:
            return grad_weight.to(dtype)
        main_grad.add_(grad_weight)
        return None

    def _dequantized_rows(self, x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        m, k = x.shape
        dequantized = torch.empty_like(x)
        if m:
            # the kernel takes the maximum over what it expects to be maxima of blocks
            maxima = absmax.expand(m, triton.cdiv(k, _BLOCK)).contiguous()
            with torch.cuda.device(x.device):
                self._quantize_rows[(m, 1)](x, maxima, dequantized, m, 1, k)
        return dequantized


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.float() / scale).to(dtype)
