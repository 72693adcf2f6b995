"""The `fused` backend of BitNet linears: Triton kernels and int8 tensor cores on GPU, cuBLAS for the gradients."""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from falcon_bridge.bitnet.kernels import (
    MAX_BLOCK_K,
    abs_row_sums_kernel,
    dequantize_rows_kernel,
    quantize_rows_kernel,
    quantize_weight_kernel,
    scaled_int8_gemm_kernel,
)


_ALIGNMENT = 16
"""Bytes to which the copy engine wants rows aligned."""

_SUM_BLOCK = 1024

_ELEMENTWISE_TILE = {"BLOCK_N": 8, "BLOCK_K": 1024, "num_warps": 8}


class FusedBackend:
    """Quantisation in one pass and an int8 GEMM with the scales in its epilogue.

    Arguments and results are those of `backends.Backend`; codes and fp32 outputs equal the reference's bit for bit.
    Gradients are cuBLAS GEMMs in the gradient's dtype on dequantised operands, which live as long as the call.
    """

    name = "fused"

    def quantize_activation(
        self, x: torch.Tensor, absmax: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 codes `[m, k]` and fp32 scales `[m, 1]` of x `[m, k]`; absmax fp32 `[m, 1]` of whole rows, or None."""
        m, k = x.shape
        x = x if x.stride(1) == 1 or k == 1 else x.contiguous()
        codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
        scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
        if m == 0:
            return codes, scale
        block = min(triton.next_power_of_2(k), MAX_BLOCK_K)
        quantize_rows_kernel[(m,)](
            x,
            None if absmax is None else absmax.contiguous(),
            codes,
            scale,
            k,
            x.stride(0),
            HAS_ABSMAX=absmax is not None,
            BLOCK_K=block,
            WHOLE_ROW=block >= k,
            num_warps=max(1, min(16, block // 512)),
            enable_fp_fusion=False,
        )
        return codes, scale

    def abs_row_sums(self, W: torch.Tensor) -> torch.Tensor:
        """Sums of |W| over each row of W `[n, k]`, fp64 `[n]`."""
        n, k = W.shape
        W = W if W.stride(1) == 1 or k == 1 else W.contiguous()
        sums = torch.empty(n, dtype=torch.float64, device=W.device)
        if n:
            abs_row_sums_kernel[(n,)](W, sums, k, W.stride(0), BLOCK_K=min(triton.next_power_of_2(k), _SUM_BLOCK))
        return sums

    def quantize_weight(self, W: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
        """Ternary codes int8 `[n, k]` of W `[n, k]` by the fp32 scales `[n]` or `[1]` of its rows."""
        n, k = W.shape
        W = W if W.stride(1) == 1 or k == 1 else W.contiguous()
        codes = torch.empty((n, k), dtype=torch.int8, device=W.device)
        if n:
            quantize_weight_kernel[_elementwise_grid(n, k)](
                W,
                row_scales,
                codes,
                n,
                k,
                W.stride(0),
                _stride(row_scales),
                **_ELEMENTWISE_TILE,
                enable_fp_fusion=False,
            )
        return codes

    def forward(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        weight_codes: torch.Tensor,
        row_scales: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """``(codes @ weight_codesᵀ) / (scale · row_scales)`` as `[m, n]` of `dtype`; codes contiguous over k."""
        (m, k), n = codes.shape, weight_codes.shape[0]
        y = torch.empty((m, n), dtype=dtype, device=codes.device)
        if m == 0 or n == 0:
            return y
        block_m, block_n, block_k, warps, stages = _gemm_tile(m, n, k)
        operands = [_aligned(codes), _aligned(weight_codes)]
        grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
        scaled_int8_gemm_kernel[grid](
            TensorDescriptor.from_tensor(operands[0], [block_m, block_k]),
            TensorDescriptor.from_tensor(operands[1], [block_n, block_k]),
            y,
            scale.contiguous(),
            row_scales,
            m,
            n,
            k,
            _stride(row_scales),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=8,
            IEEE=dtype == torch.float32,
            num_warps=warps,
            num_stages=stages,
        )
        return y

    def grad_input(
        self, grad: torch.Tensor, weight_codes: torch.Tensor, row_scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """``(grad / row_scales) @ weight_codes`` as `[m, k]` of `dtype`, from grad `[m, n]`."""
        return torch.mm(grad, dequantize(weight_codes, row_scales, grad.dtype)).to(dtype)

    def grad_weight(
        self,
        grad: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        main_grad: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """``gradᵀ @ (codes / scale)`` as `[n, k]` of `dtype`; added to `main_grad`, and None, where that is given."""
        x = dequantize(codes, scale.view(-1), grad.dtype)
        if main_grad is None:
            return torch.mm(grad.t(), x).to(dtype)
        if main_grad.dtype == grad.dtype:
            torch.addmm(main_grad, grad.t(), x, out=main_grad)
        else:
            torch.addmm(main_grad, grad.t(), x, out_dtype=main_grad.dtype, out=main_grad)
        return None


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes / scale`` of each row.

    Args:
        codes: int8 `[n, k]`, unit stride over k.
        scales: fp32 `[n]`, or `[1]` for all rows.
        dtype: of the result.

    Returns:
        `[n, k]`, divided in fp32 and rounded once.
    """
    n, k = codes.shape
    out = torch.empty((n, k), dtype=dtype, device=codes.device)
    if n:
        dequantize_rows_kernel[_elementwise_grid(n, k)](
            codes,
            scales,
            out,
            n,
            k,
            codes.stride(0),
            _stride(scales),
            IEEE=dtype == torch.float32,
            **_ELEMENTWISE_TILE,
        )
    return out


def _elementwise_grid(n: int, k: int) -> tuple[int, int]:
    return triton.cdiv(n, _ELEMENTWISE_TILE["BLOCK_N"]), triton.cdiv(k, _ELEMENTWISE_TILE["BLOCK_K"])


def _stride(scales: torch.Tensor) -> int:
    """Stride of the scales of rows; 0 where one stands for all."""
    return 0 if scales.numel() == 1 else scales.stride(0)


def _aligned(codes: torch.Tensor) -> torch.Tensor:
    """The codes with rows that begin at multiples of 16 bytes; zeros behind each row change no product."""
    if codes.stride(1) == 1 and codes.stride(0) % _ALIGNMENT == 0 and codes.data_ptr() % _ALIGNMENT == 0:
        return codes
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % _ALIGNMENT)).contiguous()


def _gemm_tile(m: int, n: int, k: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and pipeline stages, as measured on an H100.

    Two small tiles a multiprocessor hide each other's epilogues, which pays where the sum over k is short.
    """
    if m <= 64:
        return 64, 128, 128, 4, 4
    if k < 4096 or m * n < 128 * 256 * 132:
        return 128, 128, 128, 4, 3
    return 128, 256, 128, 8, 4
