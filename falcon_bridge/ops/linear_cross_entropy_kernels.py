"""Triton kernels of `linear_cross_entropy`: one read of the logits forward, one read and one write backward."""

import torch
import triton
import triton.language as tl


_BLOCK = 4096
_WARPS = 8


@triton.jit
def _row_statistics_kernel(
    logits_ptr,
    labels_ptr,
    largest_ptr,
    total_ptr,
    target_ptr,
    stride,
    first,
    width,
    valid,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: the maximum, the sum of exponentials below it, and the logit of the label.

    All `stride` elements of a row may be read: masks that end at a multiple of 16 keep the loads wide, and what lies
    beyond the `valid` ones counts for nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride
    offsets = tl.arange(0, BLOCK)
    largest = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, valid, BLOCK):
        columns = start + offsets
        x = tl.load(logits_row + columns, mask=columns < stride, other=LOWEST).to(tl.float32)
        x = tl.where(columns < valid, x, LOWEST)
        new_largest = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), axis=0)
        largest = new_largest
    column = tl.load(labels_ptr + row) - first
    here = (column >= 0) & (column < width)
    target = tl.load(logits_row + column, mask=here & (column < valid), other=LOWEST).to(tl.float32)
    tl.store(largest_ptr + row, largest)
    tl.store(total_ptr + row, total)
    tl.store(target_ptr + row, tl.where(here, target, 0.0))


@triton.jit
def _logits_gradient_kernel(
    logits_ptr, labels_ptr, log_total_ptr, grad_ptr, stride, first, valid, BLOCK: tl.constexpr
):
    """A block of a row a program, in place; see `_row_statistics_kernel` for `stride`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointers = logits_ptr + row * stride + columns
    x = tl.load(pointers, mask=columns < stride, other=0.0).to(tl.float32)
    target = tl.load(labels_ptr + row) - first
    gradient = tl.exp(x - tl.load(log_total_ptr + row)) - tl.where(columns == target, 1.0, 0.0)
    gradient = tl.where(columns < valid, gradient * tl.load(grad_ptr + row), 0.0)
    tl.store(pointers, gradient.to(logits_ptr.dtype.element_ty), mask=columns < stride)


def row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, statistics: torch.Tensor, first: int, valid: int
) -> None:
    """What the loss needs of each row of logits, computed in fp32.

    Args:
        logits: `[t, v]`, unit stride over v; what lies between its rows is read too.
        labels: int `[t]`, contiguous.
        statistics: fp32 `[3, t]`, written: the maximum, the sum of ``exp(logit - maximum)``, and the label's logit (0
            where the label is none of these columns, the lowest number of the dtype where it is padding).
        first: Label of the first column.
        valid: How many columns are not padding.
    """
    largest, total, target = statistics
    _row_statistics_kernel[(logits.shape[0],)](
        logits,
        labels,
        largest,
        total,
        target,
        logits.stride(0),
        first,
        logits.shape[1],
        valid,
        LOWEST=torch.finfo(logits.dtype).min,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def logits_to_gradient(
    logits: torch.Tensor, labels: torch.Tensor, log_total: torch.Tensor, grad: torch.Tensor, first: int, valid: int
) -> None:
    """Replace logits by the loss's gradient, ``grad·(softmax - onehot)``, and padding and what follows it by 0.

    Args:
        logits: `[t, v]`, unit stride over v; all memory from one row to the next is overwritten.
        labels: int `[t]`, contiguous.
        log_total: fp32 `[t]`, log of the sum of exponentials over the whole vocabulary.
        grad: fp32 `[t]`, of each token's loss.
        first: Label of the first column.
        valid: How many columns are not padding.
    """
    stride = logits.stride(0)
    _logits_gradient_kernel[(logits.shape[0], triton.cdiv(stride, _BLOCK))](
        logits, labels, log_total, grad, stride, first, valid, BLOCK=_BLOCK, num_warps=_WARPS
    )
