"""Falcon-Edge under every kind of parallelism against a BitNet Llama in plain PyTorch.

Logits, loss, every gradient, the ternary codes and the scales of every Hugging Face matrix. What is not a BitNet
linear runs in fp64, so that no activation gets another code for lack of digits (`reference.working_dtype`).
"""

import logging
from functools import cache

import pytest
import torch

from falcon_bridge.bitnet.reference import quantize_weight
from falcon_bridge.compat import cpu_runtime
from falcon_bridge.conversion.bitnet_config import is_ternary_weight
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import Batch
from falcon_bridge.verification.edge_checkpoints import write_random_edge_checkpoint
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.megatron import MegatronUnderTest
from falcon_bridge.verification.parity import compare_tensors
from tests.parallel.test_layouts import identify
from tests.unit.models.falcon_edge.oracle import BitNetLlama


# each with two key-value heads: at TP 4 they are replicated
CHECKPOINTS = ("plain", "gqa4", "tied")

LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tp=2),
    ParallelLayout(tp=4),
    ParallelLayout(tp=2, sequence_parallel=True),
    ParallelLayout(tp=4, sequence_parallel=True),
    ParallelLayout(pp=2),
    ParallelLayout(tp=2, pp=2, vp=2, sequence_parallel=True),
    ParallelLayout(tp=2, dp=2, distributed_optimizer=True),
]


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """checkpoint -> its directory, a batch, and the oracle after a backward pass; made once."""

    @cache
    def make(name):
        path = write_random_edge_checkpoint(tmp_path_factory.mktemp(name), name, seed=5, num_hidden_layers=4)
        oracle = BitNetLlama.load(path, torch.float64)
        generator = torch.Generator().manual_seed(9)
        batch = Batch(torch.randint(1, oracle.config.vocab_size, (4, 20), generator=generator))
        oracle.loss(batch.tokens).backward()
        return path, batch, oracle

    return make


def on_a_rank(layout, cases):
    """Logits, loss, gradients, codes and scales of each case, on rank 0."""
    logging.disable(logging.WARNING)
    results = []
    for path, batch in cases:
        with cpu_runtime():
            model = MegatronUnderTest(path, layout)
            logits = model.logits(batch)
            loss, gradients = model.gradients(batch)
            results.append((logits, loss, gradients, *codes_and_scales(model)))
            model.close()
    return results if torch.distributed.get_rank() == 0 else None


def codes_and_scales(model):
    """Both as whole Hugging Face matrices: they take the weights' place for the length of an export."""
    linears = [m for chunk in model.chunks for m in chunk.modules() if hasattr(m, "weight_codes")]
    made, weights = [m.weight_codes() for m in linears], [m.weight.data for m in linears]
    exported = []
    for values in (lambda w: w.codes, lambda w: w.row_scales[:, None].expand(w.codes.shape)):
        for linear, weight, quantized in zip(linears, weights, made, strict=True):
            linear.weight.data = values(quantized).to(weight.dtype).contiguous()
        exported.append({name: t for name, t in model.parameters().items() if is_ternary_weight(name)})
    return exported


@pytest.mark.parametrize("layout", LAYOUTS, ids=identify)
def test_equals_plain_pytorch(layout, case):
    made = [case(name) for name in CHECKPOINTS]
    cases = [(path, batch) for path, batch, _ in made]
    results = run_ranks(on_a_rank, layout.world_size, layout, cases, device="cpu", timeout_seconds=120)[0]
    for (_, batch, oracle), (logits, loss, gradients, codes, scales) in zip(made, results, strict=True):
        with torch.no_grad():
            expected = oracle.logits(batch.tokens)
            # Megatron's cross entropy, and what gathers the logits, are fp32
            assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
            assert abs(loss - oracle.loss(batch.tokens).item()) <= 2e-6
        differences = compare_tensors({name: W.grad for name, W in oracle.weights.items()}, gradients)
        assert max(differences.values()) <= 5e-6, differences
        assert {name for name in oracle.weights if is_ternary_weight(name)} == codes.keys() == scales.keys()
        for name in codes:
            expected_codes, expected_scale = quantize_weight(oracle.weights[name])
            assert torch.equal(codes[name], expected_codes.to(codes[name].dtype)), name
            assert (scales[name] == expected_scale.double()).all(), name
