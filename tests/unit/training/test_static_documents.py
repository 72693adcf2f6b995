"""Borders that a CUDA graph can hold: those of the present way to pack, in a fixed number and without the host."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_bridge.training import forward_step as steps
from falcon_bridge.training.document_counts import room_for_documents
from falcon_bridge.training.forward_step import forward_step, pack_documents
from falcon_bridge.training.static_documents import StaticDocuments, packed_seq_params
from tests.off import Off
from tests.unit.models.falcon_h1.test_model import build
from tests.unit.training.test_forward_step import OnlyNext


@pytest.fixture(autouse=True)
def no_state_left():
    yield
    steps.static_documents.start()
    destroy_rerun_state_machine()


def batch_with(borders: list[set[int]], length: int, seed: int = 3):
    """A batch as Megatron Core's dataset makes it, of random tokens, with these inner borders in its rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(131, (len(borders), length + 1), generator=generator)
    cu_seqlens = torch.full((len(borders), length + 1), length, dtype=torch.int32)
    positions = torch.arange(length).repeat(len(borders), 1)
    longest = []
    for row, inner in enumerate(borders):
        ends = [0, *sorted(inner), length]
        cu_seqlens[row, : len(ends)] = torch.tensor(ends)
        for start, stop in itertools.pairwise(ends):
            positions[row, start:stop] -= start
        longest.append(max(stop - start for start, stop in itertools.pairwise(ends)))
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": (torch.rand(len(borders), length, generator=generator) < 0.8).float(),
        "position_ids": positions,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": torch.tensor(longest),
    }


class NoWaiting(TorchDispatchMode):
    """Fails at operations that bring a number to the host, or whose output's shape the values decide.

    What ``torch.tensor`` made of the host's own numbers may be read there.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "repeat_interleave", "masked_select", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self._of_the_host = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "lift_fresh":
            self._of_the_host.append(args[0])
        if name == "_local_scalar_dense" and any(
            args[0].untyped_storage().data_ptr() == known.untyped_storage().data_ptr() for known in self._of_the_host
        ):
            return func(*args, **kwargs)
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(mask is not None and mask.dtype == torch.bool for mask in masks) or any(
            name.startswith(waiting) and kwargs.get("output_size") is None for waiting in self.WAITING
        ):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


def static(batch):
    documents = StaticDocuments()
    with NoWaiting():
        packed = documents.pack(batch)
    documents.check()
    return packed


def check_against_the_present_way(borders, length):
    batch = batch_with(borders, length)
    expected, found = pack_documents(dict(batch)), static(batch)
    room = room_for_documents(len(borders), length)
    true = expected["cu_seqlens_q"][0].tolist()
    total = len(borders) * length
    assert found["cu_seqlens_q"].shape == (1, room + 1) and found["cu_seqlens_q"].dtype == torch.int32
    assert found["cu_seqlens_q"][0].tolist() == true + [total] * (room + 1 - len(true))
    assert found["cu_seqlens_kv"] is not None and torch.equal(found["cu_seqlens_kv"], found["cu_seqlens_q"])
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(found[name], expected[name])
    assert found["max_seqlen_q"].device.type == "cpu" and found["max_seqlen_q"].tolist() == [length]
    assert found.keys() == expected.keys()
    # the numbers of documents are Megatron's own
    metadata = {**found, "max_seqlen_q": length, "max_seqlen_kv": length, "total_tokens": total}
    with NoWaiting():
        params = packed_seq_params(metadata)
    present = PackedSeqParams(cu_seqlens_q=expected["cu_seqlens_q"][0], total_tokens=total)
    assert torch.equal(params.seq_idx, present.seq_idx) and params.seq_idx.dtype == present.seq_idx.dtype
    assert (params.max_seqlen_q, params.qkv_format) == (length, "thd")


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 90), st.data())
def test_random_rows(length, data):
    rows = data.draw(st.integers(1, 4))
    most = room_for_documents(rows, length) // rows - 1
    inner = st.sets(st.integers(1, length - 1), max_size=min(most, length - 1))
    check_against_the_present_way([data.draw(inner) for _ in range(rows)], length)


@pytest.mark.parametrize(
    "borders",
    [
        [set()],
        [set(), set()],
        [{1}, {47}],  # documents of one token, first and last
        [{47}, {1}],
        [{1, 2, 3, 46, 47}, set(), {24}],
        [set(range(1, 32))],  # as many documents as there is room for
    ],
)
def test_borders_at_the_edges(borders):
    check_against_the_present_way(borders, 48)


@pytest.mark.parametrize("rows", [[set(range(1, 33))], [set(range(1, 31)), {5, 6}], [set(range(1, 48)), {1}]])
def test_too_many_documents_are_reported_later(rows):
    documents, batch = StaticDocuments(), batch_with(rows, 48)
    with NoWaiting():
        borders = documents.pack(batch)["cu_seqlens_q"][0]
        documents.pack(batch_with([set()], 48))  # the report is not lost
    total, true = 48 * len(rows), pack_documents(dict(batch))["cu_seqlens_q"][0].tolist()
    # whatever fits is right, and no token is left without a document
    assert borders.tolist() == [*true[:32], total]
    excess = len(true) - 1 - 32
    with pytest.raises(ValueError, match=rf"has {excess} documents more than .*cuda_graph_impl=none") as error:
        documents.check()
    assert "\n" not in str(error.value)
    documents.start()
    documents.check()


def run_state(impl, model):
    return SimpleNamespace(
        cfg=SimpleNamespace(
            dataset=SimpleNamespace(inter_document_masking=True, skip_getting_attention_mask_from_dataset=True),
            model=SimpleNamespace(
                virtual_pipeline_model_parallel_size=None, context_parallel_size=1, cuda_graph_impl=impl
            ),
            rerun_state_machine=SimpleNamespace(check_for_nan_in_loss=False, check_for_spiky_loss=False),
        ),
        timers=Off(),
        straggler_timer=Off(),
    )


@pytest.mark.parametrize("kind", [{"layer_pattern": "PM*-"}, {"mamba_num_groups": 1, "num_layers": 2}])
def test_a_step_with_empty_documents_is_the_same_step(kind, one_rank):
    model = build(**kind)
    found = {}
    for impl in ("none", "full_iteration"):
        run = run_state(impl, model)
        model.zero_grad()
        losses, loss_function = forward_step(run, OnlyNext([batch_with([{1, 9, 30}, {47}], 48)]), model)
        loss, _, _ = loss_function(losses)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found[impl] = losses, gradients, int(run._flops_seqlen_sq_sum)
    torch.testing.assert_close(found["full_iteration"][0], found["none"][0], rtol=1e-6, atol=1e-6)
    for name, gradient in found["none"][1].items():
        torch.testing.assert_close(found["full_iteration"][1][name], gradient, rtol=1e-5, atol=1e-6)
    assert found["full_iteration"][2] == found["none"][2] == 1 + 64 + 21**2 + 18**2 + 47**2 + 1


def test_forward_and_backward_wait_for_nothing(one_rank):
    """Of what is ours; the attention here is not the GPU's."""
    model = build(layer_pattern="M-M-", gated_norm=True)
    run = run_state("full_iteration", model)
    run._flops_seqlen_sum = 0
    batch = batch_with([{5, 9}, {30}], 48)
    with NoWaiting(), pytest.MonkeyPatch.context() as patch:
        # on a CPU Bridge brings the sum of squared lengths to the host at once
        patch.setattr(steps.gpt_step, "accumulate_flops_metadata", lambda *args, **kwargs: None)
        losses, loss_function = forward_step(run, OnlyNext([batch]), model)
        loss, _, _ = loss_function(losses)
        loss.backward()
    assert loss.isfinite()
