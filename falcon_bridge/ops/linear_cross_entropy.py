"""The output layer and its cross-entropy as one operation that never holds the logits of all tokens.

Logits are computed a chunk of tokens at a time into one buffer, reduced to three numbers a token, and computed again
in the backward pass, where they become their gradient in place (recomputation as in "Cut Your Losses in
Large-Vocabulary Language Models", arXiv 2411.09009; chunks as in Liger Kernel, arXiv 2410.10989). On GPU the passes
over the logits are the Triton kernels of `linear_cross_entropy_kernels`; what is here is their oracle.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


MAX_LOGITS_BYTES = 384 * 2**20
"""What the buffer of logits may take; a chunk has at least `MIN_CHUNK_TOKENS` tokens whatever they take."""

MIN_CHUNK_TOKENS = 1024
"""Fewer would leave the weight's gradient bound by the memory it is accumulated in."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of each token for logits ``hidden @ weightᵀ``, in nats.

    The same as Megatron's `vocab_parallel_cross_entropy` on those logits, rounded to hidden's dtype as there: a label
    outside the vocabulary, to be masked, gives a finite loss (that of a logit as large as the largest). Saved for the
    backward pass: `hidden`, and the logits of the last chunk, which it starts with. The weight's gradient is added up
    in fp32, in `weight.main_grad` where Megatron's data parallelism provides that.

    Args:
        hidden: `[t, h]`, any floating dtype, contiguous; with `sequence_parallel` this rank's part of the tokens.
        weight: `[v/tp, h]`, contiguous, of the same dtype.
        labels: int `[t]`, of all tokens, the same on all ranks of the group.
        vocab_size: Columns of all ranks that are not padding; padding takes no part in the softmax. All where None.
        tp_group: Tensor-parallel group over which the vocabulary is split; None for a whole one.
        sequence_parallel: The tokens are split over the group: gather them, and reduce-scatter their gradient.
        chunk_tokens: Tokens whose logits are held at once; `default_chunk_tokens` where None.

    Returns:
        `[t]`, fp32 (fp64 for fp64), of all tokens.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    sequence_parallel = sequence_parallel and group is not None
    tokens = hidden.shape[0] * (group.size() if sequence_parallel else 1)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != (tokens,):
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} do not fit: "
            f"they must be [t, h], [v, h] and [{tokens}]"
        )
    shard = _Shard.of(weight.shape[0], vocab_size, group)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(tokens, weight.shape[0], hidden.element_size())
    return _LinearCrossEntropy.apply(
        hidden, weight, labels.contiguous(), shard, sequence_parallel, min(chunk_tokens, max(tokens, 1))
    )


def naive_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocab_size: int | None = None
) -> torch.Tensor:
    """The definition of `linear_cross_entropy` on one rank, computed by autograd in at least fp32; for tests."""
    dtype = _compute_dtype(hidden)
    logits = (hidden.to(dtype) @ weight.to(dtype).t())[:, :vocab_size]
    known = (labels >= 0) & (labels < logits.shape[1])
    target = logits.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return logits.logsumexp(1) - torch.where(known, target, logits.amax(1).detach())


def default_chunk_tokens(tokens: int, columns: int, element_size: int) -> int:
    """Tokens whose logits are held at once: as few equal chunks as `MAX_LOGITS_BYTES` allows.

    Args:
        tokens: All of a microbatch.
        columns: Of this rank's logits.
        element_size: Bytes of a logit.
    """
    most = max(MAX_LOGITS_BYTES // (columns * element_size), MIN_CHUNK_TOKENS)
    if tokens <= most:
        return max(tokens, 1)
    equal = -(-tokens // -(-tokens // most))
    return min(-(-equal // 128) * 128, most)


@dataclass(frozen=True)
class _Shard:
    """This rank's part of the vocabulary: the labels from `first` on, of which `valid` are not padding."""

    first: int
    valid: int
    padded_vocab_size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, width: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> "_Shard":
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        first = rank * width
        valid = width if vocab_size is None else max(0, min(width, vocab_size - first))
        return cls(first, valid, size * width, group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        shard: _Shard,
        sequence_parallel: bool,
        chunk_tokens: int,
    ) -> torch.Tensor:
        tokens = _gathered(hidden, shard.group) if sequence_parallel else hidden
        buffer = _logits_buffer(hidden, weight, chunk_tokens)
        statistics = hidden.new_empty(3, len(labels), dtype=_compute_dtype(hidden))
        for chunk in _chunks(len(labels), chunk_tokens):
            logits = _logits(tokens[chunk], weight, buffer)
            _row_statistics(logits, labels[chunk], statistics[:, chunk], shard)
        largest, total, target = _over_ranks(statistics, shard.group)
        no_token = (labels < 0) | (labels >= shard.padded_vocab_size)
        log_total = total.log_()
        loss = log_total - (target - largest).masked_fill_(no_token, 0.0)

        ctx.save_for_backward(hidden, weight, labels, log_total + largest)
        ctx.shard, ctx.sequence_parallel, ctx.chunk_tokens = shard, sequence_parallel, chunk_tokens
        ctx.weight = weight  # for the attributes that Megatron gives it
        # it is free until the backward pass starts, as that does right after the loss; without one, nobody holds ctx
        ctx.last_logits = buffer
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        hidden, weight, labels, log_total = ctx.saved_tensors
        hidden_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        shard, grad = ctx.shard, grad.to(log_total.dtype).contiguous()
        tokens = _gathered(hidden, shard.group) if ctx.sequence_parallel else hidden
        buffer, ctx.last_logits = ctx.last_logits, None  # a second backward pass finds none
        has_logits = buffer is not None
        if buffer is None:
            buffer = _logits_buffer(hidden, weight, ctx.chunk_tokens)
        grad_tokens = torch.empty_like(tokens) if hidden_needs_grad else None
        grad_weight = _WeightGradient(ctx.weight, len(labels) > ctx.chunk_tokens) if weight_needs_grad else None
        reduction = None
        for chunk in reversed(_chunks(len(labels), ctx.chunk_tokens)):
            logits = buffer[: chunk.stop - chunk.start] if has_logits else _logits(tokens[chunk], weight, buffer)
            has_logits = False
            _logits_to_gradient(logits, labels[chunk], log_total[chunk], grad[chunk], shard)
            if grad_tokens is not None:
                torch.mm(logits, weight, out=grad_tokens[chunk])
                if chunk.start == 0:  # under way while the last product is computed
                    grad_tokens, reduction = _start_reduction(grad_tokens, shard.group, ctx.sequence_parallel)
            if grad_weight is not None:
                grad_weight.add(logits, tokens[chunk])
        if reduction is not None:
            reduction.wait()
        return grad_tokens, None if grad_weight is None else grad_weight.result(), None, None, None, None


class _WeightGradient:
    """The gradient of a weight as a sum over chunks of tokens, in fp32 where there are several of them.

    Args:
        weight: `[v, h]`; gradients are added to its `main_grad` where Megatron's DistributedDataParallel gave it one.
            (Megatron FSDP does too, but that comes and goes within a step.)
        several: There is more than one chunk.
    """

    def __init__(self, weight: torch.Tensor, several: bool) -> None:
        self.weight = weight
        announced = hasattr(weight, "grad_added_to_main_grad") and not hasattr(weight, "__fsdp_param__")
        self.main_grad = getattr(weight, "main_grad", None) if announced else None
        sum_dtype = _compute_dtype(weight) if several else weight.dtype
        self.in_place = self.main_grad is not None and (not several or self.main_grad.dtype == sum_dtype)
        self.total = self.main_grad if self.in_place else torch.empty_like(weight, dtype=sum_dtype)
        self.empty = not self.in_place

    def add(self, grad_logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add ``grad_logitsᵀ @ hidden``, of `[t, v]` and `[t, h]`."""
        factors, beta = (grad_logits.t(), hidden), 0 if self.empty else 1
        options = {"beta": beta, "out": self.total}
        if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
            torch.addmm(self.total, *factors, out_dtype=self.total.dtype, **options)
        else:
            torch.addmm(self.total, *(factor.to(self.total.dtype) for factor in factors), **options)
        self.empty = False

    def result(self) -> torch.Tensor:
        """What autograd is to see: the gradient, or a placeholder where `main_grad` has it."""
        if self.empty:
            self.total.zero_()
        if self.main_grad is None:
            return self.total.to(self.weight.dtype)
        if not self.in_place:
            self.main_grad.add_(self.total)
        # Megatron's hooks run where autograd sees a gradient; this flag says that there is nothing left to add
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "zero_out_wgrad", False):  # a tied embedding adds its own
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]


def _logits_buffer(hidden: torch.Tensor, weight: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    """`[chunk_tokens, v]`; on GPU with rows that start at multiples of 128 bytes, for GEMMs and wide loads."""
    width = weight.shape[0]
    stride = -(-width // 64) * 64 if hidden.is_cuda else width
    return hidden.new_empty(chunk_tokens, stride)[:, :width]


def _logits(tokens: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    return torch.mm(tokens, weight.t(), out=buffer[: len(tokens)])


def _has_kernels(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _row_statistics(logits: torch.Tensor, labels: torch.Tensor, statistics: torch.Tensor, shard: _Shard) -> None:
    if _has_kernels(logits):
        from falcon_bridge.ops.linear_cross_entropy_kernels import row_statistics

        row_statistics(logits, labels, statistics, shard.first, shard.valid)
        return
    largest, total, target = statistics
    lowest = torch.finfo(logits.dtype).min
    if shard.valid:
        x = logits[:, : shard.valid].to(statistics.dtype, copy=True)
        torch.amax(x, 1, out=largest)
        torch.sum(x.sub_(largest[:, None]).exp_(), 1, out=total)
    else:
        largest.fill_(lowest)
        total.zero_()
    column = labels - shard.first
    picked = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].to(statistics.dtype)
    picked = torch.where(column < shard.valid, picked, lowest)
    target.copy_(torch.where((column >= 0) & (column < logits.shape[1]), picked, 0.0))


def _logits_to_gradient(
    logits: torch.Tensor, labels: torch.Tensor, log_total: torch.Tensor, grad: torch.Tensor, shard: _Shard
) -> None:
    if _has_kernels(logits):
        from falcon_bridge.ops.linear_cross_entropy_kernels import logits_to_gradient

        logits_to_gradient(logits, labels, log_total, grad, shard.first, shard.valid)
        return
    logits[:, shard.valid :] = 0.0
    if not shard.valid:
        return
    x = logits[:, : shard.valid].to(log_total.dtype, copy=True).sub_(log_total[:, None]).exp_()
    column = labels - shard.first
    here = ((column >= 0) & (column < shard.valid)).to(x.dtype)
    x.scatter_add_(1, column.clamp(0, shard.valid - 1)[:, None], -here[:, None])
    logits[:, : shard.valid] = x.mul_(grad[:, None])


def _over_ranks(statistics: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The statistics `[3, t]` of whole rows from those of all ranks' parts of them."""
    if group is None:
        return statistics
    parts = _gathered(statistics, group)
    largest, total, target = parts.view(group.size(), *statistics.shape).unbind(1)
    whole = largest.amax(0)
    return torch.stack([whole, (total * (largest - whole).exp_()).sum(0), target.sum(0)])


def _gathered(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all ranks, rank by rank."""
    whole = rows.new_empty(group.size() * rows.shape[0], rows.shape[1])
    dist.all_gather_into_tensor(whole, rows, group=group)
    return whole


def _start_reduction(
    grad: torch.Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> tuple[torch.Tensor, dist.Work | None]:
    """This rank's gradient of its tokens, complete once the second value has been waited for."""
    if group is None:
        return grad, None
    if not sequence_parallel:
        return grad, dist.all_reduce(grad, group=group, async_op=True)
    own = grad.new_empty(grad.shape[0] // group.size(), grad.shape[1])
    return own, dist.reduce_scatter_tensor(own, grad, group=group, async_op=True)
