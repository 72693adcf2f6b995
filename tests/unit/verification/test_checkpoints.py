import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from falcon_bridge.verification.checkpoints import CONFIGS, random_config, word_tokenizer, write_random_checkpoint


MULTIPLIERS = (
    "attention_in_multiplier",
    "attention_out_multiplier",
    "embedding_multiplier",
    "key_multiplier",
    "lm_head_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)


def test_the_configs_cover_every_axis():
    configs = {name: random_config(name) for name in CONFIGS}
    assert len(configs) >= 12

    def values(field):
        return {getattr(config, field, None) for config in configs.values()}

    assert {1, 2, 4} <= values("mamba_n_groups")
    assert values("mamba_rms_norm") == values("tie_word_embeddings") == {True, False}
    assert {2, 3, 4} <= values("mamba_d_conv")
    assert any(config.mamba_rms_norm and config.rms_norm_eps > 1e-4 for config in configs.values())
    assert {1, 2, 4} <= {c.num_attention_heads // c.num_key_value_heads for c in configs.values()}
    assert {1e4, 1e11} <= {c.rope_parameters["rope_theta"] for c in configs.values()}
    assert all(c.vocab_size % 2 for c in configs.values())
    assert any(c.mamba_d_ssm not in (None, 2 * c.hidden_size) for c in configs.values())
    assert any(c.mamba_d_ssm is None for c in configs.values())
    assert None in values("head_dim")
    assert any(getattr(c, "head_dim", 0) * c.num_attention_heads != c.hidden_size for c in configs.values())


def test_multipliers_tell_their_places_apart():
    config = random_config("plain")
    multipliers = [getattr(config, name) for name in MULTIPLIERS] + config.mlp_multipliers + config.ssm_multipliers
    assert 1.0 not in multipliers
    assert len({round(m, 6) for m in multipliers}) == len(multipliers)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, "groups2_gated_norm", seed=1)
    return load_file(path / "model.safetensors")


def test_no_vector_is_constant_and_no_two_tensors_alike(tensors):
    for name, tensor in tensors.items():
        assert tensor.std() > 0.01, name
    stds = {name: tensor.std().item() for name, tensor in tensors.items() if "layers.0" in name and tensor.dim() == 2}
    assert len({round(std, 3) for std in stds.values()}) == len(stds)


def test_the_five_parts_of_in_proj_have_scales_of_their_own(tensors):
    parts = tensors["model.layers.0.mamba.in_proj.weight"].split([64, 64, 32, 32, 8])
    stds = sorted(part.std().item() for part in parts)
    assert all(larger / smaller > 1.05 for smaller, larger in pairwise(stds))


def test_decay_and_step_are_those_of_a_working_ssm(tensors):
    rate = tensors["model.layers.0.mamba.A_log"].exp()
    assert rate.min() >= 0.5
    assert rate.max() <= 12
    step = torch.nn.functional.softplus(tensors["model.layers.0.mamba.dt_bias"])
    assert 0.005 < step.min() < step.max() < 5


def test_the_seed_alone_decides(tmp_path):
    write_random_checkpoint(tmp_path / "a", "plain", seed=1)
    write_random_checkpoint(tmp_path / "b", "plain", seed=1)
    write_random_checkpoint(tmp_path / "c", "plain", seed=2)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_overrides_reach_config_and_weights(tmp_path):
    write_random_checkpoint(tmp_path, "tied", seed=1, dtype=torch.bfloat16, num_hidden_layers=5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["architectures"] == ["FalconH1ForCausalLM"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_tokenizer_has_one_word_a_token():
    config = random_config("groups2")
    tokenizer = word_tokenizer(config)
    assert len(tokenizer) == config.vocab_size
    assert tokenizer("w17 w256 nonsense").input_ids == [17, 256, 2]
    assert tokenizer.eos_token_id == config.eos_token_id
