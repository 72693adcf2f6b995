"""Activation recompute with Transformer Engine and mamba-ssm: the same numbers from less memory."""

import pytest

from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.parity import compare_tensors
from falcon_bridge.verification.verify import use_full_precision
from tests.parallel.variant import Variant


pytestmark = pytest.mark.gpu


def on_the_gpu(path, batch):
    from tests.parallel.test_recompute import on_a_rank

    return on_a_rank(Variant(), path, batch)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_recompute_saves_bytes_and_changes_nothing(packed, tmp_path, monkeypatch, report):
    use_full_precision(monkeypatch.setenv)
    name = "groups2_gated_norm"
    path = write_random_checkpoint(tmp_path / "hf", name, seed=3, num_hidden_layers=4)
    batch = random_batch(random_config(name), batch_size=2, seq_length=256, seed=1, packed=packed)
    results = run_ranks(on_the_gpu, 1, path, batch, device="cuda")[0]
    saved, loss, gradients = results.pop("no recompute")
    for kind, (fewer, same_loss, same_gradients) in results.items():
        difference = max(compare_tensors(gradients, same_gradients).values())
        report(recompute=kind, packed=packed, saved_share=fewer / saved, max_rel_grad_diff=difference)
        # atomic additions in the kernels' backward passes vary from run to run
        assert abs(same_loss - loss) <= 2e-6, kind
        assert difference <= 1e-4, kind
        # fused attention keeps little more than its inputs and output, recomputed or not
        assert kind == "core_attn" or fewer < saved, kind
