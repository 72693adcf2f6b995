"""BitNet b1.58's linear layer in plain PyTorch: the oracle of every kernel, and the path of any device.

Sources: "The Era of 1-bit LLMs" (arXiv 2402.17764, §2) for absmean weights and absmax activations; rounding half up
and the floor of 1e-5 as in the kernels Falcon-Edge was trained with (onebitllms). Scales multiply: codes are
``round(value · scale)`` and stand for ``codes / scale``.
"""

import torch
from torch.autograd.function import once_differentiable

from falcon_bridge.bitnet.scales import (
    abs_sums,
    activation_scale,
    element_counts,
    scales_from,
    token_absmax,
)
from falcon_bridge.bitnet.segments import check_weight


FP32_EXACT_IN_FEATURES = 2**24 // 128
"""Products of int8 with ternary codes sum up exactly in fp32 for as many input features: |sum| ≤ 128·K ≤ 2^24."""


def weight_scale(W: torch.Tensor) -> torch.Tensor:
    """``s = 1 / max(mean|W|, 1e-5)`` of one Hugging Face matrix.

    Args:
        W: `[out, in]`, any floating dtype.

    Returns:
        fp32 scalar tensor; the mean is taken in fp64.
    """
    return scales_from(abs_sums(W), element_counts(W))[0]


@torch.no_grad()
def quantize_weight(W: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ternary codes ``clamp(floor(W·s + 0.5), -1, 1)`` of one Hugging Face matrix, or of a shard of one.

    Args:
        W: `[out, in]`, any floating dtype.
        scale: fp32 scalar tensor, the whole matrix's scale where W is a shard; None computes W's own.

    Returns:
        Codes int8 `[out, in]`, and the scale, fp32 scalar tensor. A NaN or infinite weight makes the scale NaN, also
        one that was passed in.
    """
    scales = None if scale is None else scale.reshape(1)
    codes, scales = quantize_weight_segmented(W, None, 1, scales)
    return codes, scales[0]


@torch.no_grad()
def quantize_weight_segmented(
    W: torch.Tensor,
    row_segments: torch.Tensor | None,
    num_segments: int,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_weight` of several Hugging Face matrices fused row-wise, each with its own scale.

    Args:
        W: `[out, in]`, any floating dtype.
        row_segments: Integers `[out]`, the matrix each row belongs to (`segments.qkv_row_segments`,
            `segments.gate_up_row_segments`); None for a single matrix.
        num_segments: Matrices in the weight.
        scales: fp32 `[num_segments]`, those of the whole matrices where W is a shard; None computes W's own.

    Returns:
        Codes int8 `[out, in]`, and scales fp32 `[num_segments]`, NaN for a matrix with a NaN or infinite weight and
        for one without rows.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    sums = abs_sums(W, row_segments, num_segments)
    if scales is None:
        scales = scales_from(sums, element_counts(W, row_segments, num_segments))
    else:
        _check_scales(scales, num_segments)
        scales = torch.where(sums.isfinite(), scales, torch.nan)
    return round_to_codes(W.float() * _by_row(scales, row_segments)[:, None], -1, 1), scales


@torch.no_grad()
def quantize_activation(x: torch.Tensor, absmax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes ``clamp(floor(x·a + 0.5), -128, 127)`` with ``a = 127 / max(max|x|, 1e-5)`` for each token.

    Args:
        x: `[..., k]`, any floating dtype and strides.
        absmax: fp32 `[..., 1]`, the maximum of |x| over whole rows where x holds parts of them
            (`scales.token_absmax`, combined over ranks); None takes x's own.

    Returns:
        Codes int8 `[..., k]`, and scales fp32 `[..., 1]`. A NaN or an infinity in a token makes its scale NaN.

    Raises:
        ValueError: x is not floating-point or has no features, or absmax does not fit it.
    """
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be a floating-point tensor [..., k] with k > 0, got {x.dtype} {list(x.shape)}")
    local_absmax = token_absmax(x)
    if absmax is None:
        absmax = local_absmax
    elif absmax.dtype != torch.float32 or absmax.shape != local_absmax.shape:
        raise ValueError(f"absmax must be float32 {list(local_absmax.shape)}, got {absmax.dtype} {list(absmax.shape)}")
    scale = activation_scale(torch.where(local_absmax.isfinite(), absmax, torch.nan))
    return round_to_codes(x.float() * scale, -128, 127), scale


def bitlinear(
    x: torch.Tensor,
    W: torch.Tensor,
    *,
    weight_codes: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    row_segments: torch.Tensor | None = None,
    num_segments: int = 1,
    absmax: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y = (q @ codesᵀ) / (a·s)``: int8 activations times ternary weights, with straight-through gradients.

    The product of codes is exact for any in_features; it is divided by the product of the two scales in fp32, as in
    transformers' `BitLinear`, and rounded once to x's dtype. Gradients take quantisation for the identity, without a
    clipping mask: ``dx = (dy / s) @ codes`` and ``dW = dyᵀ @ (q / a)``, in fp32. Saved for them: the int8 activations,
    their scales and the codes, neither x nor a copy of W. Autocast has no effect.

    Args:
        x: `[..., in]`, any floating dtype, leading dimensions and strides.
        W: `[out, in]`, the latent weight, any floating dtype. Read only where `weight_codes` is None; receives the
            gradient either way.
        weight_codes: int8 `[out, in]`, W's codes if they are at hand; needs `scales`.
        scales: fp32 `[num_segments]`, scales of the whole Hugging Face matrices. None computes W's own.
        row_segments: Integers `[out]`, the matrix each row of a fused weight belongs to; None for a single matrix.
        num_segments: Matrices in the weight.
        absmax: fp32 `[..., 1]`, the maximum of |x| over whole rows where x and W hold a part of the input features;
            the results of the parts then add up.

    Returns:
        `[..., out]` in x's dtype: NaN in every output that a NaN or infinite input or weight would reach.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    check_weight(W, row_segments, num_segments)
    if x.dim() == 0 or x.shape[-1] != W.shape[1]:
        raise ValueError(f"x must be [..., in] for W [out, in], got x {list(x.shape)} and W {list(W.shape)}")
    if weight_codes is None:
        weight_codes, scales = quantize_weight_segmented(W, row_segments, num_segments, scales)
    else:
        if weight_codes.dtype != torch.int8 or weight_codes.shape != W.shape:
            raise ValueError(
                f"weight_codes must be int8 {list(W.shape)} as W, got {weight_codes.dtype} {list(weight_codes.shape)}"
            )
        if scales is None:
            raise ValueError("weight_codes needs scales, those that the codes were made with")
        _check_scales(scales, num_segments)
    return _BitLinear.apply(x, W, weight_codes, _by_row(scales, row_segments), absmax)


class _BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        W: torch.Tensor,
        weight_codes: torch.Tensor,
        row_scales: torch.Tensor,
        absmax: torch.Tensor | None,
    ) -> torch.Tensor:
        codes, scale = quantize_activation(x, absmax)
        x_needs_grad, W_needs_grad = ctx.needs_input_grad[:2]
        ctx.dtypes = x.dtype, W.dtype
        ctx.save_for_backward(
            weight_codes if x_needs_grad else None,
            row_scales if x_needs_grad else None,
            codes if W_needs_grad else None,
            scale if W_needs_grad else None,
        )
        return divide_by_scales(product_of_codes(codes, weight_codes), scale * row_scales, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        weight_codes, row_scales, codes, scale = ctx.saved_tensors
        x_dtype, W_dtype = ctx.dtypes
        grad_output = grad_output.float()
        grad_x = grad_W = None
        with torch.autocast(grad_output.device.type, enabled=False):
            if weight_codes is not None:
                grad_x = ((grad_output / row_scales) @ weight_codes.float()).to(x_dtype)
            if codes is not None:
                x_quantized = codes.float() / scale
                grad_W = (_as_matrix(grad_output).T @ _as_matrix(x_quantized)).to(W_dtype)
        return grad_x, grad_W, None, None, None


def round_to_codes(scaled: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """Round half up into int8 codes, contiguous.

    Args:
        scaled: Values times their scales, fp32, any shape; NaN becomes 0, which shows because its scale is NaN.
        lowest: The least code.
        highest: The greatest.
    """
    return (scaled + 0.5).floor().clamp(lowest, highest).nan_to_num(0).to(torch.int8).contiguous()


def product_of_codes(codes: torch.Tensor, weight_codes: torch.Tensor) -> torch.Tensor:
    """``codes @ weight_codesᵀ`` of int8 `[..., k]` and `[n, k]` as fp32: exact integers, rounded beyond 2^24."""
    exact_in_fp32 = codes.shape[-1] <= FP32_EXACT_IN_FEATURES
    dtype = torch.float32 if exact_in_fp32 else torch.float64
    with torch.autocast(codes.device.type, enabled=False):
        return (codes.to(dtype) @ weight_codes.to(dtype).T).float()


def divide_by_scales(product: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``product / scales`` rounded to `dtype`; divided in fp32, or in fp64 where `dtype` is that.

    The products of the parts of a row, which tensor-parallel ranks hold, then add up to the whole row's in fp64.

    Args:
        product: fp32 `[..., n]`, from `product_of_codes`.
        scales: fp32, broadcastable to it: those of activations times those of weights.
        dtype: Of the result.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return (product.to(wide) / scales.to(wide)).to(dtype)


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _by_row(scales: torch.Tensor, row_segments: torch.Tensor | None) -> torch.Tensor:
    """A scale for each row `[out]`, or `[1]` for all of them."""
    return scales if row_segments is None else scales[row_segments]


def _check_scales(scales: torch.Tensor, num_segments: int) -> None:
    if scales.dtype != torch.float32 or list(scales.shape) != [num_segments]:
        raise ValueError(
            f"scales must be float32 [{num_segments}], one a segment; got {scales.dtype} {list(scales.shape)}"
        )
