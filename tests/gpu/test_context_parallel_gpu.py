"""Context parallelism of both branches, over NCCL, with Transformer Engine's attention; rows and packed rows.

In bf16: Transformer Engine's context-parallel attention has no kernel for fp32. The SSM branch alone is in fp32.
"""

import json

import pytest
import torch

from benchmarks.multi_gpu import __main__ as multi_gpu
from falcon_bridge import FalconH1ModelProvider500M


pytestmark = pytest.mark.gpu

DOCUMENTS = (8, 4, 36, 16)  # multiples of 2·cp


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_gpu(ranks, tmp_path, report):
    """CP 2 on two GPUs, TP 2 × CP 2 + SP on four."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    status = multi_gpu.main(["parity", "--ranks", str(ranks), "--out", str(tmp_path), "--only", "CP2"])
    rows = json.loads((tmp_path / f"parity-{ranks}.json").read_text())["rows"]
    for row in rows:
        report(test="context parallel", **row)
    assert len(rows) == 6
    assert status == 0, rows


def test_the_stand_in_of_the_cpu_tests_is_transformer_engines_index():
    import transformer_engine_torch as tex

    from tests.parallel.test_context_parallel import partitioned_indices

    bounds = torch.tensor([0, *DOCUMENTS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for rank in range(2):
        index = tex.thd_get_partitioned_indices(bounds.cuda(), sum(DOCUMENTS), 2, rank)
        assert torch.equal(index.cpu().long(), partitioned_indices(bounds, sum(DOCUMENTS), 2, rank))


def test_fp32_attention_is_refused_in_one_line():
    provider = FalconH1ModelProvider500M(context_parallel_size=2, params_dtype=torch.float32)
    with pytest.raises(ValueError, match="use bf16, cp_comm_type='a2a', which splits heads, or"):
        provider.finalize()
