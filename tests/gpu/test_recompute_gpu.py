"""Activation recompute with Transformer Engine and mamba-ssm: the same numbers from less memory."""

import gc

import pytest
import torch

from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.parity import compare_tensors
from tests.gpu.rank import checkpoint
from tests.parallel.variant import Variant


pytestmark = pytest.mark.gpu

NAME = "groups2_gated_norm"
# wide and long enough that activations are most of what is allocated
LARGE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "head_dim": 64,
    "mamba_n_heads": 16,
    "mamba_d_ssm": 1024,
}


def every_kind(path, batch):
    from tests.parallel.test_recompute import on_a_rank

    return on_a_rank(Variant(), path, batch)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_recompute_saves_bytes_and_changes_nothing(packed, tmp_path, fp32_rank, report):
    path = checkpoint(tmp_path, NAME, seed=3, num_hidden_layers=4)
    batch = random_batch(_config(path), batch_size=2, seq_length=256, seed=1, packed=packed)
    results = fp32_rank(every_kind, path, batch)
    saved, loss, gradients = results.pop("no recompute")
    for kind, (fewer, same_loss, same_gradients) in results.items():
        difference = max(compare_tensors(gradients, same_gradients).values())
        report(recompute=kind, packed=packed, saved_share=fewer / saved, max_rel_grad_diff=difference)
        assert abs(same_loss - loss) <= 2e-6, kind
        # a recomputed norm adds in another order; attention's backward pass may add with atomics
        assert difference <= 1e-4, kind
        # fused attention keeps little more than its inputs and output, recomputed or not
        assert kind == "core_attn" or fewer < saved, kind


def peak_memory(path, batch):
    """(Bytes at the peak of a training step above those before it, loss) without recompute and with each kind."""
    from falcon_bridge.verification.megatron import MegatronUnderTest
    from tests.parallel.test_recompute import KINDS

    results = {}
    for name, fields in {"no recompute": {}, **KINDS}.items():
        model = MegatronUnderTest(path, Variant(fields=fields), "bf16")
        try:
            model.loss(batch, backward=True)  # workspaces and compiled kernels
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = model.loss(batch, backward=True)
            results[name] = torch.cuda.max_memory_allocated() - before, loss
        finally:
            model.close()
            del model
            gc.collect()
    return results


def test_peak_memory_falls(tmp_path, rank, report):
    path = checkpoint(tmp_path, NAME, seed=3, **LARGE)
    batch = random_batch(_config(path), batch_size=8, seq_length=1024, seed=2)
    results = rank(peak_memory, path, batch)
    peak, loss = results.pop("no recompute")
    for kind, (less, same_loss) in results.items():
        report(recompute=kind, dtype="bf16", peak_mib=less / 2**20, without_mib=peak / 2**20, share=less / peak)
        assert abs(same_loss - loss) <= 1e-5, kind
        assert kind == "core_attn" or less < peak, kind
    share = {kind: less / peak for kind, (less, _) in results.items()}
    assert share["uniform"] < 0.6
    assert share["mixer, mlp, layernorm"] < share["mixer"] < 1


def _config(path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)
