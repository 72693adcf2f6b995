"""Megatron against stock transformers, one process: logits, loss, every gradient, and the way back to Hugging Face."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import CONFIGS, random_config, write_random_checkpoint
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.megatron import MegatronUnderTest, megatron_outcome
from falcon_bridge.verification.parity import compare
from falcon_bridge.verification.reference import TrainSteps, transformers_outcome
from falcon_bridge.verification.roundtrip import mismatched_tensors


ONE = ParallelLayout()


@pytest.fixture(autouse=True, scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def cpu():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def verify(path, batch, *, train=None, save_to=None):
    reference = transformers_outcome(path, batch, gradients=True, train=train)
    with cpu_runtime():
        model = MegatronUnderTest(path, ONE)
        compared, mismatched = mismatched_tensors(path, model.export())
        if save_to:
            model.bridge.save_hf_pretrained(model.chunks, save_to, show_progress=False)
        outcome = megatron_outcome(model, batch, gradients=True, train=train)
        model.close()
    return compare(
        reference,
        outcome,
        params_compared=compared,
        mismatched=mismatched,
        layout=ONE.describe(),
        dtype="fp32",
        seconds=0.0,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_and_comes_back_exactly(name, tmp_path, cpu):
    source, back = tmp_path / "source", tmp_path / "back"
    write_random_checkpoint(source, name, seed=7)
    batch = random_batch(random_config(name), batch_size=2, seq_length=37, seed=3)
    result = verify(source, batch, save_to=back)
    assert result.ok, result.findings
    assert result.params_compared == len(load_file(source / "model.safetensors"))
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert_same_tensors(source, back)


@pytest.mark.parametrize("name", ["plain", "tied_groups2_gated_norm"])
def test_packed_documents_are_what_each_is_alone(name, tmp_path, cpu):
    write_random_checkpoint(tmp_path, name, seed=8)
    batch = random_batch(random_config(name), batch_size=2, seq_length=51, seed=4, packed=True)
    assert 1 in batch.documents
    assert any(length > 16 for length in batch.documents)
    result = verify(tmp_path, batch)
    assert result.ok, result.findings


@pytest.mark.parametrize("name", ["groups2_gated_norm", "tied"])
def test_five_optimizer_steps_later(name, tmp_path, cpu):
    write_random_checkpoint(tmp_path, name, seed=9)
    batch = random_batch(random_config(name), batch_size=2, seq_length=24, seed=5)
    result = verify(tmp_path, batch, train=TrainSteps(steps=5))
    assert result.ok, result.findings
    assert result.max_rel_weight_diff is not None


def test_bf16_checkpoint_comes_back_exactly(tmp_path, cpu):
    """Loaded in fp32, as for a verification, and in bf16, as for training."""
    write_random_checkpoint(tmp_path, "gated_norm", seed=10, dtype=torch.bfloat16)
    for dtype in ("fp32", "bf16"):
        with cpu_runtime():
            model = MegatronUnderTest(tmp_path, ONE, dtype)
            compared, mismatched = mismatched_tensors(tmp_path, model.export())
            model.close()
        assert compared == len(load_file(tmp_path / "model.safetensors"))
        assert not mismatched


@pytest.mark.parametrize(
    "tensor",
    ["self_attn.k_proj.weight", "mamba.dt_bias", "mamba.norm.weight", "mamba.conv1d.bias", "mamba.in_proj.weight"],
)
def test_a_change_of_one_row_is_found(tensor, tmp_path, cpu):
    """What the other tests rely on: the smallest mistake in any tensor shows."""
    source, changed = tmp_path / "source", tmp_path / "changed"
    write_random_checkpoint(source, "groups2_gated_norm", seed=11)
    write_random_checkpoint(changed, "groups2_gated_norm", seed=11)
    tensors = load_file(changed / "model.safetensors")
    name = f"model.layers.1.{tensor}"
    tensors[name] = tensors[name].clone()
    tensors[name][-1] *= 1.1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    batch = random_batch(random_config("groups2_gated_norm"), batch_size=1, seq_length=21, seed=6)
    reference = transformers_outcome(source, batch, gradients=True)
    with cpu_runtime():
        model = MegatronUnderTest(changed, ONE)
        compared, mismatched = mismatched_tensors(source, model.export())
        outcome = megatron_outcome(model, batch, gradients=True)
        model.close()
    result = compare(
        reference,
        outcome,
        params_compared=compared,
        mismatched=mismatched,
        layout=ONE.describe(),
        dtype="fp32",
        seconds=0.0,
    )
    assert not result.ok
    assert mismatched == [name]
    assert any("Δlogit" in finding for finding in result.findings)
    assert any(f"gradient difference of {name}" in finding for finding in result.findings)


def assert_same_tensors(source, back):
    expected, got = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
