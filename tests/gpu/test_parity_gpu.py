"""Transformer Engine and mamba-ssm against transformers, for every axis of the architecture.

Small models, because what differs between configs is which code runs; released shapes are in test_shapes_gpu.py.
"""

import gc

import pytest

from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import CONFIGS
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.parity import compare
from falcon_bridge.verification.reference import TrainSteps, transformers_outcome
from falcon_bridge.verification.roundtrip import mismatched_tensors
from falcon_bridge.verification.verify import VerifyRequest, verify
from tests.gpu.rank import ONE_KERNEL_CONFIG, SEQUENCE, checkpoint


pytestmark = pytest.mark.gpu

# n_groups, gated norm and tied embeddings; a head count that makes in_proj's rows no multiple of 8 wide
IN_BF16 = ("gated_norm", "tied_groups2_gated_norm", "expand", "released_multipliers")


def parity(path, dtype: str, packed: bool, device: str):
    from transformers import AutoConfig

    from falcon_bridge.verification.megatron import DTYPES, MegatronUnderTest, megatron_outcome

    config = AutoConfig.from_pretrained(path)
    batch = random_batch(config, batch_size=2, seq_length=SEQUENCE, seed=3, packed=packed)
    wanted = {"gradients": dtype == "fp32", "train": TrainSteps(steps=3) if dtype == "fp32" and not packed else None}
    reference = transformers_outcome(path, batch, dtype=DTYPES[dtype], device=device, **wanted)
    model = MegatronUnderTest(path, ParallelLayout(), dtype)
    try:
        compared, mismatched = mismatched_tensors(path, model.export())
        outcome = megatron_outcome(model, batch, **wanted)
    finally:
        model.close()
        gc.collect()
    about = {"params_compared": compared, "mismatched": mismatched, "layout": {}, "dtype": dtype, "seconds": 0.0}
    return compare(reference, outcome, **about)


def figures(result) -> dict:
    return {
        "max_rel_logit_diff": result.max_abs_logit_diff / result.max_abs_logit,
        "cosine": result.cosine,
        "loss_diff": abs(result.loss_hf - result.loss_megatron),
        "max_rel_grad_diff": result.max_rel_grad_diff,
        "max_rel_weight_diff": result.max_rel_weight_diff,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32(name, tmp_path, fp32_rank, report):
    result = fp32_rank(parity, checkpoint(tmp_path, name), "fp32", False, "cuda")
    report(test="parity fp32", config=name, **figures(result))
    assert not result.findings
    assert result.max_rel_grad_diff is not None and result.max_rel_weight_diff is not None


@pytest.mark.parametrize("name", ["plain", "gated_norm", "groups2", "tied_groups2_gated_norm"])
def test_fp32_packed(name, tmp_path, fp32_rank, report):
    """A packed row in TE's thd attention and, with seq_idx, in causal-conv1d's and mamba-ssm's kernels gives each
    document what it gets alone: one of one token, one across a border of chunks, none a multiple of the chunk.
    """
    result = fp32_rank(parity, checkpoint(tmp_path, name), "fp32", True, "cuda")
    report(test="parity fp32 packed", config=name, **figures(result))
    assert not result.findings
    assert result.max_rel_grad_diff is not None


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_keeps_close_to_transformers(name, tmp_path, rank, report):
    """Looser than at released shapes: branches this large take transformers' own bf16 run 1e-4 off its fp32 run."""
    result = rank(parity, checkpoint(tmp_path, name), "bf16", False, "cuda")
    report(test="parity bf16", config=name, **figures(result))
    assert result.params_mismatched == 0
    assert result.cosine >= 0.9997
    assert abs(result.loss_hf - result.loss_megatron) < 0.02


def test_the_verb_starts_an_nccl_rank(tmp_path, monkeypatch):
    for name, value in ONE_KERNEL_CONFIG.items():
        monkeypatch.setenv(name, value)
    path = checkpoint(tmp_path, "gated_norm")
    result = verify(VerifyRequest(path, seq_length=128, train_step=True))
    assert result.ok, result.findings
    assert result.max_rel_weight_diff is not None
