"""Checkpoints saved under one layout and loaded under another: weights and optimizer state, bit for bit.

Each chain trains under its first layout, saves, and hands the checkpoint from layout to layout. What every one of them
exports to Hugging Face and holds in its optimizer is compared with what the first one had.
"""

import logging

import pytest
import torch

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.megatron import MegatronUnderTest
from falcon_bridge.verification.roundtrip import mismatched_tensors
from tests.parallel import states
from tests.parallel.variant import Variant


MIXED = {"layer_pattern": "PM*-"}
# every tensor-parallel size pads the odd vocabularies differently; this pads one rank's, too
PADDED = {"make_vocab_size_divisible_by": 64}


def distributed(**layout) -> Variant:
    return Variant(distributed_optimizer=True, **layout)


# name -> checkpoint, its overrides, dtype, format of the distributed optimizer, layouts
CHAINS = {
    "adam": (
        "groups2_gated_norm",
        {},
        "fp32",
        None,
        [
            Variant(),
            Variant(tp=2, sequence_parallel=True),
            Variant(tp=2, pp=2, vp=2, sequence_parallel=True, fields=PADDED),
            Variant(tp=4),
            Variant(pp=2, first_stage_layers=1, last_stage_layers=3),
        ],
    ),
    "distributed optimizer, tied": (
        "mqa_gated_norm",
        {"tie_word_embeddings": True},
        "fp32",
        "fully_reshardable",
        [
            distributed(dp=2),
            distributed(pp=2),
            distributed(tp=2, sequence_parallel=True, fields=PADDED),
        ],
    ),
    "distributed optimizer, bf16, mixed pattern": (
        "groups2_gated_norm",
        {},
        "bf16",
        "fully_reshardable",
        [distributed(tp=2, dp=2, fields=MIXED), distributed(pp=2, fields=MIXED), distributed(fields=MIXED)],
    ),
    # Bridge's default format: only the data-parallel size may change
    "distributed optimizer, bf16, data-parallel": (
        "mqa_gated_norm",
        {"tie_word_embeddings": True},
        "bf16",
        "dp_reshardable",
        [distributed(dp=2), distributed()],
    ),
    "adam, bf16, mixed pattern": (
        "plain",
        {},
        "bf16",
        None,
        [Variant(pp=2, fields=MIXED), Variant(tp=2, sequence_parallel=True, fields=MIXED), Variant(fields=MIXED)],
    ),
}


def on_a_rank(hf, layout, dtype, sharding, batch, source, target):
    """The state after training (no `source`) or loading, on rank 0; saved to `target`, if there is one."""
    logging.disable(logging.WARNING)
    with cpu_runtime():
        model = MegatronUnderTest(hf, layout, dtype)
        optimizer = states.make_optimizer(model, distributed=layout.distributed_optimizer)
        if source is None:
            for _ in range(3):
                optimizer.zero_grad()
                model.loss(batch, backward=True)
                optimizer.step()
        else:
            states.load(model, optimizer, source, sharding)
        state = states.snapshot(model, optimizer)
        loss = model.loss(batch)
        if target is not None:
            states.save(model, optimizer, target, sharding)
    return (state, loss) if torch.distributed.get_rank() == 0 else None


@pytest.mark.parametrize("chain", CHAINS)
def test_state_moves_between_layouts_bit_for_bit(chain, tmp_path):
    name, overrides, dtype, sharding, layouts = CHAINS[chain]
    hf = write_random_checkpoint(tmp_path / "hf", name, seed=5, num_hidden_layers=4, **overrides)
    batch = random_batch(random_config(name), batch_size=4, seq_length=12, seed=6)
    expected, expected_loss, source = None, None, None
    for number, layout in enumerate(layouts):
        target = tmp_path / str(number) if layout is not layouts[-1] else None
        state, loss = run_ranks(
            on_a_rank,
            layout.world_size,
            hf,
            layout,
            dtype,
            sharding,
            batch,
            source,
            target,
            device="cpu",
            timeout_seconds=120,
        )[0]
        if expected is None:
            expected, expected_loss = state, loss
            check_telling(hf, state)
        assert state.keys() == expected.keys()
        wrong = [
            f"{kind} of {tensor}"
            for kind in expected
            for tensor in expected[kind].keys() | state[kind].keys()
            if not same(expected[kind].get(tensor), state[kind].get(tensor))
        ]
        assert not wrong, f"{layout}: {wrong[:5]} and {len(wrong[5:])} more"
        if dtype == "fp32":
            assert abs(loss - expected_loss) <= 2e-6
        source = target


def same(expected, got) -> bool:
    return expected is not None and got is not None and expected.dtype == got.dtype and torch.equal(expected, got)


def check_telling(hf, state) -> None:
    """Training has moved every tensor and filled every moment, so that nothing that was not loaded can go unseen."""
    weights = state["weights"]
    assert set(mismatched_tensors(hf, weights.items())[1]) >= weights.keys()
    assert all(state[moment][name].count_nonzero() for moment in states.MOMENTS for name in weights)
    assert state["step"]["step"].tolist() == [3]
