"""The product of a BitNet linear with its gradients, and what it exchanges with other tensor-parallel ranks.

Communication is that of Megatron's `LinearWithGradAccumulationAndAsyncCommunication`
(megatron/core/tensor_parallel/layers.py), with int8 codes and their scales in place of activations.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch.autograd.function import once_differentiable

from falcon_bridge.bitnet.backends import Backend
from falcon_bridge.bitnet.codes import WeightCodes
from falcon_bridge.bitnet.scales import token_absmax


@dataclass(frozen=True)
class Exchange:
    """What a linear layer exchanges within its tensor-parallel group.

    Attributes:
        group: The group.
        gather_tokens: Each rank has a part of the tokens (sequence parallelism): gather them, and reduce-scatter the
            gradient of the input.
        reduce_grad_input: All ranks have the same tokens: all-reduce the gradient of the input.
        share_absmax: Each rank has a part of the input features: a token's scale is that of its whole row.
    """

    group: dist.ProcessGroup
    gather_tokens: bool = False
    reduce_grad_input: bool = False
    share_absmax: bool = False


def ternary_linear(
    x: torch.Tensor,
    weight: torch.nn.Parameter,
    codes: WeightCodes,
    backend: Backend,
    exchange: Exchange | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """``(q @ codesᵀ) / (a·s)`` with straight-through gradients to `x` and `weight`; see `reference.bitlinear`.

    Saved for the backward pass: int8 activations of this rank's tokens and their scales, and `codes` themselves.

    Args:
        x: `[..., k]` of any floating dtype and strides; with `gather_tokens` the first dimension is this rank's part.
        weight: `[n, k]`, the latent weight. Never read: it receives the gradient.
        codes: What `weight` was quantised to.
        backend: What computes it.
        exchange: Communication; None for none.
        accumulate: Add the weight's gradient to `weight.main_grad`, where there is one, instead of returning it.

    Returns:
        `[..., n]` in x's dtype; with `gather_tokens` the tokens of all ranks, rank by rank along the first dimension.
    """
    return _TernaryLinear.apply(x, weight, codes, backend, exchange, accumulate)


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.nn.Parameter,
        weight_codes: WeightCodes,
        backend: Backend,
        exchange: Exchange | None,
        accumulate: bool,
    ) -> torch.Tensor:
        ctx.x_dtype, ctx.x_shape, ctx.weight = x.dtype, x.shape, weight
        ctx.backend, ctx.exchange, ctx.accumulate = backend, exchange, accumulate
        if x.dim() != 2:  # here and not outside, where it would be a node of the graph
            x = x.reshape(-1, x.shape[-1])
        x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        codes, scale = backend.quantize_activation(x, _absmax_of_whole_rows(x, exchange))
        ctx.save_for_backward(
            *(weight_codes if x_needs_grad else (None, None)),
            *((codes, scale) if weight_needs_grad else (None, None)),
        )
        if exchange is not None and exchange.gather_tokens:
            codes, scale = _Gathering(exchange.group, codes, scale).wait()
        y = backend.forward(codes, scale, *weight_codes, x.dtype)
        if len(ctx.x_shape) == 2:
            return y
        # no view: autograd refuses to have one written into that comes out of a function
        return torch.ops.aten._unsafe_view(y, (*_gathered(ctx.x_shape[:-1], exchange), y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        *weight_codes, codes, scale = ctx.saved_tensors
        x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        backend, exchange = ctx.backend, ctx.exchange
        if grad.dim() != 2:
            grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = gathering = reduction = None
        # each communication is under way while the next product is computed
        if weight_needs_grad and exchange is not None and exchange.gather_tokens:
            gathering = _Gathering(exchange.group, codes, scale)
        if x_needs_grad:
            grad_x = backend.grad_input(grad, *weight_codes, ctx.x_dtype)
            grad_x, reduction = _start_reduction(grad_x, exchange)
        if weight_needs_grad:
            if gathering is not None:
                codes, scale = gathering.wait()
            grad_weight = _grad_weight(ctx, grad, codes, scale)
        if reduction is not None:
            reduction.wait()
        if grad_x is not None and grad_x.shape != ctx.x_shape:
            grad_x = grad_x.view(ctx.x_shape)
        return grad_x, grad_weight, None, None, None, None


class _Gathering:
    """The codes and scales of all ranks' tokens, on their way."""

    def __init__(self, group: dist.ProcessGroup, *shards: torch.Tensor) -> None:
        self.whole = [shard.new_empty(shard.shape[0] * group.size(), *shard.shape[1:]) for shard in shards]
        self.handles = [
            dist.all_gather_into_tensor(whole, shard, group=group, async_op=True)
            for whole, shard in zip(self.whole, shards, strict=True)
        ]

    def wait(self) -> list[torch.Tensor]:
        for handle in self.handles:
            handle.wait()
        return self.whole


def _gathered(leading: torch.Size, exchange: Exchange | None) -> tuple[int, ...]:
    if exchange is None or not exchange.gather_tokens:
        return leading
    return leading[0] * exchange.group.size(), *leading[1:]


def _absmax_of_whole_rows(x: torch.Tensor, exchange: Exchange | None) -> torch.Tensor | None:
    if exchange is None or not exchange.share_absmax:
        return None
    absmax = token_absmax(x)
    # a maximum over ranks may drop a NaN, but never an infinity; both end as a NaN scale on every rank
    absmax = torch.where(absmax.isfinite(), absmax, torch.inf)
    dist.all_reduce(absmax, op=dist.ReduceOp.MAX, group=exchange.group)
    return absmax


def _start_reduction(grad_x: torch.Tensor, exchange: Exchange | None) -> tuple[torch.Tensor, dist.Work | None]:
    """This rank's gradient of its tokens, complete once the second value has been waited for."""
    if exchange is None or not (exchange.gather_tokens or exchange.reduce_grad_input):
        return grad_x, None
    if exchange.reduce_grad_input:
        return grad_x, dist.all_reduce(grad_x, group=exchange.group, async_op=True)
    own = grad_x.new_empty(grad_x.shape[0] // exchange.group.size(), grad_x.shape[1])
    return own, dist.reduce_scatter_tensor(own, grad_x, group=exchange.group, async_op=True)


def _grad_weight(ctx, grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    weight = ctx.weight
    main_grad = getattr(weight, "main_grad", None) if ctx.accumulate else None
    grad_weight = ctx.backend.grad_weight(grad, codes, scale, weight.dtype, main_grad)
    if main_grad is None or not hasattr(weight, "grad_added_to_main_grad"):
        return grad_weight
    # Megatron's hooks run where autograd sees a gradient; this flag says that there is nothing left to add
    weight.grad_added_to_main_grad = True
    zero = getattr(weight, "zero_out_wgrad", False)
    if layers.HAVE_TE:  # which has one such tensor for all layers of a shape
        return layers.get_dummy_wgrad(list(weight.shape), weight.dtype, zero=zero)
    return torch.zeros_like(weight) if zero else torch.empty_like(weight)
