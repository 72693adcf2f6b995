"""The sum into the residual stream, in the slot where Megatron has its bias-dropout-add."""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

from falcon_bridge.ops.elementwise import residual_sum


def get_residual_add(training: bool, fused: bool) -> Callable:
    """Megatron's `get_bias_dropout_add` for layers without biases and, as a rule, without dropout.

    Megatron's fused one is compiled by torch.compile, for seconds at the start of a run and a third of a millisecond
    of the host at each call, and where it has seen too many shapes it goes on uncompiled, with other random numbers
    for dropout in a recomputed layer than in the layer itself. This one is a plain kernel; with dropout it is
    Megatron's, not compiled.

    Args:
        training: Whether dropout is active.
        fused: Megatron's `bias_dropout_fusion`; part of the interface.

    Returns:
        A function of `(x, second term or None)`, residual and dropout probability.
    """
    return partial(_residual_add, training=training)


def _residual_add(
    terms: tuple[torch.Tensor, torch.Tensor | None],
    residual: torch.Tensor,
    prob: float,
    *,
    training: bool,
) -> torch.Tensor:
    if training and prob:
        return get_bias_dropout_add(training, False)(terms, residual, prob)
    return residual_sum(residual, *[term for term in terms if term is not None])
