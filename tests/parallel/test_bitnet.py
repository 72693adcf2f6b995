"""A ternary Falcon-H1 under parallel layouts against stock transformers with the reference's BitNet linears.

The layers alone, rank by rank, are in test_bitnet_linears.py.
"""

import logging
from functools import cache

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from falcon_bridge.bitnet import BitNetColumnParallelLinear
from falcon_bridge.compat import cpu_runtime
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.megatron import MegatronUnderTest, megatron_outcome
from falcon_bridge.verification.parity import compare
from falcon_bridge.verification.reference import TrainSteps
from falcon_bridge.verification.roundtrip import mismatched_tensors
from tests.parallel import states
from tests.parallel.ternary import settled_case
from tests.parallel.variant import Variant, identify


TERNARY = {"use_bitnet": True}
LAYOUTS = [
    Variant(fields=TERNARY),
    Variant(tp=2, fields=TERNARY),
    Variant(tp=4, fields=TERNARY),  # two key-value heads
    Variant(tp=4, sequence_parallel=True, fields=TERNARY),
    Variant(pp=2, fields=TERNARY),  # two micro-batches in flight
    Variant(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True, fields=TERNARY),
]
# name -> whether its documents are packed, which makes each row a micro-batch of its own
CHECKPOINTS = {"groups2_gated_norm": False, "plain": True}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Checkpoint -> its directory, a batch, train steps and transformers' outcome."""

    @cache
    def make(name):
        path = write_random_checkpoint(tmp_path_factory.mktemp(name) / "hf", name, seed=5)
        train = None if CHECKPOINTS[name] else TrainSteps(steps=3)
        shape = {"batch_size": 2, "seq_length": 8, "packed": CHECKPOINTS[name]}
        return path, *settled_case(path, random_config(name), train=train, **shape), train

    return make


def on_a_rank(layout, cases):
    """The verdict on each of `cases`, on rank 0."""
    logging.disable(logging.WARNING)
    results = []
    for path, batch, reference, train in cases:
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=identify)
def test_equals_transformers(layout, cases):
    results = run_ranks(
        on_a_rank, layout.world_size, layout, [cases(name) for name in CHECKPOINTS], device="cpu", timeout_seconds=120
    )[0]
    assert not {name: result.findings for name, result in zip(CHECKPOINTS, results, strict=True) if not result.ok}
    assert all(result.max_rel_grad_diff is not None for result in results)
    assert results[0].max_rel_weight_diff is not None


RECOMPUTE = {
    "no recompute": {},
    "whole layers": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "mixer and mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"], "recompute_mixer": True},
}


def recomputed(path, batch):
    """Loss and gradients by `RECOMPUTE`, on rank 0."""
    logging.disable(logging.WARNING)
    results = {}
    for name, fields in RECOMPUTE.items():
        with cpu_runtime():
            model = MegatronUnderTest(path, Variant(tp=2, sequence_parallel=True, fields={**TERNARY, **fields}))
            results[name] = model.gradients(batch)
            model.close()
    return results if torch.distributed.get_rank() == 0 else None


def test_recompute_changes_nothing(cases):
    path, batch, _, _ = cases("groups2_gated_norm")
    results = run_ranks(recomputed, 2, path, batch, device="cpu", timeout_seconds=120)[0]
    loss, gradients = results.pop("no recompute")
    for kind, (same_loss, same_gradients) in results.items():
        assert same_loss == loss, kind
        assert all(torch.equal(same_gradients[name], gradient) for name, gradient in gradients.items()), kind


class Overlapping(MegatronUnderTest):
    """Parameters are gathered while the next forward pass is under way, and gradients reduced during the backward."""

    def _ddp_config(self):
        return DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_param_gather=True,
            overlap_grad_reduce=True,
        )


def trained(model, batch, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(model.loss(batch, backward=True))
        optimizer.step()
    return losses


def with_and_without_overlap(path, batch, layout):
    """Losses of each step and the logits after the last, on rank 0."""
    logging.disable(logging.WARNING)
    results = []
    for kind in (MegatronUnderTest, Overlapping):
        with cpu_runtime():
            model = kind(path, layout)
            losses = trained(model, batch, states.make_optimizer(model, distributed=True), 3)
            linears = [
                module for module in model.chunks[0].modules() if isinstance(module, BitNetColumnParallelLinear)
            ]
            assert linears and all(linear.weight.grad_added_to_main_grad for linear in linears)
            results.append((losses, model.logits(batch)))
            model.close()
    return results if torch.distributed.get_rank() == 0 else None


def test_weights_are_quantised_after_an_overlapped_gather(cases):
    path, batch, _, _ = cases("groups2_gated_norm")
    layout = Variant(dp=2, distributed_optimizer=True, fields=TERNARY)
    plain, overlapped = run_ranks(with_and_without_overlap, 2, path, batch, layout, device="cpu", timeout_seconds=120)[
        0
    ]
    assert plain[0] == overlapped[0] and len(set(plain[0])) == 3
    assert torch.equal(plain[1], overlapped[1])


def resumed(path, batch, layout, directory):
    """Losses and logits of a run of four steps, and of its last two after a checkpoint; on rank 0."""
    logging.disable(logging.WARNING)
    with cpu_runtime():
        model = MegatronUnderTest(path, layout)
        optimizer = states.make_optimizer(model, distributed=True)
        trained(model, batch, optimizer, 2)
        states.save(model, optimizer, directory, "fully_reshardable")
        straight = trained(model, batch, optimizer, 2), model.logits(batch)
        model.close()

        model = MegatronUnderTest(path, layout)
        optimizer = states.make_optimizer(model, distributed=True)
        model.logits(batch)  # quantises the weights that are about to be replaced
        states.load(model, optimizer, directory, "fully_reshardable")
        again = trained(model, batch, optimizer, 2), model.logits(batch)
        model.close()
    return (straight, again) if torch.distributed.get_rank() == 0 else None


def test_resuming_changes_nothing(cases, tmp_path):
    path, batch, _, _ = cases("groups2_gated_norm")
    layout = Variant(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True, fields=TERNARY)
    straight, again = run_ranks(resumed, 4, path, batch, layout, tmp_path / "ckpt", device="cpu", timeout_seconds=120)[
        0
    ]
    assert straight[0] == again[0] and torch.equal(straight[1], again[1])
