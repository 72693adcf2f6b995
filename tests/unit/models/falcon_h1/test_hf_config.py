"""transformers' FalconH1Config to a provider and back."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.bridge import AutoBridge
from transformers import FalconH1Config

from falcon_bridge.models.falcon_h1.bridge import FalconH1Bridge
from falcon_bridge.models.falcon_h1.hf_config import hf_config_fields
from falcon_bridge.verification.checkpoints import CONFIGS, random_config


ROPE = {"rope_type": "default", "rope_theta": 1e4}
UNSUPPORTED = {
    "attention_bias": ({"attention_bias": True}, "attention_bias=True"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias=True"),
    "projectors_bias": ({"projectors_bias": True}, "projectors_bias=True"),
    "mamba_proj_bias": ({"mamba_proj_bias": True}, "mamba_proj_bias=True"),
    "mamba_conv_bias": ({"mamba_conv_bias": False}, "mamba_conv_bias=False"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "time_step_limit": ({"time_step_limit": (0.001, 0.1)}, "time_step_limit=(0.001, 0.1)"),
    "rope linear": (
        {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}},
        "rope_parameters.rope_type='linear'",
    ),
    "rope yarn": (
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
        "rope_parameters.rope_type='yarn'",
    ),
    "partial rotary": (
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5",
    ),
    "norm before gate": (
        {"mamba_rms_norm": True, "mamba_norm_before_gate": True},
        "mamba_norm_before_gate=True",
    ),
}


def provider_of(config):
    return AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)


def rebuilt(provider):
    return FalconH1Config(**FalconH1Bridge.megatron_to_hf_config(provider))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_the_model_would_ignore_is_refused(name):
    fields, named = UNSUPPORTED[name]
    with pytest.raises(ValueError) as error:
        provider_of(random_config("plain", **fields))
    message = str(error.value)
    assert message.startswith(f"config.json: {named} is not supported by falcon_bridge, only ")
    assert "\n" not in message


def test_norm_before_gate_is_moot_without_the_norm():
    assert not provider_of(random_config("plain", mamba_norm_before_gate=True)).gated_norm


@pytest.mark.parametrize("absent", [None, (0.0, float("inf"))])
def test_a_time_step_without_limits_is_accepted(absent):
    assert provider_of(random_config("plain", time_step_limit=absent))


def test_a_state_width_that_is_not_its_heads_is_refused():
    config = random_config("plain")
    config.mamba_d_head = 9
    with pytest.raises(ValueError, match=r"^config.json: mamba_d_ssm=64 is not mamba_n_heads·mamba_d_head = 72$"):
        provider_of(config)


def test_fp16_is_refused():
    config = random_config("plain")
    config.dtype = torch.float16
    with pytest.raises(ValueError, match=r"fp16=True is not supported; .* use bf16"):
        provider_of(config).finalize()


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_known_configs_come_back(name, finalized):
    config = random_config(name)
    provider = provider_of(config)
    if finalized:
        provider.finalize()
    # the provider holds what the config leaves to its defaults, or what has no effect, only in its plain form
    config.mamba_d_ssm = config.mamba_n_heads * config.mamba_d_head
    config.mamba_norm_before_gate = False
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert rebuilt(provider).to_dict() == config.to_dict()


def multiplier():
    return st.floats(0.01, 8.0)


@st.composite
def configs(draw):
    groups = draw(st.integers(1, 3))
    heads, d_head = groups * draw(st.integers(1, 4)), draw(st.sampled_from([4, 8, 32]))
    kv_heads = draw(st.integers(1, 3))
    return FalconH1Config(
        architectures=["FalconH1ForCausalLM"],
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        vocab_size=draw(st.integers(3, 400)),
        tie_word_embeddings=draw(st.booleans()),
        hidden_size=8 * draw(st.integers(1, 20)),
        intermediate_size=draw(st.integers(1, 200)),
        num_hidden_layers=draw(st.integers(1, 80)),
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        initializer_range=draw(st.floats(1e-3, 0.1)),
        rms_norm_eps=draw(st.floats(1e-6, 1e-3)),
        pad_token_id=draw(st.none() | st.integers(0, 2)),
        bos_token_id=draw(st.none() | st.integers(0, 2)),
        eos_token_id=draw(st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), min_size=1, max_size=2)),
        max_position_embeddings=draw(st.integers(1, 2**18)),
        attention_dropout=draw(st.sampled_from([0.0, 0.1])),
        mamba_d_ssm=heads * d_head,
        mamba_n_heads=heads,
        mamba_d_head=d_head,
        mamba_n_groups=groups,
        mamba_d_state=draw(st.integers(1, 256)),
        mamba_d_conv=draw(st.integers(2, 4)),
        mamba_chunk_size=draw(st.integers(1, 256)),
        mamba_norm_before_gate=False,
        mamba_rms_norm=draw(st.booleans()),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 1e11, 12345.5]))},
        embedding_multiplier=draw(multiplier()),
        lm_head_multiplier=draw(multiplier()),
        key_multiplier=draw(multiplier()),
        attention_in_multiplier=draw(multiplier()),
        attention_out_multiplier=draw(multiplier()),
        ssm_in_multiplier=draw(multiplier()),
        ssm_out_multiplier=draw(multiplier()),
        mlp_multipliers=draw(st.lists(multiplier(), min_size=2, max_size=2)),
        ssm_multipliers=draw(st.lists(multiplier(), min_size=5, max_size=5)),
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(config=configs())
def test_any_config_comes_back(config):
    provider = FalconH1Bridge().provider_bridge(SimpleNamespace(config=config))
    assert rebuilt(provider).to_dict() == config.to_dict()


def test_every_field_of_the_config_is_written_or_has_no_effect():
    """A transformers release that adds a field must make us think about it."""
    no_effect = {"use_cache", "num_logits_to_keep", "time_step_min", "time_step_max", "time_step_limit"}
    defined = {name for name in FalconH1Config.__annotations__ if name not in ("model_type", "attribute_map")}
    defined -= {"keys_to_ignore_at_inference"}
    written = hf_config_fields(provider_of(random_config("plain"))).keys()
    assert defined - written == no_effect
    assert written - defined == {"head_dim", "dtype"}


@pytest.mark.parametrize("pattern", ["PM", "P*", "P-", "M*"])
def test_a_pattern_that_transformers_does_not_have_is_not_exported(pattern):
    provider = provider_of(random_config("plain"))
    provider.layer_pattern = pattern
    with pytest.raises(ValueError, match=r"^layer_pattern='.*' cannot be exported: .* keep the Megatron checkpoint$"):
        FalconH1Bridge.megatron_to_hf_config(provider)


def test_ratios_that_come_to_a_mixed_pattern_are_not_exported():
    provider = provider_of(random_config("plain"))
    provider.parallel_ratio, provider.mamba_ratio = 0.5, 0.5
    with pytest.raises(ValueError, match=r"^layer_pattern='PM' cannot be exported"):
        FalconH1Bridge.megatron_to_hf_config(provider)


@pytest.mark.parametrize("heads", ["num_attention_heads", "mamba_num_heads"])
def test_a_model_with_one_branch_is_not_exported(heads):
    provider = provider_of(random_config("plain"))
    setattr(provider, heads, 0)
    provider.finalize()
    with pytest.raises(ValueError, match="without attention heads or without SSM heads cannot be exported"):
        FalconH1Bridge.megatron_to_hf_config(provider)
