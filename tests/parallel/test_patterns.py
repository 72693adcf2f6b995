"""Mixed layer patterns under every kind of parallelism against one process with the same Megatron weights."""

import logging
from functools import cache

import pytest
import torch

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.megatron import MegatronUnderTest, megatron_outcome
from falcon_bridge.verification.parity import compare
from falcon_bridge.verification.reference import TrainSteps
from tests.parallel.variant import Variant, identify


CHECKPOINTS = {"groups2_gated_norm": {}, "mqa_gated_norm": {"tie_word_embeddings": True}}
FOUR, FIVE = {"layer_pattern": "PM*-"}, {"layer_pattern": "PM*-M"}
# tensors of a layer of each kind, norms included
TENSORS = {"P": 17, "M": 9, "*": 5, "-": 4}


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """(checkpoint, pattern, packed) -> its directory, a batch and what one process computes, made once."""

    @cache
    def make(name, pattern, packed):
        path = tmp_path_factory.mktemp(name)
        write_random_checkpoint(path, name, seed=7, num_hidden_layers=len(pattern), **CHECKPOINTS[name])
        batch = random_batch(random_config(name), batch_size=4, seq_length=28, seed=8, packed=packed)
        return path, batch, run_ranks(on_a_rank, 1, Variant(fields={"layer_pattern": pattern}), [(path, batch)])[0][0]

    return make


def on_a_rank(layout, cases):
    """The outcome of each case, on rank 0."""
    logging.disable(logging.WARNING)
    outcomes = []
    for path, batch in cases:
        with cpu_runtime():
            model = MegatronUnderTest(path, layout)
            outcomes.append(megatron_outcome(model, batch, gradients=True, train=TrainSteps(steps=2)))
            model.close()
    return outcomes if torch.distributed.get_rank() == 0 else None


@pytest.mark.parametrize(
    ("layout", "packed"),
    [
        (Variant(pp=2, fields=FOUR), False),
        (Variant(pp=2, first_stage_layers=3, last_stage_layers=2, fields=FIVE), True),
        (Variant(pp=2, last_stage_layers=1, fields=FIVE), False),
        (Variant(tp=2, fields=FOUR), True),
        (Variant(tp=2, pp=2, sequence_parallel=True, fields=FOUR), False),
    ],
    ids=lambda value: identify(value) if isinstance(value, Variant) else "packed" if value else "rows",
)
def test_equals_one_process(layout, packed, cases):
    pattern = layout.fields["layer_pattern"]
    made = [cases(name, pattern, packed) for name in CHECKPOINTS]
    outcomes = run_ranks(
        on_a_rank, layout.world_size, layout, [case[:2] for case in made], device="cpu", timeout_seconds=120
    )[0]
    for name, (_, _, expected), outcome in zip(CHECKPOINTS, made, outcomes, strict=True):
        assert outcome.gradients.keys() == expected.gradients.keys()
        assert all(gradient.count_nonzero() for gradient in expected.gradients.values())
        result = compare(
            expected,
            outcome,
            params_compared=len(outcome.weights),
            mismatched=[],
            layout=layout.describe(),
            dtype="fp32",
            seconds=0.0,
        )
        assert not result.findings, name
        # and the embedding, the final norm and, untied, the head
        outside = 2 if CHECKPOINTS[name] else 3
        assert len(outcome.weights) == outside + sum(TENSORS[symbol] for symbol in pattern)
