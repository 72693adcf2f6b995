"""Every parallel layout against stock transformers from the same checkpoint.

Logits, loss, every gradient, the weights five optimizer steps later, and the bit-exact export from that layout. Bridge
is imported once here and the ranks are forked; one fork runs all checkpoints under its layout.
"""

import logging
from functools import cache

import pytest
import torch

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.megatron import MegatronUnderTest, megatron_outcome
from falcon_bridge.verification.parity import compare
from falcon_bridge.verification.reference import TrainSteps, transformers_outcome
from falcon_bridge.verification.roundtrip import mismatched_tensors


# n_groups 1 and 2, gated norm on and off, tied and untied, each with each; two key-value heads and one; all with an
# odd vocabulary. Training steps cost the most, so half of them take some
CHECKPOINTS = {
    "plain": {},
    "mqa_gated_norm": {"tie_word_embeddings": True},
    "groups2": {"tie_word_embeddings": True},
    "groups2_gated_norm": {},
}
TRAIN = {"mqa_gated_norm": TrainSteps(steps=5), "groups2": TrainSteps(steps=5)}

EVEN = [
    ParallelLayout(tp=2),
    ParallelLayout(tp=4),
    ParallelLayout(tp=2, sequence_parallel=True),
    ParallelLayout(tp=4, sequence_parallel=True),
    ParallelLayout(pp=2),
    ParallelLayout(pp=2, vp=2),
    ParallelLayout(tp=2, pp=2),
    ParallelLayout(tp=2, pp=2, vp=2, sequence_parallel=True),
    ParallelLayout(dp=2),
    ParallelLayout(dp=2, distributed_optimizer=True),
    ParallelLayout(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True),
    ParallelLayout(pp=2, dp=2),
]
UNEVEN = [
    ParallelLayout(pp=2, first_stage_layers=2, last_stage_layers=3),
    ParallelLayout(pp=2, last_stage_layers=1),
    ParallelLayout(pp=2, pipeline_layout="Et|ttttL"),
    ParallelLayout(pp=4, first_stage_layers=1, last_stage_layers=2),
    ParallelLayout(tp=2, pp=2, vp=2, sequence_parallel=True, pipeline_layout="Ett|t|t|tL"),
]
PACKED = [
    ParallelLayout(tp=2, sequence_parallel=True),
    ParallelLayout(tp=2, pp=2),
    ParallelLayout(dp=2),
]


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """(checkpoint, layers, packed) -> its directory, a batch and transformers' outcome, made once."""

    @cache
    def make(name, layers, packed):
        path = tmp_path_factory.mktemp(f"{name}_{layers}")
        overrides = {**CHECKPOINTS[name], "num_hidden_layers": layers}
        write_random_checkpoint(path, name, seed=17, **overrides)
        config = random_config(name, **overrides)
        # 28 is no multiple of the SSM's chunk of 16; four rows are a microbatch for each of two stages of two replicas
        batch = random_batch(config, batch_size=4, seq_length=28, seed=23, packed=packed)
        train = TRAIN.get(name)
        return path, batch, train, transformers_outcome(path, batch, gradients=True, train=train)

    return make


def identify(layout):
    parts = [str(layout), layout.distributed_optimizer and "distributed-optimizer", layout.pipeline_layout]
    counts = [f"{name}{n}" for name in ("first", "last") if (n := getattr(layout, f"{name}_stage_layers"))]
    return "-".join(part for part in [*parts, *counts] if part)


def on_a_rank(layout, cases):
    """Runs on each rank: all `cases` one after the other; the results on rank 0."""
    logging.disable(logging.WARNING)
    results = []
    for path, batch, train, reference in cases:
        with cpu_runtime():
            model = MegatronUnderTest(path, layout)
            compared, mismatched = mismatched_tensors(path, model.export())
            outcome = megatron_outcome(model, batch, gradients=True, train=train)
            model.close()
        results.append(
            compare(
                reference,
                outcome,
                params_compared=compared,
                mismatched=mismatched,
                layout=layout.describe(),
                dtype="fp32",
                seconds=0.0,
            )
        )
    return results if torch.distributed.get_rank() == 0 else None


def check(layout, names, cases):
    results = run_ranks(on_a_rank, layout.world_size, layout, cases, device="cpu", timeout_seconds=120)[0]
    failures = {name: result.findings for name, result in zip(names, results, strict=True) if not result.ok}
    assert not failures
    assert all(result.max_rel_grad_diff is not None for result in results)
    assert any(result.max_rel_weight_diff is not None for result in results)


@pytest.mark.parametrize("layout", EVEN, ids=identify)
def test_equals_transformers(layout, cases):
    check(layout, CHECKPOINTS, [cases(name, 4, False) for name in CHECKPOINTS])


@pytest.mark.parametrize("layout", UNEVEN, ids=identify)
def test_uneven_stages_lose_no_layer(layout, cases):
    names = ("groups2_gated_norm", "mqa_gated_norm")
    check(layout, names, [cases(name, 5, False) for name in names])


@pytest.mark.parametrize("layout", PACKED, ids=identify)
def test_packed_documents_are_what_each_is_alone(layout, cases):
    names = ("groups2", "mqa_gated_norm")
    check(layout, names, [cases(name, 4, True) for name in names])
