"""Stock transformers, from the files, against our oracle: the same model by an implementation that is not ours.

transformers' BitNet layers round half to even where training rounds half up, so tokens are taken on which no
activation comes near the middle between two codes (`oracle.tokens_off_ties`); then both choose the same codes, and
what is left is the rounding of fp32.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from falcon_bridge.conversion.bitnet_config import LATENT_ENTRY
from falcon_bridge.verification.edge_checkpoints import write_random_edge_checkpoint
from falcon_bridge.verification.parity import compare_tensors
from falcon_bridge.verification.reference_bitnet import load_bitnet_llama
from tests.unit.models.falcon_edge.oracle import BitNetLlama, tokens_off_ties


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Compiling transformers' decorated functions takes longer than all tests here, and changes no result."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module", params=["plain", "tied"])
def case(request, tmp_path_factory):
    """A checkpoint of latent weights with the config that has transformers quantise them, tokens, and the oracle."""
    path = write_random_edge_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=6, tokenizer=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": LATENT_ENTRY}))
    tokens = tokens_off_ties(path, rows=1, length=8)
    oracle = BitNetLlama.load(path, torch.float32)
    oracle.loss(tokens).backward()
    return request.param, path, tokens, oracle


def check(model, tokens, oracle, gradients=True):
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    expected = oracle.logits(tokens).detach()
    assert (output.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert abs(output.loss.item() - oracle.loss(tokens).item()) <= 1e-5
    if gradients:
        output.loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        differences = compare_tensors({name: W.grad for name, W in oracle.weights.items()}, found)
        assert max(differences.values()) <= 1e-4, differences


def test_online_quantisation_of_latent_weights(case):
    _, path, tokens, oracle = case
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert type(model.model.layers[1].mlp.up_proj).__name__ == "AutoBitLinear"
    check(model, tokens, oracle)


def test_a_packed_checkpoint(case, tmp_path):
    name, _, tokens, oracle = case
    path = write_random_edge_checkpoint(tmp_path, name, "bitnet", seed=6, tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert type(model.model.layers[1].mlp.up_proj).__name__ == "BitLinear"
    with torch.no_grad():
        check(model, tokens, oracle, gradients=False)


def test_the_reference_of_verify(case):
    _, path, tokens, oracle = case
    check(load_bitnet_llama(path, torch.float32), tokens, oracle)


def test_without_the_mark_transformers_computes_another_model(case, tmp_path):
    """What the comparisons above would miss if they could not tell quantised from dense."""
    name, _, tokens, oracle = case
    path = write_random_edge_checkpoint(tmp_path, name, seed=6, tokenizer=False)
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=tokens).logits
        expected = oracle.logits(tokens)
    assert (dense - expected).abs().max() > 0.1 * expected.abs().max()
