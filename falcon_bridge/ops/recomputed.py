"""Outputs that are not kept for the backward pass but computed again, in place, just before it reads them."""

from collections.abc import Callable

import torch


def recompute_before_backward_of(
    result: torch.Tensor, output: torch.Tensor, recompute: Callable[[torch.Tensor], None]
) -> None:
    """Free what `output` holds until the backward pass reaches `result`, then compute it again.

    For outputs that are cheap to compute from what is kept anyway, between two linear layers: the second has read the
    output and saved it. Megatron's `CheckpointWithoutOutput` does the same for a function that it may run again whole;
    here only its last step runs again, and writes into the old place without another copy. Where no backward pass will
    come, nothing is freed.

    Args:
        result: What the next layer made of `output`; its gradient comes before anything reads `output` again.
        output: Contiguous, alone in its storage, and not used any more in the forward pass.
        recompute: Writes the same values into the tensor that it is given; must not need `output`.
    """
    if not (torch.is_grad_enabled() and result.requires_grad):
        return
    nbytes, pending = output.untyped_storage().nbytes(), [(output, recompute)]

    def restore(_grad: torch.Tensor) -> None:
        # autograd keeps its hooks as long as the loss lives: what one holds would outlive the backward pass
        while pending:
            output, recompute = pending.pop()
            output.untyped_storage().resize_(nbytes)
            with torch.no_grad():
                # without its version counter: it holds what was saved
                recompute(output.data)

    output.untyped_storage().resize_(0)
    result.register_hook(restore)
