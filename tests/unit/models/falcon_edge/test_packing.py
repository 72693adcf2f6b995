from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_bridge.bitnet.reference import quantize_weight
from falcon_bridge.models.falcon_edge.packing import (
    dequantization_factor,
    latent_weight,
    pack_ternary,
    unpack_ternary,
)
from tests.unit.bitnet.weights import uneven


FALCON_E = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
AUTO_OFFLINE = FALCON_E | {"linear_class": "autobitlinear", "quantization_mode": "offline"}


def ternary(out_features, in_features, seed=0):
    """Codes with different shares of -1, 0 and 1 in each row."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(out_features, in_features, generator=generator)
    edges = torch.rand(out_features, 2, generator=generator).sort(-1).values
    return ((values > edges[:, :1]).to(torch.int8) + (values > edges[:, 1:]).to(torch.int8)) - 1


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    quarter=st.integers(1, 9),
    in_features=st.integers(1, 13),
    dtype=st.sampled_from([torch.int8, torch.int64, torch.float32, torch.bfloat16]),
    strided=st.booleans(),
    seed=st.integers(0, 3),
)
def test_bytes_are_those_of_the_definition_and_unpack_again(quarter, in_features, dtype, strided, seed):
    codes = ternary(4 * quarter, in_features, seed=seed)
    given_codes = codes.to(dtype)
    if strided:
        given_codes = given_codes.T.contiguous().T
    packed = pack_ternary(given_codes)
    assert torch.equal(given_codes, codes.to(dtype))
    rows = codes.tolist()
    for r in range(quarter):
        for c in range(in_features):
            assert packed[r, c] == sum((rows[i * quarter + r][c] + 1) << 2 * i for i in range(4))
    unpacked = unpack_ternary(packed.T.contiguous().T if strided else packed, shape=codes.shape)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, codes)


def test_unpacking_leaves_its_input_as_it_is():
    packed = pack_ternary(ternary(8, 5))
    before = packed.clone()
    unpack_ternary(packed)
    assert torch.equal(packed, before)


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.zeros(6, 3), "q: 6 out features are not a multiple of 4.* export as prequantized or bf16"),
        (torch.zeros(4), r"q: only a matrix \[out, in\] can be packed, got \[4\]"),
        (torch.zeros(4, 3, 2), r"got \[4, 3, 2\]"),
        (torch.tensor([[0, 1], [1, 2], [0, 0], [-2, 0]]), r"q: value 2 at \[1, 1\] is not a ternary code"),
        (torch.tensor([[0, 1], [0.5, 1], [0, 0], [0, 0]]), r"value 0.5 at \[1, 0\]"),
        (torch.tensor([[0, 1], [0, 1], [0, 0], [0, float("nan")]]), r"value nan at \[3, 1\]"),
        (torch.tensor([[0, 1], [0, 1], [0, 300], [0, 0]]), r"value 300 at \[2, 1\]"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(codes, message):
    with pytest.raises(ValueError, match=message) as error:
        pack_ternary(codes, name="q")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "packed, shape, message",
    [
        (torch.zeros(2, 3), None, "k: packed ternary weights are uint8, got torch.float32: this checkpoint's weights"),
        (torch.zeros(2, dtype=torch.uint8), None, r"k: packed ternary weights are a matrix .* got \[2\]"),
        (
            torch.zeros(2, 3, dtype=torch.uint8),
            (8, 4),
            r"k: packed shape \[2, 3\] holds a weight \[8, 3\], but the model's is \[8, 4\]",
        ),
        (torch.zeros(8, 3, dtype=torch.uint8), (8, 3), r"holds a weight \[32, 3\]"),
    ],
)
def test_what_is_not_packed_is_refused_in_one_line(packed, shape, message):
    with pytest.raises(ValueError, match=message) as error:
        unpack_ternary(packed, shape=shape, name="k")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block", range(4))
def test_code_3_is_refused_with_its_place(block):
    packed = pack_ternary(ternary(12, 5, seed=1))
    packed[1, 3] |= 3 << 2 * block
    packed[2, 0] |= 3 << 2 * block
    byte = packed[1, 3].item()
    with pytest.raises(
        ValueError, match=rf"^v: byte 0x{byte:02x} at \[1, 3\] holds the code 3 for weight \[{block * 3 + 1}, 3\]"
    ):
        unpack_ternary(packed, name="v")


def test_every_byte_without_code_3_is_accepted_and_every_other_refused():
    refused = 0
    for byte in range(256):
        packed = torch.tensor([[byte]], dtype=torch.uint8)
        digits = [byte >> shift & 3 for shift in (0, 2, 4, 6)]
        if 3 in digits:
            refused += 1
            with pytest.raises(ValueError, match="code 3"):
                unpack_ternary(packed)
        else:
            assert unpack_ternary(packed).flatten().tolist() == [digit - 1 for digit in digits]
    assert refused == 256 - 81


@pytest.mark.parametrize(
    "config, factor",
    [
        (FALCON_E, 1 / 40.0),
        (FALCON_E | {"linear_class": "bitlinear"}, 1 / 40.0),
        (FALCON_E | {"linear_class": "bitlinear", "quantization_mode": "offline"}, 1 / 40.0),
        (AUTO_OFFLINE, 40.0),
        (FALCON_E | {"linear_class": "autobitlinear"}, 40.0),
        (SimpleNamespace(quant_method=SimpleNamespace(value="bitnet"), linear_class="autobitlinear"), 40.0),
    ],
)
@pytest.mark.parametrize("shape", [(1,), ()])
def test_the_convention_follows_the_config(config, factor, shape):
    stored = torch.full(shape, 40.0, dtype=torch.bfloat16)
    assert dequantization_factor(stored, config) == factor


SCALE = torch.tensor([40.0])


@pytest.mark.parametrize(
    "stored, config, message",
    [
        (None, FALCON_E, "missing, so the packed weights have no magnitude"),
        (torch.tensor([0.0]), FALCON_E, "must be positive and finite, got 0.0"),
        (torch.tensor([-2.0]), FALCON_E, "got -2.0"),
        (torch.tensor([float("nan")]), AUTO_OFFLINE, "got nan"),
        (torch.tensor([float("inf")]), FALCON_E, "got inf"),
        (torch.tensor([5e-324], dtype=torch.float64), FALCON_E, "too small to be 1 / mean"),
        (torch.tensor([1e-42]), FALCON_E, "too small to be 1 / mean"),
        (torch.tensor([1e38]), AUTO_OFFLINE, "too large to be mean"),
        (torch.ones(2), FALCON_E, r"must be one floating-point number of shape \[1\], got torch.float32 \[2\]"),
        (torch.ones(1, 1), FALCON_E, r"got torch.float32 \[1, 1\]"),
        (torch.ones(1, dtype=torch.int64), FALCON_E, "got torch.int64"),
        (SCALE, None, "config.json has no quantization_config, so the scale could be mean.*or its inverse"),
        (SCALE, {"modules_to_not_convert": ["lm_head"]}, "quant_method is None"),
        (SCALE, FALCON_E | {"quant_method": "gptq"}, "quant_method is 'gptq'"),
        (SCALE, FALCON_E | {"linear_class": "ternary"}, "linear_class is 'ternary', so the scale could be"),
        (SCALE, FALCON_E | {"linear_class": None}, "linear_class is None"),
        (SCALE, AUTO_OFFLINE | {"quantization_mode": "online"}, "quantization_mode is 'online', but only 'offline'"),
        (SCALE, FALCON_E | {"quantization_mode": "online"}, "quantization_mode is 'online'"),
    ],
)
def test_a_scale_that_could_be_misread_is_refused_in_one_line(stored, config, message):
    with pytest.raises(ValueError, match=message) as error:
        dequantization_factor(stored, config, name="layers.3.mlp.up_proj.weight_scale")
    assert str(error.value).startswith("layers.3.mlp.up_proj.weight_scale: ") and "\n" not in str(error.value)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    out_features=st.integers(1, 33),
    in_features=st.integers(1, 33),
    factor=st.floats(1e-4, 10),
    seed=st.integers(0, 9),
)
def test_latents_quantise_to_the_same_codes_and_scale(out_features, in_features, factor, seed):
    codes = ternary(out_features, in_features, seed=seed)
    latent = latent_weight(codes, factor)
    again, scale = quantize_weight(latent)
    assert torch.equal(again, codes)
    if codes.any():
        assert abs(scale.item() * factor - 1) <= 2 * torch.finfo(torch.float32).eps
    again, scale = quantize_weight(latent.bfloat16())
    assert torch.equal(again, codes)
    if codes.any():
        assert abs(scale.item() * factor - 1) <= 1.01 * 2**-8


def test_dequantised_weights_are_no_latents():
    """The trap that `latent_weight` avoids: the scale of codes·factor is off by the share of non-zero codes."""
    codes, scale = quantize_weight(uneven(32, 48))
    again, wrong = quantize_weight(codes.float() / scale)
    assert torch.equal(again, codes)
    assert wrong / scale == pytest.approx(codes.numel() / codes.count_nonzero().item(), rel=1e-5)
    assert wrong / scale > 1.2


def test_zeros_stay_zeros():
    codes = torch.zeros(4, 3, dtype=torch.int8)
    assert torch.equal(unpack_ternary(pack_ternary(codes)), codes)
    assert (latent_weight(codes, 0.3) == 0).all()
