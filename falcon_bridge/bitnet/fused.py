"""The `fused` backend of BitNet linears: Triton kernels and int8 tensor cores on GPU, cuBLAS for the gradients."""

from functools import cache

import torch
import torch.distributed as dist
import triton

from falcon_bridge.bitnet.kernels import (
    MAX_BLOCK_K,
    abs_partial_sums_kernel,
    abs_row_sums_kernel,
    dequantize_rows_kernel,
    quantize_rows_kernel,
    quantize_weight_by_sums_kernel,
    quantize_weight_kernel,
    scaled_int8_gemm_kernel,
)
from falcon_bridge.ops.launch import AlignedDescriptor, FastLaunch


_ALIGNMENT = 16
"""Bytes to which the copy engine wants rows aligned."""

_SUM_BLOCK = 1024

_BLOCK_N, _BLOCK_K = 8, 1024
_ELEMENTWISE_TILE = {"BLOCK_N": _BLOCK_N, "BLOCK_K": _BLOCK_K, "num_warps": 8}

_MAX_PARTIAL_SUMS = 256
"""Programs that add up a weight: enough to load an H100's memory, few enough for all programs that then quantise it to
add their sums up."""

_TILES_N = 4
"""Tiles of a weight that such a program quantises."""


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
        x = _unit_stride(x)
        codes = x.new_empty((m, k), dtype=torch.int8)
        scale = x.new_empty((m, 1), dtype=torch.float32)
        if m:
            absmax = None if absmax is None else absmax.contiguous()
            launch = _quantize_rows(k, MAX_BLOCK_K, absmax is not None)
            launch((m,), x, absmax, codes, scale, k, x.stride(0))
        return codes, scale

    def abs_row_sums(self, W: torch.Tensor) -> torch.Tensor:
        """Sums of |W| over each row of W `[n, k]`, fp64 `[n]`."""
        n, k = W.shape
        W = _unit_stride(W)
        sums = W.new_empty(n, dtype=torch.float64)
        if n:
            _abs_row_sums(k)((n,), W, sums, k, W.stride(0))
        return sums

    def quantize_weight(self, W: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
        """Ternary codes int8 `[n, k]` of W `[n, k]` by the fp32 scales `[n]` or `[1]` of its rows."""
        n, k = W.shape
        W = _unit_stride(W)
        codes = W.new_empty((n, k), dtype=torch.int8)
        if n:
            _quantize_weight(_elementwise_grid(n, k), W, row_scales, codes, n, k, W.stride(0), _stride(row_scales))
        return codes

    def quantize_weight_by_mean(
        self,
        W: torch.Tensor,
        counts: torch.Tensor,
        row_segments: torch.Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `backends.quantize_weight_by_mean`: two launches, and an all-reduce where there is a group."""
        n, k = W.shape
        W = _unit_stride(W)
        codes = W.new_empty((n, k), dtype=torch.int8)
        row_scales = W.new_empty(1 if row_segments is None else n, dtype=torch.float32)
        segments = 1 << (counts.numel() - 1).bit_length()
        tiles = _cdiv(n, _BLOCK_N)
        rows = _BLOCK_N * max(1, _cdiv(tiles, _MAX_PARTIAL_SUMS))
        parts = _cdiv(n, rows)
        sums = W.new_empty((parts, segments), dtype=torch.float64)
        several = row_segments is not None
        if n:
            _abs_partial_sums(several, segments)((parts,), W, row_segments, sums, n, k, W.stride(0), rows)
        if group is not None:
            sums, parts = sums.sum(dim=0, keepdim=True), 1
            dist.all_reduce(sums, group=group)
        if n:
            grid = (_cdiv(tiles, _TILES_N), _cdiv(k, _BLOCK_K))
            launch = _quantize_weight_by_sums(several, segments)
            launch(grid, W, sums, counts, row_segments, row_scales, codes, n, k, W.stride(0), parts, counts.numel())
        return codes, row_scales

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
        y = codes.new_empty((m, n), dtype=dtype)
        if m == 0 or n == 0:
            return y
        tile = _gemm_tile(m, n, k)
        block_m, block_n, block_k, _, _ = tile
        _gemm(tile, dtype == torch.float32)(
            (_cdiv(m, block_m) * _cdiv(n, block_n),),
            _descriptor(codes, [block_m, block_k]),
            _descriptor(weight_codes, [block_n, block_k]),
            y,
            scale.contiguous(),
            row_scales,
            m,
            n,
            k,
            _stride(row_scales),
        )
        return y

    def grad_input(
        self, grad: torch.Tensor, weight_codes: torch.Tensor, row_scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """``(grad / row_scales) @ weight_codes`` as `[m, k]` of `dtype`, from grad `[m, n]`."""
        grad_x = torch.mm(grad, dequantize(weight_codes, row_scales, grad.dtype))
        return grad_x if grad_x.dtype == dtype else grad_x.to(dtype)

    def grad_weight(
        self,
        grad: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        main_grad: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """``gradᵀ @ (codes / scale)`` as `[n, k]` of `dtype`; added to `main_grad`, and None, where that is given."""
        x = dequantize(codes, scale, grad.dtype)
        if main_grad is None:
            grad_weight = torch.mm(grad.t(), x)
            return grad_weight if grad_weight.dtype == dtype else grad_weight.to(dtype)
        if main_grad.dtype == grad.dtype:
            torch.addmm(main_grad, grad.t(), x, out=main_grad)
        else:
            torch.addmm(main_grad, grad.t(), x, out_dtype=main_grad.dtype, out=main_grad)
        return None


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes / scale`` of each row.

    Args:
        codes: int8 `[n, k]`, unit stride over k.
        scales: fp32 `[n]` or `[n, 1]`, or one for all rows.
        dtype: of the result.

    Returns:
        `[n, k]`, divided in fp32 and rounded once.
    """
    n, k = codes.shape
    out = codes.new_empty((n, k), dtype=dtype)
    if n:
        launch = _dequantize_rows(dtype == torch.float32)
        launch(_elementwise_grid(n, k), codes, scales, out, n, k, codes.stride(0), _stride(scales))
    return out


@cache
def _quantize_rows(k: int, most: int, has_absmax: bool) -> FastLaunch:
    block = min(triton.next_power_of_2(k), most)
    return FastLaunch(
        quantize_rows_kernel,
        HAS_ABSMAX=has_absmax,
        BLOCK_K=block,
        WHOLE_ROW=block >= k,
        num_warps=max(1, min(16, block // 512)),
        enable_fp_fusion=False,
    )


@cache
def _abs_row_sums(k: int) -> FastLaunch:
    return FastLaunch(abs_row_sums_kernel, BLOCK_K=min(triton.next_power_of_2(k), _SUM_BLOCK))


_quantize_weight = FastLaunch(quantize_weight_kernel, **_ELEMENTWISE_TILE, enable_fp_fusion=False)


@cache
def _abs_partial_sums(several: bool, segments: int) -> FastLaunch:
    return FastLaunch(abs_partial_sums_kernel, HAS_SEGMENTS=several, SEGMENTS=segments, **_ELEMENTWISE_TILE)


@cache
def _quantize_weight_by_sums(several: bool, segments: int) -> FastLaunch:
    return FastLaunch(
        quantize_weight_by_sums_kernel,
        HAS_SEGMENTS=several,
        SEGMENTS=segments,
        BLOCK_P=_MAX_PARTIAL_SUMS,
        TILES_N=_TILES_N,
        **_ELEMENTWISE_TILE,
        enable_fp_fusion=False,
    )


@cache
def _dequantize_rows(ieee: bool) -> FastLaunch:
    return FastLaunch(dequantize_rows_kernel, IEEE=ieee, **_ELEMENTWISE_TILE)


@cache
def _gemm(tile: tuple[int, int, int, int, int], ieee: bool) -> FastLaunch:
    block_m, block_n, block_k, warps, stages = tile
    return FastLaunch(
        scaled_int8_gemm_kernel,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=8,
        IEEE=ieee,
        num_warps=warps,
        num_stages=stages,
    )


def _cdiv(a: int, b: int) -> int:
    """`triton.cdiv`, which is a kernel's function too and takes microseconds on the host."""
    return -(-a // b)


def _elementwise_grid(n: int, k: int) -> tuple[int, int]:
    return _cdiv(n, _BLOCK_N), _cdiv(k, _BLOCK_K)


def _unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _stride(scales: torch.Tensor) -> int:
    """Stride of the scales of rows; 0 where one stands for all."""
    return 0 if scales.numel() == 1 else scales.stride(0)


def _descriptor(codes: torch.Tensor, block: list[int]) -> AlignedDescriptor:
    """Of codes with rows that begin at multiples of 16 bytes; zeros behind each row change no product."""
    stride_n, stride_k = codes.stride()
    if stride_k != 1 or stride_n % _ALIGNMENT or codes.data_ptr() % _ALIGNMENT:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % _ALIGNMENT)).contiguous()
        stride_n = codes.stride(0)
    return AlignedDescriptor(codes, codes.shape, [stride_n, 1], block)


def _gemm_tile(m: int, n: int, k: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and pipeline stages, as measured on an H100.

    Two small tiles a multiprocessor hide each other's epilogues, which pays where the sum over k is short.
    """
    if m <= 64:
        return 64, 128, 128, 4, 4
    if k < 4096 or m * n < 128 * 256 * 132:
        return 128, 128, 128, 4, 3
    return 128, 256, 128, 8, 4
