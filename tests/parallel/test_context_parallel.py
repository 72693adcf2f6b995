"""Context parallelism of the SSM branch against one process; attention's needs Transformer Engine, so a GPU."""

import contextlib
import logging
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.ssm import mamba_context_parallel

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import Batch, random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.megatron import MegatronUnderTest, megatron_outcome
from falcon_bridge.verification.parity import FP32, compare, compare_tensors
from tests.parallel.variant import Variant, identify


# one group and two, of which the two are split over context- or tensor-parallel ranks or both
CHECKPOINTS = ("mqa_gated_norm", "groups2_gated_norm")
SSM_ONLY = {"layer_pattern": "M-M"}
DOCUMENTS = (4, 12, 8)  # multiples of 2·cp, as Megatron cuts each into as many chunks; the SSM's are 16 long


def partitioned_indices(bounds, total: int, cp: int, rank: int) -> torch.Tensor:
    """What Transformer Engine's `thd_get_partitioned_indices` gives: of each document's 2·cp chunks two for a rank."""
    index = torch.arange(total)
    chunks = [document.chunk(2 * cp) for document in index.split(bounds.diff().tolist())]
    return torch.cat([torch.cat([document[rank], document[2 * cp - 1 - rank]]) for document in chunks])


@contextlib.contextmanager
def index_of_transformer_engine():
    tex = SimpleNamespace(thd_get_partitioned_indices=partitioned_indices)
    with (
        mock.patch.object(mamba_context_parallel, "tex", tex),
        mock.patch.object(mamba_context_parallel, "is_te_min_version", lambda version: True),
    ):
        yield


class PackedUnderContextParallelism(MegatronUnderTest):
    """Cuts packed rows as Megatron Bridge's `gpt_step` does: document by document."""

    def _cut(self, rows, packed):
        index = partitioned_indices(
            packed.cu_seqlens_q,
            rows["input_ids"].shape[1],
            self.layout.cp,
            parallel_state.get_context_parallel_rank(),
        )
        cut = {name: value[:, index].contiguous() for name, value in rows.items()}
        # which it counts after the cut
        return cut, replace(packed, total_tokens=len(index), seq_idx=None)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("context_parallel")
    return {
        name: write_random_checkpoint(root / name, name, seed=9, num_hidden_layers=len(SSM_ONLY["layer_pattern"]))
        for name in CHECKPOINTS
    }


def on_a_rank(layout, cases):
    logging.disable(logging.WARNING)
    outcomes = []
    for path, batch in cases:
        with cpu_runtime():
            model = MegatronUnderTest(path, layout)
            outcomes.append(megatron_outcome(model, batch, gradients=True))
            model.close()
    return outcomes if torch.distributed.get_rank() == 0 else None


def packed_on_a_rank(layout, cases):
    """(loss, gradients) of each case, on rank 0, and what packed rows raise without Transformer Engine."""
    logging.disable(logging.WARNING)
    outcomes, refusal = [], None
    for path, batch in cases:
        with cpu_runtime():
            model = PackedUnderContextParallelism(path, layout)
            try:
                model.loss(batch)
            except ValueError as error:
                refusal = str(error)
            with index_of_transformer_engine():
                outcomes.append(model.gradients(batch))
            model.close()
    return (outcomes, refusal) if torch.distributed.get_rank() == 0 else None


@pytest.mark.parametrize(
    "layout",
    [Variant(cp=2, fields=SSM_ONLY), Variant(tp=2, cp=2, sequence_parallel=True, fields=SSM_ONLY)],
    ids=identify,
)
def test_equals_one_process(layout, paths):
    cases = [(paths[name], random_batch(random_config(name), batch_size=2, seq_length=24, seed=4)) for name in paths]
    expected = run_ranks(on_a_rank, 1, Variant(fields=SSM_ONLY), cases, device="cpu")[0]
    outcomes = run_ranks(on_a_rank, layout.world_size, layout, cases, device="cpu", timeout_seconds=120)[0]
    for name, one, several in zip(paths, expected, outcomes, strict=True):
        assert several.gradients.keys() == one.gradients.keys()
        about = {"params_compared": 1, "mismatched": [], "layout": layout.describe(), "dtype": "fp32", "seconds": 0.0}
        assert not compare(one, several, **about).findings, name


def test_packed_rows_equal_one_process(paths):
    layout = Variant(cp=2, fields=SSM_ONLY)
    tokens = {name: random_batch(random_config(name), batch_size=2, seq_length=24, seed=4).tokens for name in paths}
    cases = [(paths[name], Batch(tokens[name], DOCUMENTS)) for name in paths]
    expected = run_ranks(on_a_rank, 1, Variant(fields=SSM_ONLY), cases, device="cpu")[0]
    outcomes, refusal = run_ranks(packed_on_a_rank, 2, layout, cases, device="cpu", timeout_seconds=120)[0]
    assert "packed rows under context parallelism need Transformer Engine" in refusal
    for name, one, (loss, gradients) in zip(paths, expected, outcomes, strict=True):
        assert abs(loss - one.loss) <= FP32.loss, name
        assert max(compare_tensors(one.gradients, gradients).values()) <= FP32.gradients, name
