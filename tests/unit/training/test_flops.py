"""The FLOP count against one made by hand: every matrix product of a forward pass, by its three dimensions."""

import pytest

import falcon_bridge
from falcon_bridge.training.flops import falcon_h1_flops


SHAPE = {
    "num_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 32,
    "ffn_hidden_size": 160,
    "mamba_num_heads": 12,
    "mamba_head_dim": 16,
    "mamba_state_dim": 24,
    "mamba_num_groups": 2,
    "conv_kernel": 3,
    "chunk_size": 32,
    "vocab_size": 131,
    "seq_length": 512,
}


def provider(**fields):
    return falcon_bridge.FalconH1ModelProvider(**{**SHAPE, **fields})


def products_of(symbol, p, lengths):
    """`(m, k, n)` of each product of one layer over documents of these lengths; fractional where masks save half."""
    t, h = sum(lengths), p.hidden_size
    if symbol in "P*" and p.num_attention_heads:
        n, g, d = p.num_attention_heads, p.num_query_groups, p.kv_channels
        yield t, h, n * d  # q
        yield t, h, g * d  # k
        yield t, h, g * d  # v
        yield t, n * d, h  # o
        for s in lengths:
            pairs = s * (s + 1) / 2
            yield n * pairs, d, 1  # q·k
            yield n * pairs, 1, d  # p·v
    if symbol in "PM" and p.mamba_num_heads:
        heads, width, state, groups = p.mamba_num_heads, p.mamba_head_dim, p.mamba_state_dim, p.mamba_num_groups
        for part in (heads * width, heads * width, groups * state, groups * state, heads):
            yield t, h, part  # z, x, B, C, dt
        yield t, p.conv_kernel, heads * width + 2 * groups * state
        q, chunks = p.chunk_size, t / p.chunk_size
        for _ in range(groups):
            yield chunks * q, state, q  # C·B
        for _ in range(heads):
            yield chunks * q, q, width  # scores·x
            yield chunks * state, q, width  # the chunk's state
            yield chunks * q, state, width  # its readout
        yield t, heads * width, h
    if symbol in "P-":
        yield t, h, p.ffn_hidden_size  # gate
        yield t, h, p.ffn_hidden_size  # up
        yield t, p.ffn_hidden_size, h  # down


def by_hand(p, pattern, lengths):
    forward = sum(2 * m * k * n for symbol in pattern for m, k, n in products_of(symbol, p, lengths))
    forward += 2 * sum(lengths) * p.hidden_size * p.vocab_size
    return 3 * forward


@pytest.mark.parametrize(
    "pattern", ["PPPP", "MMMM", "****", "----", "PM*-", "PPM-"], ids=["P", "M", "attention", "MLP", "all", "mixed"]
)
def test_patterns_are_counted_layer_by_layer(pattern):
    p = provider(layer_pattern=pattern)
    assert falcon_h1_flops(p, 3) == pytest.approx(by_hand(p, pattern, [512] * 3), rel=0.01)


def test_ratios_are_counted_as_their_pattern():
    ratios = provider(parallel_ratio=0.5, mamba_ratio=0.25, mlp_ratio=0.25)
    assert falcon_h1_flops(ratios, 2) == falcon_h1_flops(provider(layer_pattern=ratios.resolve_layer_pattern()), 2)


@pytest.mark.parametrize("heads", [{"num_attention_heads": 0}, {"mamba_num_heads": 0}], ids=["no attention", "no SSM"])
def test_an_absent_branch_costs_nothing(heads):
    p = provider(**heads)
    assert falcon_h1_flops(p, 2) == pytest.approx(by_hand(p, "PPPP", [512] * 2), rel=0.01)


def test_packed_documents_attend_to_themselves_only():
    p = provider()
    lengths = [400, 112, 300, 100, 112]
    packed = falcon_h1_flops(p, 2, sum(lengths), sum(s * s for s in lengths))
    assert packed == pytest.approx(by_hand(p, "PPPP", lengths), rel=0.01)
    assert packed < 0.98 * falcon_h1_flops(p, 2)


def test_shorter_rows_than_the_model_s_are_counted_by_their_tokens():
    p = provider()
    assert falcon_h1_flops(p, 2, seqlen_sum=300) == pytest.approx(by_hand(p, "PPPP", [150, 150]), rel=0.01)


@pytest.mark.parametrize("size", ["90M", "7B", "34B"])
def test_a_released_size_is_counted(size):
    p = getattr(falcon_bridge, f"FalconH1ModelProvider{size}")(seq_length=4096)
    assert falcon_h1_flops(p, 2) == pytest.approx(by_hand(p, "P" * p.num_layers, [4096] * 2), rel=0.01)


def test_the_default_head_size_and_groups_are_taken():
    implicit = provider(kv_channels=None, num_query_groups=None)
    explicit = provider(kv_channels=16, num_query_groups=6)
    assert falcon_h1_flops(implicit, 2) == falcon_h1_flops(explicit, 2)


def adapters_by_hand(p, pattern, tokens, dim, targets, layers=None):
    """Forward products of the adapters: x·A and its product with B, for each piece that a target stands for."""
    h, heads = p.hidden_size, p.num_attention_heads * p.kv_channels
    d_ssm = p.mamba_num_heads * p.mamba_head_dim
    shapes = {
        "linear_qkv": (h, heads + 2 * p.num_query_groups * p.kv_channels),
        "linear_proj": (heads, h),
        "in_proj": (h, 2 * d_ssm + 2 * p.mamba_num_groups * p.mamba_state_dim + p.mamba_num_heads),
        "out_proj": (d_ssm, h),
        "linear_fc1": (h, 2 * p.ffn_hidden_size),
        "linear_fc2": (p.ffn_hidden_size, h),
    }
    where = {"linear_qkv": "P*", "linear_proj": "P*", "in_proj": "PM", "out_proj": "PM"}
    return sum(
        2 * tokens * dim * sum(shapes[target])
        for number, symbol in enumerate(pattern)
        for target in targets
        if symbol in where.get(target, "P-") and (layers is None or number in layers)
    )


def activations_by_hand(p, pattern, lengths):
    """The part of `products_of` in which both factors are activations: two gradients whatever is frozen."""
    weights = {
        (sum(lengths), width, out)
        for width, out in [
            (p.hidden_size, p.num_attention_heads * p.kv_channels),
            (p.hidden_size, p.num_query_groups * p.kv_channels),
            (p.num_attention_heads * p.kv_channels, p.hidden_size),
            (p.hidden_size, p.d_ssm),
            (p.hidden_size, p.mamba_num_groups * p.mamba_state_dim),
            (p.hidden_size, p.mamba_num_heads),
            (p.d_ssm, p.hidden_size),
            (p.hidden_size, p.ffn_hidden_size),
            (p.ffn_hidden_size, p.hidden_size),
            (p.conv_kernel, p.d_ssm + 2 * p.mamba_num_groups * p.mamba_state_dim),
        ]
    }
    products = [product for symbol in pattern for product in products_of(symbol, p, lengths)]
    return sum(2 * m * k * n for m, k, n in products if (m, k, n) not in weights)


@pytest.mark.parametrize("scheme", ["LoRA", "DoRA"])
@pytest.mark.parametrize("pattern", ["PPPP", "PM*-"])
def test_frozen_weights_have_no_gradient(scheme, pattern):
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

    from falcon_bridge import peft
    from falcon_bridge.recipes import falcon_h1_tiny_cpu_peft_config

    p, lengths = provider(layer_pattern=pattern), [400, 112, 300, 100, 112]
    adapters = getattr(peft, scheme)(dim=24)
    forward = by_hand(p, pattern, lengths) / 3
    expected = 2 * forward + activations_by_hand(p, pattern, lengths)
    expected += 3 * adapters_by_hand(p, pattern, sum(lengths), 24, peft.lora.TARGETS)
    stats = {"seqlen_sum": sum(lengths), "seqlen_squared_sum": sum(s * s for s in lengths)}
    assert falcon_h1_flops(p, 2, *stats.values(), peft=adapters) == pytest.approx(expected, rel=0.01)
    # as Megatron Bridge's training loop asks, of a model that has been built with adapters
    cfg: ConfigContainer = falcon_h1_tiny_cpu_peft_config()
    cfg.model, cfg.peft, p.trained_adapters = p, adapters, adapters
    assert num_floating_point_operations(cfg, 2, **stats) == pytest.approx(expected, rel=0.01)


def test_layers_below_the_lowest_adapter_have_no_backward():
    from falcon_bridge.peft import LoRA

    p = provider()
    adapters = LoRA(target_modules=["*.layers.2.*.in_proj", "*.layers.3.*.in_proj"], dim=8)
    tokens, rows = 1024, [512, 512]
    layer = (by_hand(p, "PPPP", rows) - by_hand(p, "PPP", rows)) / 3
    head = by_hand(p, "PPPP", rows) / 3 - 4 * layer
    expected = 2 * layer + 2 * (2 * layer + activations_by_hand(p, "P", rows)) + 2 * head
    expected += 3 * adapters_by_hand(p, "PPPP", tokens, 8, ["in_proj"], layers=(2, 3))
    assert falcon_h1_flops(p, 2, peft=adapters) == pytest.approx(expected, rel=0.01)
