"""Megatron's fused cross-entropy on logits with masked padding, whole and sharded over the vocabulary."""

import logging

import pytest
import torch

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.megatron import MegatronUnderTest
from tests.parallel.variant import Variant


PADDED = {
    "make_vocab_size_divisible_by": 64,
    "fuse_linear_cross_entropy": False,
}  # 131 to 192: with two ranks, half of the second's columns


def on_a_rank(layouts, path, batch):
    """(loss, gradients, whether it was fused) under each of `layouts`, on rank 0."""
    logging.disable(logging.WARNING)
    results = []
    for layout in layouts:
        with cpu_runtime():
            model = MegatronUnderTest(path, layout, "bf16")
            results.append((*model.gradients(batch), model.config.cross_entropy_loss_fusion))
            model.close()
    return results if torch.distributed.get_rank() == 0 else None


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 2, "sequence_parallel": True}], ids=lambda fields: str(Variant(**fields))
)
def test_native_cross_entropy_fusion_in_bf16(layout, tmp_path):
    path = write_random_checkpoint(tmp_path / "hf", "plain", seed=11)
    batch = random_batch(random_config("plain"), batch_size=2, seq_length=28, seed=12)
    layouts = [Variant(**layout, fields={**PADDED, "cross_entropy_loss_fusion": fused}) for fused in (False, True)]
    plain, fused = run_ranks(on_a_rank, layouts[0].world_size, layouts, path, batch, device="cpu")[0]
    assert (plain[2], fused[2]) == (False, True)
    assert abs(plain[0] - fused[0]) <= 1e-5
    for name, gradient in plain[1].items():
        # it rounds the gradient of the logits to bf16, 8 bits, where the other keeps fp32 one step longer
        assert (fused[1][name] - gradient).norm() <= 1e-2 * gradient.norm(), name
