"""What a provider refuses, computes and survives: validation, finalize(), run_config.yaml."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import yaml
from megatron.bridge.training.model_load_save import load_model_config
from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
from megatron.bridge.training.utils.flop_utils import num_floating_point_operations
from megatron.bridge.utils.yaml_utils import safe_yaml_representers

from falcon_bridge import FalconH1ModelProvider7B, FalconH1ModelProvider90M
from falcon_bridge.models.falcon_h1.layer_specs import falcon_h1_block_spec
from falcon_bridge.training.flops import falcon_h1_flops
from tests.unit.models.falcon_h1.tiny import tiny


def assert_refused(message, **fields):
    """finalize() raises one line that matches."""
    with pytest.raises(ValueError, match=message) as error:
        tiny(**fields).finalize()
    assert "\n" not in str(error.value)


def fields_of(provider):
    return {f.name: getattr(provider, f.name) for f in dataclasses.fields(provider)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_moe_experts", 4),
        ("multi_latent_attention", True),
        ("mtp_num_layers", 1),
        ("use_mup", True),
        ("add_bias_linear", True),
        ("add_qkv_bias", True),
        ("qk_layernorm", True),
        ("rope_scaling", True),
        ("activation_func_fp8_input_store", True),
        ("use_te_activation_func", True),
        ("fp16", True),
    ],
)
def test_what_the_model_cannot_be_is_named(field, value):
    assert_refused(rf"^{field}={value} is not supported; .*(unset|set it to False|use bf16)", **{field: value})


@pytest.mark.parametrize("kind", ["learned_absolute", "yarn", "none"])
def test_other_position_embeddings_are_refused(kind):
    assert_refused(
        f"position_embedding_type='{kind}' is not supported by Falcon-H1; use 'rope'", position_embedding_type=kind
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("glu_linear_offset", 1.0), ("rotary_interleaved", True), ("layernorm_zero_centered_gamma", True)],
)
def test_what_a_hugging_face_config_cannot_say_is_refused(field, value):
    assert_refused(f"^{field}={value} is not supported by Falcon-H1; use ", **{field: value})


@pytest.mark.parametrize(("field", "length"), [("mlp_multipliers", 2), ("ssm_multipliers", 5)])
def test_multipliers_of_the_wrong_number_are_refused(field, length):
    assert_refused(rf"^{field} must hold {length} numbers, got \(1.0, 1.0, 1.0\)$", **{field: [1.0, 1.0, 1.0]})


def test_the_implementation_is_named(one_rank):
    provider = tiny(transformer_impl="apex")
    provider.finalize()
    with pytest.raises(ValueError, match="transformer_impl='apex' is not supported: use 'transformer_engine' or 'lo"):
        provider.provide_distributed_model(wrap_with_ddp=False)


def test_a_model_without_vocabulary_is_refused(one_rank):
    provider = tiny(vocab_size=None)
    provider.finalize()
    with pytest.raises(ValueError, match="vocab_size is not set: give the model the vocabulary size"):
        provider.provide_distributed_model(wrap_with_ddp=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_pattern": "PPxP"}, "layer_pattern has 'x' at layer 3; the symbols are"),
        ({"layer_pattern": "PPP"}, "layer_pattern has 3 symbols but the model has 4 layers"),
        ({"layer_pattern": "PPPP", "mlp_ratio": 1.0}, "either layer_pattern or the .* not both"),
        ({"mamba_ratio": 0.7}, "must add up to 1, got P=0, M=0.7"),
    ],
)
def test_patterns_are_checked(fields, message):
    assert_refused(message, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0, "mamba_num_heads": 0}, "both 0: a parallel block needs one of them"),
        (
            {"num_attention_heads": 0, "layer_pattern": "PP*P"},
            r"layer_pattern has '\*' layers but num_attention_heads is 0",
        ),
        ({"mamba_num_heads": 0, "layer_pattern": "PPMP"}, "layer_pattern has 'M' layers but mamba_num_heads is 0"),
        ({"num_attention_heads": -1}, "must not be negative"),
        ({"mamba_num_heads": -8}, "must not be negative"),
        ({"num_query_groups": 3}, "num_attention_heads=4 must be a multiple of num_query_groups=3"),
        ({"mamba_num_groups": 3}, "mamba_num_heads=8 must be a multiple of mamba_num_groups=3"),
    ],
)
def test_heads_are_checked(fields, message):
    assert_refused(message, **fields)


def test_heads_that_no_layer_uses_may_be_absent():
    tiny(num_attention_heads=0, layer_pattern="M-M-").finalize()
    tiny(mamba_num_heads=0, layer_pattern="*-*-").finalize()
    tiny(num_attention_heads=0, mamba_num_heads=0, layer_pattern="----").finalize()


@pytest.mark.parametrize(
    ("fields", "tp", "message"),
    [
        ({}, 3, r"=3 must divide num_attention_heads=4: use one of \[1, 2, 4\]$"),
        ({}, 8, r"=8 must divide num_attention_heads=4: use one of \[1, 2, 4\]$"),
        ({"mamba_num_heads": 6}, 4, r"=4 must divide mamba_num_heads=6: use one of \[1, 2\]$"),
        ({"ffn_hidden_size": 81}, 2, r"=2 must divide ffn_hidden_size=81: use one of \[1\]$"),
        ({"num_attention_heads": 0, "mamba_num_heads": 12, "ffn_hidden_size": 96}, 5, r"use one of \[1, 2, 3, 4, 6, "),
        ({"mamba_num_groups": 3, "mamba_num_heads": 12}, 2, "=2 must divide mamba_num_groups=3, or be a multiple"),
        (
            {"num_attention_heads": 6, "mamba_num_heads": 12, "ffn_hidden_size": 81, "mamba_state_dim": 15},
            3,
            "num_query_groups",
        ),
        ({"mamba_state_dim": 6}, 4, r"multiple of it that divides groups·state = 6$"),
    ],
)
def test_a_tensor_parallel_size_that_does_not_fit_is_refused_with_those_that_do(fields, tp, message):
    assert_refused(message, tensor_model_parallel_size=tp, **fields)


@pytest.mark.parametrize(("groups", "tp"), [(1, 2), (1, 4), (2, 4), (4, 2), (2, 2)])
def test_more_ranks_than_groups_are_allowed(groups, tp):
    tiny(mamba_num_groups=groups, tensor_model_parallel_size=tp).finalize()


@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ({"num_layers": 5, "pipeline_model_parallel_size": 2}, 2),
        ({"num_layers": 6, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 4),
    ],
)
def test_layers_that_do_not_split_evenly_are_refused(fields, stages):
    assert_refused(
        rf"does not split evenly over {stages} pipeline stages: set num_layers_in_first_pipeline_stage / num_layers_in"
        r"_last_pipeline_stage or pipeline_model_parallel_layout$",
        **fields,
    )


def test_uneven_pipelines_are_accepted_when_their_stages_are_given():
    tiny(num_layers=5, pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=2).finalize()
    tiny(num_layers=5, pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=1).finalize()
    tiny(num_layers=5, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et*3|t*2L").finalize()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layer_pattern": "PM*-", "bf16": True, "params_dtype": torch.bfloat16},
        {"num_attention_heads": 0},
        {"mamba_num_heads": 0},
        {"parallel_ratio": 0.5, "mlp_ratio": 0.5, "mlp_multipliers": [0.3, 0.7]},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"num_layers": 5, "pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et*3|t*2L"},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ],
)
def test_finalizing_again_changes_nothing(fields):
    provider = tiny(**fields)
    provider.finalize()
    once = comparable(fields_of(provider))
    provider.finalize()
    assert comparable(fields_of(provider)) == once


def comparable(fields):
    """Partials and layouts made anew compare by what they hold."""
    fields = dict(fields)
    for name, value in fields.items():
        if hasattr(value, "func") and hasattr(value, "keywords"):
            fields[name] = (value.func, value.args, value.keywords)
        elif callable(value) and getattr(value, "__closure__", None):
            fields[name] = (value.__qualname__, [cell.cell_contents for cell in value.__closure__])
        elif hasattr(value, "input_data"):
            fields[name] = value.input_data
    return fields


def test_finalizing_after_a_change_follows_it():
    provider = tiny(key_multiplier=0.5)
    provider.finalize()
    provider.key_multiplier, provider.kv_channels, provider.layer_pattern = 0.25, 64, "PPPM"
    provider.finalize()
    assert provider.softmax_scale == 0.25 / 8
    assert provider.hetereogenous_dist_checkpoint
    provider.layer_pattern = None
    provider.finalize()
    assert not provider.hetereogenous_dist_checkpoint


def test_the_softmax_scale_takes_the_keys_and_the_inputs_multiplier():
    provider = tiny(key_multiplier=0.3, attention_in_multiplier=1.7, kv_channels=16)
    provider.finalize()
    assert provider.softmax_scale == pytest.approx(0.3 * 1.7**2 / 4, rel=1e-15)
    provider = tiny(kv_channels=None)
    provider.finalize()
    assert provider.softmax_scale == pytest.approx((48 / 4) ** -0.5, rel=1e-15)


def test_lists_become_tuples():
    provider = tiny(mlp_multipliers=[0.5, 2.0], ssm_multipliers=[1.0, 2.0, 3.0, 4.0, 5.0])
    provider.finalize()
    assert provider.mlp_multipliers == (0.5, 2.0)
    assert provider.ssm_multipliers == (1.0, 2.0, 3.0, 4.0, 5.0)


def test_virtual_stages_exchange_tensors_one_by_one():
    """Batched point-to-point calls let the two ranks' tensors cross."""
    provider = tiny(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    provider.finalize()
    assert (provider.overlap_p2p_comm, provider.batch_p2p_comm) == (True, False)
    plain = tiny(pipeline_model_parallel_size=2)
    plain.finalize()
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)


def test_fusions_without_their_packages_are_off():
    provider = tiny(apply_rope_fusion=True, masked_softmax_fusion=True, persist_layer_norm=True)
    provider.finalize()
    assert not (provider.apply_rope_fusion or provider.masked_softmax_fusion or provider.persist_layer_norm)


@pytest.mark.parametrize("bf16", [False, True])
def test_cross_entropy_is_fused_only_in_bf16(bf16):
    """Megatron's fused one rounds its gradient to bf16."""
    provider = tiny(bf16=bf16, cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="native")
    provider.finalize()
    assert provider.cross_entropy_loss_fusion is bf16


def saved_and_loaded(provider, path):
    """Through run_config.yaml, as a checkpoint does it."""
    with safe_yaml_representers():
        saved = yaml.safe_dump({"model": _ConfigContainerBase._convert_value_to_dict(provider)})
    (path / "run_config.yaml").write_text(saved)
    loaded, _ = load_model_config(str(path))
    return saved, loaded


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize(
    "provider",
    [
        tiny(
            layer_pattern="PM*-",
            ssm_multipliers=(0.9, 0.65, 1.6, 0.75, 0.5),
            mlp_multipliers=(0.8, 1.4),
            eos_token_id=[228, 11],
            bf16=True,
            params_dtype=torch.bfloat16,
        ),
        tiny(num_layers=5, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et*3|t*2L"),
        tiny(num_attention_heads=0, parallel_ratio=0.75, mlp_ratio=0.25),
        FalconH1ModelProvider7B(num_layers=2, transformer_impl="local", key_multiplier=0.125),
    ],
    ids=["pattern", "pipeline layout", "ratios", "size class"],
)
def test_a_saved_provider_loads_back_equal(provider, finalized, tmp_path):
    if finalized:
        provider.finalize()
    saved, loaded = saved_and_loaded(provider, tmp_path)
    target = f"{type(provider).__module__}.{type(provider).__qualname__}"
    assert f"_target_: {target}\n" in saved
    assert not any(segment.startswith("_") for segment in target.split("."))
    assert type(loaded) is type(provider)
    assert loaded.transformer_layer_spec is falcon_h1_block_spec
    assert loaded.activation_func is torch.nn.functional.silu
    loaded.finalize()
    provider.finalize()
    assert comparable(fields_of(loaded)) == comparable(fields_of(provider))


def test_multipliers_of_one_are_kept_by_a_size_class(tmp_path):
    """As in the checkpoint of Tiny-90M, whose shape's law says otherwise."""
    ones = {"lm_head_multiplier": 1.0, "ssm_in_multiplier": 1.0, "mlp_multipliers": (1.0, 1.0)}
    provider = FalconH1ModelProvider90M(**ones)
    assert {name: getattr(provider, name) for name in ones} == ones
    _, loaded = saved_and_loaded(provider, tmp_path)
    loaded.finalize()
    assert {name: getattr(loaded, name) for name in ones} == ones


def test_bridge_counts_with_our_hook():
    provider = tiny()
    counted = num_floating_point_operations(SimpleNamespace(model=provider, peft=None), 3, 150, 9000)
    assert counted == falcon_h1_flops(provider, 3, 150, 9000)
