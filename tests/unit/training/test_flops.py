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
