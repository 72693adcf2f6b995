"""Packed rows in bf16, where Transformer Engine takes its fused attention kernel, which fp32 does not have.

Rounding makes a packed row and its documents alone differ: how far each is from fp32 is compared. fp32 is in
test_parity_gpu.py, the SSM branch alone in test_ssm_gpu.py.
"""

import gc

import pytest
import torch

from falcon_bridge.verification.batch import Batch, random_batch
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.reference import transformers_outcome
from tests.gpu.rank import SEQUENCE, checkpoint, documents


pytestmark = pytest.mark.gpu

# across a border of chunks, of one token, of a whole chunk, of two tokens, whose last chunk is short
LENGTHS = (70, 1, 64, 2, 13)


def packed_and_alone(path, batch: Batch):
    """Logits and gradients of a packed batch: in fp32 from transformers, packed, and from each document alone."""
    from falcon_bridge.verification.megatron import MegatronUnderTest

    def ours(tokens: Batch):
        # a model for each: in bf16, taking the gradients out costs it the hooks that collect them
        model = MegatronUnderTest(path, ParallelLayout(), "bf16")
        try:
            return model.logits(tokens), model.gradients(tokens)[1]
        finally:
            model.close()
            gc.collect()

    truth = transformers_outcome(path, batch, device="cuda", gradients=True)
    packed = ours(batch)
    alone_logits, alone_gradients = [], {name: torch.zeros_like(g) for name, g in packed[1].items()}
    for document in documents(batch):
        length = document.tokens.shape[1]
        if length == 1:  # causal-conv1d refuses it, and it has no loss
            alone_logits.append(None)
            continue
        logits, gradients = ours(document)
        alone_logits.append(logits)
        share = document.tokens.shape[0] * (length - 1) / batch.loss_mask.sum()
        for name, gradient in gradients.items():
            alone_gradients[name] += share * gradient
    return truth, packed, (alone_logits, alone_gradients)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["plain", "groups2_gated_norm"])
def test_packing_costs_no_accuracy(name, tmp_path, rank, report):
    assert sum(LENGTHS) == SEQUENCE
    path = checkpoint(tmp_path, name)
    batch = Batch(random_batch(_config(path), batch_size=2, seq_length=SEQUENCE, seed=5).tokens, LENGTHS)
    truth, (logits, gradients), (alone_logits, alone_gradients) = rank(packed_and_alone, path, batch)
    errors = []
    for expected, got, alone in zip(
        truth.logits.split(LENGTHS, 1), logits.split(LENGTHS, 1), alone_logits, strict=True
    ):
        error = distance(got, expected)
        errors.append((error, None if alone is None else distance(alone, expected)))
    grad_error = distance(_flat(gradients), _flat(truth.gradients))
    alone_error = distance(_flat(alone_gradients), _flat(truth.gradients))
    report(test="packed bf16", config=name, lengths=LENGTHS, logits=errors, gradients=[grad_error, alone_error])
    # two roundings of the same numbers: as far from the truth, within what a few hundred of them scatter
    largest = max(alone for _, alone in errors if alone is not None)
    assert all(error <= 1.3 * (alone or largest) for error, alone in errors), errors
    assert grad_error <= 1.3 * alone_error


def _config(path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def _flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])
