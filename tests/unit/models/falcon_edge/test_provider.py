"""What a provider refuses, computes and builds."""

import pytest
import torch

import falcon_bridge  # noqa: F401  before megatron.bridge
from falcon_bridge.bitnet import TERNARY_MODULES, BitNetColumnParallelLinear, BitNetRowParallelLinear
from falcon_bridge.models.falcon_edge.flops import falcon_edge_flops
from falcon_bridge.models.falcon_edge.provider import FalconEdgeModelProvider
from falcon_bridge.models.falcon_edge.sizes import FalconEdgeModelProvider1B, FalconEdgeModelProvider3B
from falcon_bridge.training.memory import count_parameters


TINY = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 80,
    "vocab_size": 131,
    "seq_length": 64,
    "transformer_impl": "local",
}


def tiny(**fields):
    return FalconEdgeModelProvider(**{**TINY, **fields})


def build(**fields):
    provider = tiny(make_vocab_size_divisible_by=64, **fields)
    provider.finalize()
    return provider.provide_distributed_model(wrap_with_ddp=False, data_parallel_random_init=False)[0]


@pytest.mark.parametrize(
    ("provider", "parameters"),
    [(FalconEdgeModelProvider1B, 1_719_764_992), (FalconEdgeModelProvider3B, 3_053_586_432)],
)
def test_released_sizes_have_the_published_parameters(provider, parameters):
    assert count_parameters(provider()) == parameters
    provider().finalize()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_moe_experts": 4}, "num_moe_experts=4 is not supported"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True is not supported"),
        ({"mtp_num_layers": 1}, "mtp_num_layers=1 is not supported"),
        ({"mtp_num_layers": 1, "use_bitnet": False}, "mtp_num_layers=1 is not supported"),
        ({"fp8": "hybrid"}, "fp8='hybrid' is not supported with use_bitnet=True"),
        (
            {"transformer_impl": "inference_optimized"},
            "transformer_impl='inference_optimized' is not supported with use",
        ),
        ({"use_kitchen": True}, "use_kitchen=True is not supported with use_bitnet=True"),
        ({"tp_comm_overlap": True}, "tp_comm_overlap=True is not supported with use_bitnet=True"),
        ({"bitnet_backend": "cublas"}, "bitnet_backend"),
        ({"use_bitnet": False, "bitnet_backend": "fused"}, "bitnet_backend='fused' would do nothing"),
        ({"qk_layernorm": True}, "qk_layernorm=True is not supported"),
        ({"add_bias_linear": True}, "add_bias_linear=True is not supported"),
        ({"fp16": True}, "fp16=True is not supported; use bf16"),
        (
            {"activation_func_fp8_input_store": True},
            "activation_func_fp8_input_store=True is not supported; .* to False",
        ),
        ({"use_te_activation_func": True}, "use_te_activation_func=True is not supported; .* to False"),
        ({"cpu_offloading": True}, "cpu_offloading=True is not supported with use_bitnet=True"),
        (
            {"cpu_offloading": True, "cpu_offloading_num_layers": 1, "use_bitnet": False},
            "cpu_offloading=True is not supported; .* use recompute_granularity",
        ),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm' is not supported by Falcon-Edge; use 'RMSNorm'"),
        ({"activation_func": torch.nn.functional.gelu}, "activation_func=.* use silu"),
        ({"rotary_percent": 0.5}, "rotary_percent=0.5 is not supported by Falcon-Edge; use 1.0"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset=1.0 is not supported by Falcon-Edge; use 0.0"),
        ({"softmax_type": "learnable"}, "softmax_type='learnable' is not supported by Falcon-Edge; use 'vanilla'"),
        ({"no_rope_freq": 2}, "no_rope_freq=2 is not supported by Falcon-Edge; use None"),
        ({"bitnet_warmup_steps": None}, "bitnet_warmup_steps must be an integer of 0 or more, not None"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type='yarn' is not supported"),
        ({"num_query_groups": 3}, "num_attention_heads=4 must be a multiple of num_query_groups=3"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be positive"),
        ({"tensor_model_parallel_size": 3}, r"tensor_model_parallel_size=3 does not fit .*: use one of \[1, 2, 4\]"),
        ({"num_query_groups": 4, "tensor_model_parallel_size": 8}, r"use one of \[1, 2, 4\]"),
        ({"pipeline_model_parallel_size": 4}, "num_layers=2 does not split evenly over 4 pipeline stages"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            "recompute_modules has 'layernorm'",
        ),
    ],
)
def test_what_the_model_cannot_be_is_named(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(**fields).finalize()
    assert "\n" not in str(error.value)


def test_every_projection_is_ternary_and_nothing_else(one_rank):
    model = build()
    ternary = {
        name
        for name, m in model.named_modules()
        if isinstance(m, BitNetColumnParallelLinear | BitNetRowParallelLinear)
    }
    of_layer = [module.megatron for module in TERNARY_MODULES if module.branch != "SSM"]
    assert len(ternary) == TINY["num_layers"] * len(of_layer)
    assert {name.rpartition(".")[2] for name in ternary} == set(of_layer)


def test_the_dense_twin_has_the_same_parameters_and_other_outputs(one_rank):
    ternary, dense = build(), build(use_bitnet=False)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (ternary, dense)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in dense.parameters()) == count_parameters(tiny(vocab_size=192))
    dense.load_state_dict(ternary.state_dict())
    tokens = torch.arange(20)[None] + 3
    with torch.no_grad():
        first, second = (model(tokens, torch.arange(20)[None], None) for model in (ternary, dense))
    assert 1e-3 < (first - second)[..., :131].abs().max() < 1


def test_padded_columns_of_the_vocabulary_are_masked(one_rank):
    model = build()
    tokens = torch.arange(20)[None] + 3
    with torch.no_grad():
        logits = model(tokens, torch.arange(20)[None], None)
    assert logits.shape[-1] == 192
    assert (logits[..., 131:] == torch.finfo(logits.dtype).min).all() and (logits[..., :131].abs() < 100).all()


def test_flops_are_those_of_the_matrix_products():
    provider = tiny(seq_length=32)
    per_token_of_layer = 48 * (64 + 32 + 32 + 64) + 3 * 48 * 80
    # q·k and p·v over half of the square, 64 wide
    dense = 5 * 32 * (2 * per_token_of_layer + 48 * 131) + 2 * 5 * 32**2 / 2 * 64 * 2
    assert falcon_edge_flops(provider, 5) == 6 * dense
    assert provider._get_num_floating_point_operations_with_runtime_stats(5) == 6 * dense
    packed = falcon_edge_flops(provider, 5, seqlen_sum=160, seqlen_squared_sum=5 * 32**2 // 4)
    assert falcon_edge_flops(provider, 5) - packed == 6 * 2 * (5 * 32**2 * 3 / 4) / 2 * 64 * 2


def test_the_vocabulary_must_be_known(one_rank):
    provider = tiny(vocab_size=None)
    provider.finalize()
    with pytest.raises(ValueError, match="vocab_size is not set"):
        provider.provide_distributed_model(wrap_with_ddp=False, data_parallel_random_init=False)
