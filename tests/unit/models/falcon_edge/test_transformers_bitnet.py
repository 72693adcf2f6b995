"""Our packing and our reference against transformers' own BitNet layers.

Codes round half up here, half to even there, so activation codes may differ by one exactly where the scaled value is a
half (or, in fp32, so near that adding 0.5 rounds up). Everything else of `BitLinear` is the same arithmetic: tokens
without such ties must agree bit for bit, and others to within the ties' own contribution.
"""

import pytest
import torch

from falcon_bridge.bitnet.reference import bitlinear, quantize_activation, quantize_weight
from falcon_bridge.models.falcon_edge.packing import dequantization_factor, pack_ternary, unpack_ternary
from tests.unit.bitnet.weights import draw, uneven


SHAPES = [(4, 1), (8, 7), (48, 37), (64, 501)]


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Compiling transformers' decorated functions takes longer than all tests here, and changes no result."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def upstream():
    from transformers.integrations import bitnet

    return bitnet


def tokens(count, in_features, dtype=torch.float32):
    """Tokens of different magnitudes, of which the last has ties everywhere."""
    x = draw(count, in_features, seed=3) * 10 ** draw(count, 1, seed=4)
    x[-1] = torch.arange(in_features) % 100 - 50.5
    x[-1, 0] = 127
    return x.to(dtype)


def tie_differences(x):
    """|difference| of each code between the two roundings."""
    codes, a = quantize_activation(x)
    scaled = x.float() * a
    half_even = scaled.round().clamp(-128, 127)
    difference = (codes.float() - half_even).abs()
    distance_to_half = ((scaled - scaled.floor()) - 0.5).abs()
    assert (difference <= 1).all() and (distance_to_half[difference > 0] <= 1e-5).all()
    return difference


def online(upstream, W):
    layer = upstream.AutoBitLinear(W.shape[1], W.shape[0], bias=False, online_quant=True)
    layer.weight.data = W.clone()
    return layer


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_bytes_are_identical(upstream, shape):
    codes, _ = quantize_weight(uneven(*shape))
    theirs = upstream.pack_weights(codes.clone())  # adds one to its argument
    assert torch.equal(pack_ternary(codes), theirs)
    assert torch.equal(unpack_ternary(theirs), upstream.unpack_weights(theirs, torch.int8))
    assert torch.equal(unpack_ternary(theirs), codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_gives_the_training_layers_outputs(upstream, shape, dtype):
    """bf16 weights and inputs too, held in fp32: the packed layer's own bf16 arithmetic is coarser (next test)."""
    W, x = uneven(*shape, dtype=dtype), tokens(23, shape[1], dtype)
    codes, s = quantize_weight(W)
    layer = upstream.BitLinear(shape[1], shape[0], bias=False, dtype=torch.float32)
    layer.weight, layer.weight_scale = pack_ternary(codes), s.reshape(1)
    theirs = layer(x.float())
    ours = bitlinear(x.float(), W.float())
    ties = tie_differences(x).sum(-1, keepdim=True)
    assert torch.equal(ours[ties[:, 0] == 0], theirs[ties[:, 0] == 0])
    _, a = quantize_activation(x)
    assert ((ours - theirs).abs() <= ties / (a * s) * (1 + 1e-6) + 1e-6 * ours.abs()).all()
    assert (ties == 0).double().mean() > 0.5
    if shape[1] > 4:
        assert ties[-1] > 0 and not torch.equal(ours[-1], theirs[-1])


def test_a_packed_layer_in_bf16_is_close(upstream):
    """It scales in bf16, which moves codes by one, and rounds the integer sum and its quotient to bf16."""
    W, x = uneven(64, 501, dtype=torch.bfloat16), tokens(23, 501, torch.bfloat16)[:-1]
    codes, s = quantize_weight(W)
    layer = upstream.BitLinear(501, 64, bias=False, dtype=torch.bfloat16)
    layer.weight, layer.weight_scale = pack_ternary(codes), s.reshape(1).bfloat16()
    theirs, ours = layer(x).float(), bitlinear(x, W).float()
    difference = ((ours - theirs).norm(dim=-1) / ours.norm(dim=-1)).max()
    assert 1e-4 < difference < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_the_online_layer_has_the_same_outputs_and_gradients(upstream, shape):
    """It dequantises first and multiplies in fp32: sums of K products differ by at most (K+16)·2^-24·Σ|xW|."""
    W, x, dy = uneven(*shape), tokens(23, shape[1])[:-1], draw(22, shape[0], seed=8)
    layer = online(upstream, W)
    ours_W, ours_x, theirs_x = W.clone().requires_grad_(), x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = bitlinear(ours_x, ours_W), layer(theirs_x)
    ours.backward(dy), theirs.backward(dy)

    codes, s = quantize_weight(W)
    q, a = quantize_activation(x)
    ties = tie_differences(x)
    W_hat, x_hat = codes.float() / s, q.float() / a
    unit = torch.finfo(torch.float32).eps / 2

    def assert_within(actual, expected, factors, terms, from_ties):
        left, right = factors
        bound = (terms + 16) * unit * (left.abs() @ right.abs()) + from_ties
        assert ((actual - expected).abs() <= bound).all()

    tie_step = ties / a * (1 + 1e-6)
    assert_within(ours, theirs, (x_hat, W_hat.T), shape[1], tie_step @ W_hat.abs().T)
    assert_within(ours_x.grad, theirs_x.grad, (dy, W_hat), shape[0], 0.0)
    assert_within(ours_W.grad, layer.weight.grad, (dy.T, x_hat), len(x), dy.abs().T @ tie_step)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("mode", ["offline", None])
def test_the_factor_is_the_one_that_transformers_applies(upstream, linear_class, mode):
    """Feeds an identity matrix to the layer that transformers builds for a config, to read its weights back."""
    from transformers import BitNetQuantConfig

    options = {"linear_class": linear_class} | ({"quantization_mode": mode} if mode else {})
    config = BitNetQuantConfig(modules_to_not_convert=["lm_head"], **options)
    codes, _ = quantize_weight(uneven(8, 16))
    model = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
    upstream.replace_with_bitnet_linear(model, quantization_config=config)
    layer = model[0].to_empty(device="cpu")
    assert type(layer).__name__.lower() == linear_class
    stored = {"weight": pack_ternary(codes), "weight_scale": torch.tensor([0.75])}
    layer.load_state_dict(stored)
    weights = layer(torch.eye(16)).T
    for entry in (config, config.to_dict()):
        factor = dequantization_factor(stored["weight_scale"], entry)
        torch.testing.assert_close(weights, codes.float() * factor, rtol=1e-6, atol=0)
