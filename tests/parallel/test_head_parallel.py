"""Context parallelism by heads against one process: both branches, rows and documents that end anywhere."""

import logging
from types import SimpleNamespace

import pytest
import torch

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.models.falcon_h1.head_parallel import HeadParallelAttention, HeadShare, RowsCutWhole
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import Batch, random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.megatron import MegatronUnderTest, megatron_outcome
from falcon_bridge.verification.parity import FP32, compare, compare_tensors
from tests.parallel.variant import Variant, identify


# one key-value head, which two ranks share, and two; one group of the SSM and two; heads that do not divide evenly
CHECKPOINTS = ("mqa_gated_norm", "groups2_gated_norm", "conv3_three_heads")
DOCUMENTS = (5, 1, 11, 7)  # none a multiple of 2·cp; the rows' parts are 6 tokens
FIELDS = {"cp_comm_type": "a2a"}


class DocumentsOfRowsCutWhole(MegatronUnderTest):
    def _cut(self, rows, packed):
        cut, packed = super()._cut(rows, packed)
        borders = {"cu_seqlens_q": packed.cu_seqlens_q, "cu_seqlens_kv": packed.cu_seqlens_kv}
        longest = {"max_seqlen_q": packed.max_seqlen_q, "max_seqlen_kv": packed.max_seqlen_kv}
        return cut, RowsCutWhole(qkv_format="thd", **borders, **longest)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("head_parallel")
    return {name: write_random_checkpoint(root / name, name, seed=9, num_hidden_layers=2) for name in CHECKPOINTS}


def on_a_rank(layout, cases):
    logging.disable(logging.WARNING)
    outcomes = []
    for path, batch in cases:
        with cpu_runtime():
            cut = batch.lengths and layout.cp > 1
            model = (DocumentsOfRowsCutWhole if cut else MegatronUnderTest)(path, layout)
            outcomes.append(
                model.gradients(batch) if batch.lengths else megatron_outcome(model, batch, gradients=True)
            )
            model.close()
    return outcomes if torch.distributed.get_rank() == 0 else None


@pytest.mark.parametrize(
    "layout",
    [Variant(cp=2, fields=FIELDS), Variant(tp=2, cp=2, sequence_parallel=True, fields=FIELDS)],
    ids=identify,
)
def test_equals_one_process(layout, paths):
    fitting = {name: path for name, path in paths.items() if random_config(name).num_attention_heads % layout.tp == 0}
    rows = [random_batch(random_config(name), batch_size=2, seq_length=24, seed=4) for name in fitting]
    cases = [*zip(fitting.values(), rows, strict=True)]
    cases += [(path, Batch(batch.tokens, DOCUMENTS)) for path, batch in cases]
    expected = run_ranks(on_a_rank, 1, Variant(), cases, device="cpu")[0]
    found = run_ranks(on_a_rank, layout.world_size, layout, cases, device="cpu", timeout_seconds=120)[0]
    about = {"params_compared": 1, "mismatched": [], "layout": layout.describe(), "dtype": "fp32", "seconds": 0.0}
    for one, several in zip(expected[: len(rows)], found[: len(rows)], strict=True):
        assert not compare(one, several, **about).findings
    for (expected_loss, one), (loss, several) in zip(expected[len(rows) :], found[len(rows) :], strict=True):
        assert abs(loss - expected_loss) <= FP32.loss
        assert max(compare_tensors(one, several).values()) <= FP32.gradients


class WithExtraState(torch.nn.Module):
    """As Transformer Engine's attention, it has a state that checkpoints leave out."""

    def __init__(self, **kwargs):
        super().__init__()

    def get_extra_state(self):
        return torch.empty(0)


def test_the_state_that_checkpoints_leave_out_keeps_its_name():
    config = SimpleNamespace(tensor_model_parallel_size=1, num_attention_heads=4, num_query_groups=2)
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 2))
    attention = HeadParallelAttention(WithExtraState, config=config, pg_collection=groups)
    # by which DotProductAttention's hook finds it among what is missing
    (key,) = attention.state_dict(prefix="self_attention.attention.core_attention.")
    assert "core_attention._extra_state" in key


@pytest.mark.parametrize(
    ("heads", "groups", "cp", "share"),
    [
        (8, 2, 2, (4, 1, 1)),
        (8, 2, 4, (2, 1, 2)),
        (8, 2, 8, (1, 1, 4)),
        (12, 2, 4, (3, 1, 2)),
        (12, 4, 2, (6, 2, 1)),
        (6, 3, 2, (3, 3, 2)),
        (6, 2, 4, (2, 2, 3)),
        (12, 2, 8, (2, 2, 6)),
        (3, 1, 2, (2, 2, 3)),
        (3, 3, 2, (2, 2, 1)),
    ],
)
def test_every_rank_gets_the_key_value_heads_of_its_queries(heads, groups, cp, share):
    share = HeadShare(*share)
    assert HeadShare.of(heads, groups, cp) == share
    queries = [head * groups // heads for head in range(heads)] + [None] * (cp * share.heads - heads)
    copied = [group for group in range(groups) for _ in range(share.copies)]
    copied += [None] * (cp * share.groups - len(copied))
    for rank in range(cp):
        own = copied[rank * share.groups : (rank + 1) * share.groups]
        wanted = queries[rank * share.heads : (rank + 1) * share.heads]
        assert [own[query * share.groups // share.heads] for query in range(share.heads)] == wanted
