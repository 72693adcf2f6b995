"""A ternary Falcon-H1 in stock transformers, and batches on which rounding cannot make two implementations differ."""

from unittest import mock

import torch

from falcon_bridge.bitnet.reference import bitlinear
from falcon_bridge.bitnet.scales import activation_scale, token_absmax
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.reference import transformers_outcome


def ternary_outcome(path, batch, vocab_size, **kwargs):
    """`transformers_outcome` with BitNet linears but for the head, and the margin of its forward passes.

    The margin is the least distance of a scaled activation to where its int8 code changes. Implementations whose
    activations differ by less have the same codes, and agree as closely as dense ones do; one code more or less
    changes the logits by about 1e-3.
    """
    margins = []
    dense = torch.nn.Linear.forward

    def ternary(linear, x):
        if linear.out_features == vocab_size:
            return dense(linear, x)
        scaled = x.detach().float() * activation_scale(token_absmax(x))
        margins.append((scaled.remainder(1) - 0.5).abs().min().item())
        return bitlinear(x, linear.weight)

    with mock.patch.object(torch.nn.Linear, "forward", ternary):
        outcome = transformers_outcome(path, batch, **kwargs)
    return outcome, min(margins)


def settled_case(path, config, *, margin=5e-5, train=None, **batch_shape):
    """The first random batch whose codes are all at least `margin` from a tie, and the outcome on it."""
    for seed in range(100):
        batch = random_batch(config, seed=seed, **batch_shape)
        _, found = ternary_outcome(path, batch, config.vocab_size)
        if found >= margin:
            outcome, _ = ternary_outcome(path, batch, config.vocab_size, gradients=True, train=train)
            return batch, outcome
    raise AssertionError(f"no batch keeps {margin} from a tie")
