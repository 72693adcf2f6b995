"""The released sizes: built on the meta device, counted, and named as transformers names them."""

import dataclasses
import re
from collections import Counter

import pytest
import torch
from megatron.bridge import AutoBridge
from transformers import FalconH1Config, FalconH1ForCausalLM

import falcon_bridge
from falcon_bridge.models.falcon_h1.mup import falcon_h1_multipliers


EVERYWHERE = {
    "architectures": ["FalconH1ForCausalLM"],
    "dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "mamba_d_conv": 4,
    "mamba_norm_before_gate": False,
    "bos_token_id": 1,
    "eos_token_id": 11,
    "pad_token_id": 0,
}
COLUMNS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "mamba_n_heads",
    "mamba_d_head",
    "mamba_d_state",
    "mamba_n_groups",
    "mamba_rms_norm",
    "mamba_chunk_size",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)
# the published configs and, last, the published number of parameters
RELEASED = {
    "90M": (512, 24, 8, 2, 64, 768, 24, 32, 64, 1, False, 128, 32768, True, 262144, "91.1M"),
    "500M": (1024, 36, 8, 2, 64, 2048, 24, 64, 128, 1, False, 128, 32784, False, 16384, "521M"),
    "1P5B": (2048, 24, 8, 2, 128, 4608, 48, 64, 256, 1, True, 128, 65537, False, 131072, "1.555B"),
    "1P5BDeep": (1280, 66, 6, 2, 128, 3072, 24, 64, 256, 1, True, 128, 65537, False, 131072, "1.555B"),
    "3B": (2560, 32, 10, 2, 128, 6144, 32, 128, 256, 1, True, 128, 65537, False, 131072, "3.149B"),
    "7B": (3072, 44, 12, 2, 128, 12288, 24, 128, 256, 1, True, 256, 130049, False, 262144, "7.586B"),
    "34B": (5120, 72, 20, 4, 128, 21504, 32, 128, 256, 2, True, 128, 261120, False, 262144, "33.64B"),
}


def released_config(size):
    fields = dict(zip(COLUMNS, RELEASED[size], strict=False))
    d_ssm = fields["mamba_n_heads"] * fields["mamba_d_head"]
    law = falcon_h1_multipliers(
        hidden_size=fields["hidden_size"],
        ffn_hidden_size=fields["intermediate_size"],
        num_attention_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        d_ssm=d_ssm,
        d_state=fields["mamba_d_state"],
    ).as_dict()
    multipliers = {name: list(value) if isinstance(value, tuple) else value for name, value in law.items()}
    return FalconH1Config(**EVERYWHERE, **fields, mamba_d_ssm=d_ssm, **multipliers)


def provider_of(size):
    return getattr(falcon_bridge, f"FalconH1ModelProvider{size}")(
        make_vocab_size_divisible_by=1,
        transformer_impl="local",
        # Megatron's own linears heed the meta device only with it
        use_cpu_initialization=True,
        perform_initialization=False,
        init_model_with_meta_device=True,
    )


def build_on_meta(size):
    provider = provider_of(size)
    provider.finalize()
    (model,) = provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True, init_model_with_meta_device=True
    )
    return model


def transformers_tensors(config):
    """Name and shape of what a checkpoint of this config holds."""
    with torch.device("meta"):
        model = FalconH1ForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def elements(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes)


def rounds_to(count, published):
    digits, scale = float(published[:-1]), {"M": 1e6, "B": 1e9}[published[-1]]
    step = scale * 10.0 ** -len(published[:-1].partition(".")[2])
    return abs(count - digits * scale) <= step / 2


@pytest.mark.parametrize("size", RELEASED)
def test_a_size_is_built_counted_and_named_as_in_transformers(size, one_rank):
    config = released_config(size)
    expected = transformers_tensors(config)
    model = build_on_meta(size)
    allocated = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != "meta")
    assert allocated < 16e6, "only vectors may be real"

    count = sum(p.numel() for p in model.parameters())
    assert count == elements(expected.values())
    assert rounds_to(count, RELEASED[size][-1]), count

    tasks = AutoBridge.from_hf_config(config)._model_bridge.build_conversion_tasks(config, [model])
    assert len(tasks) == len(list(model.parameters()))
    produced = Counter()
    for task in tasks:
        names = task.mapping.hf_param
        names = [names] if isinstance(names, str) else list(names.values())
        produced.update(names)
        assert task.param_weight.numel() == elements(expected[name] for name in names), task.param_name
    assert produced == Counter(expected.keys())


@pytest.mark.parametrize("size", RELEASED)
def test_a_size_is_what_the_released_config_gives(size):
    of_config = AutoBridge.from_hf_config(released_config(size)).to_megatron_provider(load_weights=False)
    ours = getattr(falcon_bridge, f"FalconH1ModelProvider{size}")()
    # what is up to the user, and the padding, which Bridge derives from the vocabulary
    free = {"make_vocab_size_divisible_by", "hf_model_id", "hf_model_revision", "perform_initialization"}
    for field in dataclasses.fields(falcon_bridge.FalconH1ModelProvider):
        if field.name not in free:
            assert getattr(ours, field.name) == getattr(of_config, field.name), field.name


def test_the_law_s_sizes_are_all_there():
    sizes = {re.sub("FalconH1ModelProvider", "", name) for name in falcon_bridge.__all__ if "H1ModelProvider" in name}
    assert sizes - {""} == RELEASED.keys()


def test_a_changed_width_takes_its_own_multipliers():
    provider = falcon_bridge.FalconH1ModelProvider7B(hidden_size=1536, key_multiplier=0.5)
    assert provider.lm_head_multiplier == 40 / 1536
    assert provider.key_multiplier == 0.5
