"""Transformer Engine and mamba-ssm against transformers on the same GPU, for every axis of the architecture.

Small models, because what differs between configs is which code runs; released shapes are in test_shapes_gpu.py. One
spawned rank runs them all, with TF32 off for the fp32 ones.
"""

import logging

import pytest

from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import CONFIGS, random_config, write_random_checkpoint
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.parity import compare
from falcon_bridge.verification.reference import transformers_outcome
from falcon_bridge.verification.roundtrip import mismatched_tensors
from falcon_bridge.verification.verify import VerifyRequest, use_full_precision, verify


pytestmark = pytest.mark.gpu

# causal-conv1d reads x, B, C out of in_proj's output and wants the row a multiple of 8; six heads make it 230
NAMES = [name for name in CONFIGS if name != "expand"]


def on_the_gpu(paths, dtype, packed):

    from falcon_bridge.verification.megatron import DTYPES, MegatronUnderTest, megatron_outcome

    logging.disable(logging.WARNING)
    results = {}
    for name, path in paths.items():
        batch = random_batch(random_config(name), batch_size=2, seq_length=61, seed=3, packed=packed)
        reference = transformers_outcome(path, batch, dtype=DTYPES[dtype], device="cuda", gradients=dtype == "fp32")
        model = MegatronUnderTest(path, ParallelLayout(), dtype)
        compared, mismatched = mismatched_tensors(path, model.export())
        outcome = megatron_outcome(model, batch, gradients=dtype == "fp32")
        model.close()
        results[name] = compare(
            reference,
            outcome,
            params_compared=compared,
            mismatched=mismatched,
            layout=ParallelLayout().describe(),
            dtype=dtype,
            seconds=0.0,
        )
    return results


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_random_checkpoint(root / name, name, seed=7) for name in NAMES}


def run(paths, dtype, packed=False):
    with pytest.MonkeyPatch.context() as patch:
        if dtype == "fp32":
            use_full_precision(patch.setenv)
        return run_ranks(on_the_gpu, 1, paths, dtype, packed, device="cuda")[0]


def test_fp32(paths):
    failures = {name: result.findings for name, result in run(paths, "fp32").items() if not result.ok}
    assert not failures


def test_fp32_packed(paths):
    """TE's thd attention and the seq_idx of mamba-ssm's and causal-conv1d's kernels."""
    names = ("plain", "gated_norm", "groups2", "tied_groups2_gated_norm")
    results = run({name: paths[name] for name in names}, "fp32", packed=True)
    failures = {name: result.findings for name, result in results.items() if not result.ok}
    assert not failures


def test_bf16_keeps_close_to_transformers(paths):
    """Looser than at released shapes: branches this large take transformers' own bf16 run 1e-4 off its fp32 run."""
    for name, result in run(paths, "bf16").items():
        assert result.params_mismatched == 0, name
        assert result.cosine >= 0.9997, (name, result.cosine)
        assert abs(result.loss_hf - result.loss_megatron) < 0.02, name


def test_the_verb_starts_an_nccl_rank(paths):
    result = verify(VerifyRequest(paths["gated_norm"], seq_length=64, train_step=True))
    assert result.ok, result.findings
