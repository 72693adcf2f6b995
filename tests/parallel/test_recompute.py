"""Activation recompute: the same loss and gradients from fewer saved bytes, also with dropout."""

import contextlib
import logging
from unittest import mock

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.models.falcon_h1 import validation
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.megatron import MegatronUnderTest
from falcon_bridge.verification.parity import compare_tensors
from tests.parallel.variant import Variant, identify


def full(method, layers):
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def selective(*modules):
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


KINDS = {
    "uniform": full("uniform", 1),
    "uniform, 2 layers": full("uniform", 2),
    "block": full("block", 2),
    "core_attn": selective("core_attn"),
    "mlp": selective("mlp"),
    "layernorm": selective("layernorm"),
    "mixer": {"recompute_mixer": True},
    "gates": {"recompute_gates": True},
    "mixer, gates": {"recompute_mixer": True, "recompute_gates": True},
    "mixer, mlp, layernorm": {**selective("mlp", "layernorm"), "recompute_mixer": True},
}


@contextlib.contextmanager
def layernorm_recompute_without_transformer_engine():
    """Megatron's own, but for its compiled exchange of two tensors' storage and its fp8 branch, which needs TE."""

    def exchange(output, recomputed):
        output.untyped_storage().resize_(recomputed.untyped_storage().nbytes())
        output.untyped_storage().copy_(recomputed.untyped_storage())

    def without_fp8(self, fp8=False):
        original(self)
        self.fp8 = False

    original = tensor_parallel.CheckpointWithoutOutput.__init__
    with (
        mock.patch.object(validation, "HAVE_TE", True),
        mock.patch.object(random, "_get_share_storage", lambda: exchange),
        mock.patch.object(tensor_parallel.CheckpointWithoutOutput, "__init__", without_fp8),
    ):
        yield


def saved_bytes(model, batch) -> int:
    """Of the distinct tensors, parameters left out, that a forward pass keeps for the backward pass."""
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage())
        return tensor

    parameters = {p.untyped_storage().data_ptr() for chunk in model.chunks for p in chunk.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.chunks[0](**model._microbatch(batch, 0, 1))
    distinct = {storage.data_ptr(): storage.nbytes() for storage in saved if storage.nbytes()}
    assert output.requires_grad
    return sum(nbytes for pointer, nbytes in distinct.items() if pointer not in parameters)


def on_a_rank(layout, path, batch):
    """(Saved bytes, loss, gradients) without recompute and with each kind of it, on rank 0."""
    logging.disable(logging.WARNING)
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    results = {}
    for name, fields in {"no recompute": {}, **KINDS}.items():
        variant = Variant(layout.tp, sequence_parallel=layout.sequence_parallel, fields={**dropout, **fields})
        with_layernorm = contextlib.nullcontext if random.HAVE_TE else layernorm_recompute_without_transformer_engine
        with cpu_runtime(), with_layernorm():
            model = MegatronUnderTest(path, variant)
            loss, gradients = model.gradients(batch)
            results[name] = saved_bytes(model, batch), loss, gradients
            model.close()
    return results if torch.distributed.get_rank() == 0 else None


@pytest.mark.parametrize(
    ("layout", "packed"),
    [(Variant(), False), (Variant(tp=2, sequence_parallel=True), True)],
    ids=lambda value: identify(value) if isinstance(value, Variant) else "packed" if value else "rows",
)
def test_recompute_saves_bytes_and_changes_nothing(layout, packed, tmp_path):
    name = "groups2_gated_norm"
    path = write_random_checkpoint(tmp_path / "hf", name, seed=3, num_hidden_layers=4)
    batch = random_batch(random_config(name), batch_size=2, seq_length=28, seed=1, packed=packed)
    results = run_ranks(on_a_rank, layout.world_size, layout, path, batch, device="cpu", timeout_seconds=120)[0]
    saved, loss, gradients = results.pop("no recompute")
    for kind, (fewer, same_loss, same_gradients) in results.items():
        assert same_loss == loss, kind
        # the recomputed norm adds its two terms before the residual's is added, not after
        limit = 2e-6 if "layernorm" in kind else 0.0
        assert max(compare_tensors(gradients, same_gradients).values()) <= limit, kind
        assert fewer < saved, kind
        print(kind, fewer / saved)
    bytes_of = {kind: result[0] for kind, result in results.items()}
    assert bytes_of["uniform"] < bytes_of["mixer, mlp, layernorm"] < bytes_of["mixer"] < bytes_of["core_attn"]
    assert bytes_of["mixer, gates"] < bytes_of["mixer"]


def first_in_proj_alone(path, batch):
    """Gradients of the first layer's `in_proj`, everything else frozen, with and without `recompute_mixer`."""
    logging.disable(logging.WARNING)
    gradients = []
    for recompute in (False, True):
        with cpu_runtime():
            model = MegatronUnderTest(path, Variant(fields={"recompute_mixer": recompute}))
            for name, parameter in model.chunks[0].named_parameters():
                parameter.requires_grad_("layers.0.self_attention.mamba_mixer.in_proj" in name)
            model.loss(batch, backward=True)
            (trained,) = (p for p in model.chunks[0].parameters() if p.requires_grad)
            gradients.append(trained.main_grad.clone())
            model.close()
    return gradients


def test_what_is_trained_below_the_first_gradient_still_gets_one(tmp_path):
    """As adapters in the first layer of a frozen model: a checkpoint whose input needs no gradient returns none."""
    path = write_random_checkpoint(tmp_path / "hf", "plain", seed=3)
    batch = random_batch(random_config("plain"), batch_size=1, seq_length=28, seed=1)
    expected, got = run_ranks(first_in_proj_alone, 1, path, batch, device="cpu")[0]
    assert expected.count_nonzero() > 0
    assert compare_tensors({"in_proj": expected}, {"in_proj": got})["in_proj"] <= 1e-6
