"""Documents of a packed pretraining row: each as if it were alone."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.core.rerun_state_machine import destroy_rerun_state_machine

from falcon_bridge.training.forward_step import forward_step, pack_documents
from tests.off import Off
from tests.unit.models.falcon_h1.test_model import build


ROW = 48
LENGTHS = [1, 2, 5, 1, 17, 3, 40, 9, 30, 2, 70, 8, 11, 4, 50, 25, 6, 13]
KINDS = {
    "one group": {"mamba_num_groups": 1, "num_layers": 3},
    "two groups, gated norm": {"gated_norm": True, "num_layers": 2},
    "all kinds": {"layer_pattern": "PM*-"},
}


def rows(directory, apart):
    """Rows of Megatron Core's own dataset over documents of random tokens."""
    generator = np.random.default_rng(5)
    builder = IndexedDatasetBuilder(f"{directory}/a.bin", dtype=np.uint16)
    for length in LENGTHS:
        builder.add_document(generator.integers(131, size=length), [length])
    builder.finalize(f"{directory}/a.idx")
    config = GPTDatasetConfig(
        random_seed=3,
        sequence_length=ROW,
        split="1",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=apart,
        path_to_cache=str(directory),
        tokenizer=SimpleNamespace(eod=0, vocab_size=131, unique_identifiers={}),
        mid_level_dataset_surplus=0.0,
    )
    low = GPTDataset.build_low_level_dataset(f"{directory}/a", config)
    return GPTDataset(low, f"{directory}/a", np.arange(len(LENGTHS)), 4, Split.train, config)


@pytest.fixture(autouse=True)
def no_state_left():
    """The loss function makes the process's rerun state machine, which forked ranks of later tests would inherit."""
    yield
    destroy_rerun_state_machine()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return rows(tmp_path_factory.mktemp("rows"), True)


def batch_of(dataset, *numbers):
    return torch.utils.data.default_collate([dataset[number] for number in numbers])


def alone(model, batch, start, stop, labels=True):
    """The loss of each token, or the logits, of one document of a packed row by itself."""
    tokens, targets = batch["tokens"][:, start:stop], batch["labels"][:, start:stop]
    return model(tokens, torch.arange(stop - start)[None], None, labels=targets if labels else None)


def test_rows_become_one(dataset):
    numbers = (0, 1, 2)
    batch, packed = batch_of(dataset, *numbers), pack_documents(batch_of(dataset, *numbers))
    borders = packed["cu_seqlens_q"][0].tolist()
    for name in ("tokens", "labels", "loss_mask"):
        assert packed[name].shape == (1, 3 * ROW)
        assert (packed[name].view(3, ROW) == batch[name]).all()
    # rows end where documents end, besides those within
    assert {0, ROW, 2 * ROW, 3 * ROW} < set(borders) and borders == sorted(set(borders))
    assert packed["max_seqlen_q"].tolist() == [max(np.diff(borders))]
    positions = packed["position_ids"][0].tolist()
    assert [position for position, value in enumerate(positions) if value == 0] == borders[:-1]
    assert "cu_seqlens" not in packed and "max_seqlen" not in packed
    assert "cu_seqlens" in batch  # the dataset's own is as it was


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_each_document_alone(kind, dataset, one_rank):
    model = build(**KINDS[kind])
    packed = pack_documents(batch_of(dataset, 0, 1))
    params = get_packed_seq_params({**packed, "total_tokens": 2 * ROW})
    with torch.no_grad():
        logits = model(packed["tokens"], packed["position_ids"], None, packed_seq_params=params)
        borders = packed["cu_seqlens_q"][0].tolist()
        assert len(borders) > 6
        for start, stop in itertools.pairwise(borders):
            expected = alone(model, packed, start, stop, labels=False)
            torch.testing.assert_close(logits[:, start:stop], expected, rtol=2e-5, atol=2e-5)


class OnlyNext:
    """As Megatron's `RerunDataIterator`: no `iter`."""

    def __init__(self, batches):
        self._batches = iter(batches)

    def __next__(self):
        return next(self._batches)


def state(apart):
    return SimpleNamespace(
        cfg=SimpleNamespace(
            dataset=SimpleNamespace(inter_document_masking=apart, skip_getting_attention_mask_from_dataset=True),
            model=SimpleNamespace(virtual_pipeline_model_parallel_size=None, context_parallel_size=1),
            rerun_state_machine=SimpleNamespace(check_for_nan_in_loss=False, check_for_spiky_loss=False),
        ),
        timers=Off(),
        straggler_timer=Off(),
    )


def test_the_step_of_a_run_trains_on_each_document_alone(dataset, tmp_path, one_rank):
    """Losses and gradients through `forward_step`, from the dataset's batches as they come."""
    model = build(num_layers=2)
    batches = [batch_of(dataset, 0, 1), batch_of(dataset, 2, 3)]
    iterator = OnlyNext(batches)
    for batch in batches:
        run = state(True)
        model.zero_grad()
        losses, loss_function = forward_step(run, iterator, model)
        loss, tokens, _ = loss_function(losses)
        loss.backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        packed = pack_documents(batch)
        borders = packed["cu_seqlens_q"][0].tolist()
        model.zero_grad()
        parts = [alone(model, packed, *ends) for ends in itertools.pairwise(borders)]
        torch.cat(parts, dim=1).sum().backward()
        torch.testing.assert_close(losses, torch.cat(parts, dim=1), rtol=2e-5, atol=2e-5)
        assert tokens == 2 * ROW
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=2e-4, atol=2e-4)
        # the FLOPs of attention are those of the documents
        assert run._flops_seqlen_sq_sum == sum(int(length) ** 2 for length in np.diff(borders))
    with pytest.raises(StopIteration):
        forward_step(state(True), iterator, model)

    streams = rows(tmp_path, False)
    losses, _ = forward_step(state(False), OnlyNext([batch_of(streams, 0, 1)]), model)
    assert losses.shape == (2, ROW)
    together, _ = forward_step(state(True), OnlyNext([batch_of(dataset, 0, 1)]), model)
    assert (batch_of(streams, 0, 1)["tokens"] == batch_of(dataset, 0, 1)["tokens"]).all()
    # without borders the documents of a row see each other
    assert (losses.flatten() - together.flatten()).abs().max() > 0.1
