"""Context parallelism of both branches, over NCCL, with Transformer Engine's attention; rows and packed rows."""

import logging

import pytest
import torch

from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import Batch, random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.parity import FP32, compare, compare_tensors
from falcon_bridge.verification.verify import use_full_precision
from tests.parallel.variant import identify


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

CHECKPOINTS = ("mqa_gated_norm", "groups2_gated_norm")
DOCUMENTS = (8, 4, 36, 16)  # multiples of 2·cp; one spans borders of the SSM's chunks of 16


def on_a_rank(layout, cases):
    from falcon_bridge.verification.megatron import MegatronUnderTest, megatron_outcome
    from tests.parallel.test_context_parallel import PackedUnderContextParallelism

    logging.disable(logging.WARNING)
    outcomes = []
    for path, batch in cases:
        if batch.lengths and layout.cp > 1:
            model = PackedUnderContextParallelism(path, layout)
            outcomes.append(model.gradients(batch))
        else:
            model = MegatronUnderTest(path, layout)
            outcomes.append(megatron_outcome(model, batch, gradients=True))
        model.close()
    return outcomes if torch.distributed.get_rank() == 0 else None


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root, cases = tmp_path_factory.mktemp("context_parallel"), []
    for name in CHECKPOINTS:
        path = write_random_checkpoint(root / name, name, seed=9)
        rows = random_batch(random_config(name), batch_size=2, seq_length=sum(DOCUMENTS), seed=4)
        cases += [(path, rows), (path, Batch(rows.tokens, DOCUMENTS))]
    return cases


@pytest.fixture(scope="module")
def expected(cases):
    with pytest.MonkeyPatch.context() as patch:
        use_full_precision(patch.setenv)
        return run_ranks(on_a_rank, 1, ParallelLayout(), cases, device="cuda")[0]


@pytest.mark.parametrize(
    "layout", [ParallelLayout(cp=2), ParallelLayout(tp=2, cp=2, sequence_parallel=True)], ids=identify
)
def test_equals_one_gpu(layout, cases, expected, monkeypatch):
    if torch.cuda.device_count() < layout.world_size:
        pytest.skip(f"needs {layout.world_size} GPUs")
    use_full_precision(monkeypatch.setenv)
    outcomes = run_ranks(on_a_rank, layout.world_size, layout, cases, device="cuda")[0]
    for (path, batch), one, several in zip(cases, expected, outcomes, strict=True):
        if batch.lengths:
            loss, gradients = several
            assert abs(loss - one.loss) <= FP32.loss, path
            assert max(compare_tensors(one.gradients, gradients).values()) <= FP32.gradients, path
        else:
            about = {"params_compared": 1, "mismatched": [], "layout": {}, "dtype": "fp32", "seconds": 0.0}
            assert not compare(one, several, **about).findings, path


def test_the_stand_in_of_the_cpu_tests_is_transformer_engines_index():
    import transformer_engine_torch as tex

    from tests.parallel.test_context_parallel import partitioned_indices

    bounds = torch.tensor([0, *DOCUMENTS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for rank in range(2):
        index = tex.thd_get_partitioned_indices(bounds.cuda(), sum(DOCUMENTS), 2, rank)
        assert torch.equal(index.cpu().long(), partitioned_indices(bounds, sum(DOCUMENTS), 2, rank))
