"""The SSM branch between its projections on a GPU: convolution, scan, gate and norm as one differentiable function.

mamba-ssm's own entry point (`mamba_split_conv1d_scan_combined`) wants batch-first rows and knows no multipliers. This
function runs causal-conv1d, the scan (our kernels or mamba-ssm's) and the gate on strided views of Megatron's
`[s, b, ·]`, so nothing is transposed, and no pass is spent on the µP multipliers: those of x, B and C scale the
convolution's weights, that of dt is part of the step sizes' kernel, those of z and of the output ride in the gate,
which also reads and writes across the two layouts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.function import once_differentiable

from falcon_bridge.ops.elementwise import column_factors
from falcon_bridge.ops.ssd.backend import ScanBackend, default_chunk
from falcon_bridge.ops.ssd.offsets import check_scan_offsets


@dataclass(frozen=True)
class SSMShape:
    """Widths and constants of one call, all of them local to this rank.

    Attributes:
        heads: SSM heads.
        head_dim: Channels a head.
        groups: Groups of B and C.
        d_state: State size.
        chunk_size: Chunk of mamba-ssm's scan.
        scales: Multipliers of z, x, B, C and dt.
        out_scale: Multiplier of the result.
        norm_width: Channels that the gated norm takes together.
        eps: Of the gated norm.
        backend: Whose kernels scan.
    """

    heads: int
    head_dim: int
    groups: int
    d_state: int
    chunk_size: int
    scales: tuple[float, float, float, float, float]
    out_scale: float = 1.0
    norm_width: int | None = None
    eps: float = 1e-5
    backend: ScanBackend = "triton"

    @property
    def inner(self) -> int:
        """Channels of z, x and the result."""
        return self.heads * self.head_dim

    @property
    def segments(self) -> list[int]:
        """Widths of z, of x, B and C together, and of dt."""
        return [self.inner, self.inner + 2 * self.groups * self.d_state, self.heads]


def ssm_scan(
    zxbcdt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    a_log: torch.Tensor,
    d_skip: torch.Tensor,
    norm_weight: torch.Tensor | None,
    shape: SSMShape,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
    """Causal convolution, SSD scan, gate and (with `norm_weight`) RMSNorm of one Mamba-2 branch.

    Kept for the backward pass: zxbcdt, the scan's output, and a number a token and group of the norm. Convolution and
    states are computed again there, as in mamba-ssm.

    Args:
        zxbcdt: What `in_proj` gives, before any multiplier, `[s, b, 2·inner + 2·groups·d_state + heads]`.
        conv_weight: `[inner + 2·groups·d_state, k]`, k in 2, 3, 4.
        conv_bias: `[inner + 2·groups·d_state]`.
        dt_bias: `[heads]`, fp32.
        a_log: `[heads]`, fp32; the decay is `-exp(a_log)`.
        d_skip: `[heads]`, fp32.
        norm_weight: `[inner]`, or None for no norm.
        shape: Widths and constants.
        seq_idx: Document of each token, int32 `[b, s]`; convolution and state restart where it changes. No number may
            come back for another document.

    Returns:
        `[s, b, inner]`, contiguous, in zxbcdt's dtype; and what writes it again into a tensor that it is given, from
        what is kept for the backward pass (`ops.recomputed`).

    Raises:
        ImportError: Without causal-conv1d, or mamba-ssm if that is the backend.
        ValueError: If the rows are longer than the kernels can address, or the convolution's channels are no multiple
            of 8.
    """
    if shape.segments[1] % 8:
        raise ValueError(
            f"causal-conv1d needs a multiple of 8 channels on each rank, not {shape.segments[1]} (heads times head "
            "size, and twice groups times state): use another tensor or context parallel size, or ssm_backend=torch"
        )
    if zxbcdt.stride(2) != 1:
        zxbcdt = zxbcdt.contiguous()
    check_scan_offsets(zxbcdt.shape[1], zxbcdt.shape[0], shape)
    out, y = _SSMScan.apply(zxbcdt, conv_weight, conv_bias, dt_bias, a_log, d_skip, norm_weight, shape, seq_idx)
    # not with autograd's own zxbcdt, which leads to the graph that will hold the function
    return out, partial(_gate_again, y, zxbcdt.detach(), norm_weight, shape)


class _SSMScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, zxbcdt, conv_weight, conv_bias, dt_bias, a_log, d_skip, norm_weight, shape, seq_idx):
        from falcon_bridge.ops.gated_norm_kernels import gated_norm

        seq_idx = None if seq_idx is None else seq_idx.contiguous()
        z, xbc, dt = zxbcdt.split(shape.segments, dim=-1)
        # in fp32, the multipliers of the convolution's input in its weight
        weight, bias = conv_weight * _conv_factors(shape, conv_weight.device), conv_bias.float()
        decay = -torch.exp(a_log.float())
        x, b, c = _split(_convolve(xbc, weight, bias, seq_idx), shape)
        steps = dt.transpose(0, 1), shape.scales[-1], dt_bias, decay, d_skip, seq_idx, _chunk(shape, x)
        y = _kernels(shape).scan_forward(x, b, c, *steps).flatten(2)
        out, rstd = gated_norm(y, z, norm_weight, eps=shape.eps, **_gate(shape))
        ctx.save_for_backward(zxbcdt, weight, bias, dt_bias, decay, d_skip, norm_weight, seq_idx, y, rstd)
        ctx.shape = shape
        ctx.dtypes = conv_weight.dtype, conv_bias.dtype, a_log.dtype
        ctx.mark_non_differentiable(y)
        ctx.set_materialize_grads(False)  # else zeros of y's size are made for its gradient
        return out, y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        from causal_conv1d.cpp_functions import causal_conv1d_bwd_function

        from falcon_bridge.ops.gated_norm_kernels import gated_norm_backward

        if grad is None:  # what is behind the result passed none on
            return (None,) * 9
        zxbcdt, weight, bias, dt_bias, decay, d_skip, norm_weight, seq_idx, y, rstd = ctx.saved_tensors
        shape, (weight_dtype, bias_dtype, a_dtype) = ctx.shape, ctx.dtypes
        z, xbc, dt = zxbcdt.split(shape.segments, dim=-1)
        dzxbcdt = torch.empty_like(zxbcdt)
        dz, dxbc_raw, ddt = dzxbcdt.split(shape.segments, dim=-1)
        dy, dnorm_weight = gated_norm_backward(grad, y, z, norm_weight, rstd, dz, **_gate(shape))

        x, b, c = _split(_convolve(xbc, weight, bias, seq_idx), shape)
        dxbc = torch.empty(xbc.shape, dtype=xbc.dtype, device=xbc.device)
        dx, db, dc = _split(dxbc.transpose(0, 1), shape)
        heads = (shape.heads, shape.head_dim)
        steps = dt.transpose(0, 1), shape.scales[-1], dt_bias, decay, d_skip, seq_idx, _chunk(shape, x)
        ddecay, ddt_bias, dd = _kernels(shape).scan_backward(
            dy.unflatten(2, heads), y.unflatten(2, heads), x, b, c, *steps,
            dx=dx, db=db, dc=dc, draw_dt=ddt.transpose(0, 1),
        )  # fmt: skip
        target = _channels_first(dxbc_raw)
        _, dweight, dbias, _ = causal_conv1d_bwd_function(
            _channels_first(xbc), weight, bias, _channels_first(dxbc), seq_idx, None, None, target, False, True
        )
        if target.data_ptr() != dxbc_raw.data_ptr():
            dxbc_raw.copy_(target.permute(2, 0, 1))
        scaled = torch.empty(weight.shape, dtype=weight_dtype, device=weight.device)
        return (
            dzxbcdt,
            torch.mul(dweight, _conv_factors(shape, dweight.device), out=scaled),
            dbias.to(bias_dtype),
            ddt_bias.to(dt_bias.dtype),
            (ddecay * decay).to(a_dtype),
            dd.to(d_skip.dtype),
            None if norm_weight is None else dnorm_weight.to(norm_weight.dtype),
            None,
            None,
        )


def _kernels(shape: SSMShape):
    """The module with `scan_forward` and `scan_backward`."""
    if shape.backend == "mamba_ssm":
        from falcon_bridge.ops.ssd import mamba_scan

        return mamba_scan
    from falcon_bridge.ops.ssd.kernels import scan

    return scan


def _chunk(shape: SSMShape, x: torch.Tensor) -> int:
    return shape.chunk_size if shape.backend == "mamba_ssm" else default_chunk(x.element_size())


def _gate_again(y: torch.Tensor, zxbcdt: torch.Tensor, norm_weight, shape: SSMShape, out: torch.Tensor) -> None:
    from falcon_bridge.ops.gated_norm_kernels import gated_norm

    gated_norm(y, zxbcdt[..., : shape.inner], norm_weight, eps=shape.eps, out=out, **_gate(shape))


def _gate(shape: SSMShape) -> dict:
    return {"gate_scale": shape.scales[0], "out_scale": shape.out_scale, "group_width": shape.norm_width}


def _conv_factors(shape: SSMShape, device: torch.device) -> torch.Tensor:
    """Multiplier of each channel of x, B and C, fp32 `[c, 1]`."""
    bc = shape.groups * shape.d_state
    return column_factors((shape.inner, bc, bc), shape.scales[1:4], device).unsqueeze(1)


def _convolve(xbc: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, seq_idx) -> torch.Tensor:
    """``silu(conv(xbc) + bias)``: `[s, b, c]` to `[b, s, c]` in the same order of memory."""
    from causal_conv1d.cpp_functions import causal_conv1d_fwd_function

    return causal_conv1d_fwd_function(_channels_first(xbc), weight, bias, seq_idx, None, None, True).transpose(1, 2)


def _channels_first(xbc: torch.Tensor) -> torch.Tensor:
    """`[s, b, c]` as `[b, c, s]` with the strides and the alignment that causal-conv1d's vector loads need."""
    if xbc.stride(0) % 8 or xbc.stride(1) % 8 or xbc.data_ptr() % 16:
        xbc = xbc.contiguous()
    return xbc.permute(1, 2, 0)


def _split(xbc: torch.Tensor, shape: SSMShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[b, s, c]` into views x `[b, s, heads, head_dim]`, B and C `[b, s, groups, d_state]`."""
    bc = shape.groups * shape.d_state
    x, b, c = xbc.split([shape.inner, bc, bc], dim=-1)
    state = (shape.groups, shape.d_state)
    return x.unflatten(2, (shape.heads, shape.head_dim)), b.unflatten(2, state), c.unflatten(2, state)
